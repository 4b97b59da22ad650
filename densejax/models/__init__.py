"""The networks. A family and the values of its fields describe one; `MODELS` has names for many.

A family is a linen module with a field `num_classes` (0: without a classifier). It may have the
fields `dtype`, `batch_norm_axis` and `frozen`; every other field is a key of `config.model`. It has

- `check()`, which raises UserError for fields that describe no network, and
- `__call__(image, train=False, keys=None)`, which returns (logits, features): float32 [batch,
  num_classes] or None, and a dict of arrays in the order in which they are computed. `image` is
  float [batch, height, width, channels], normalised. With `train`, BatchNorm uses batch statistics
  and updates the collection "batch_stats". A network that draws at random then draws from `keys`,
  one key for each example: typed [batch] or uint32 [batch, 2].

`DenseBlock` is a module for networks of your own.
"""

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import config_dict

from densejax.config import UserError, did_you_mean
from densejax.models.dense_block import DenseBlock as DenseBlock
from densejax.models.densenet import DenseNet
from densejax.models.hardnet import HarDNet
from densejax.models.rdnet import RDNet
from densejax.models.resnet import ResNet
from densejax.models.vovnet import VoVNet

FAMILIES = {"densenet": DenseNet, "resnet": ResNet, "vovnet": VoVNet}
FAMILIES |= {"rdnet": RDNet, "hardnet": HarDNet}
# The run sets these fields; they are no part of a network's description.
RUN_FIELDS = ("num_classes", "dtype", "batch_norm_axis", "frozen", "parent", "name")

# The four forms of the paper: bottleneck (B) and compression (C) each on or off.
VARIANTS = {
    "plain": {"bottleneck": False, "compression": 1.0},
    "b": {"bottleneck": True, "compression": 1.0},
    "c": {"bottleneck": False, "compression": 0.5},
    "bc": {"bottleneck": True, "compression": 0.5},
}
_DENSENET = {"family": "densenet"}
_ONE_SHOT = _DENSENET | VARIANTS["plain"] | {"connect": "one_shot"}
_IMAGENET = {"family": "densenet", "stem": "imagenet"}
_RESNET = {"family": "resnet", "stem": "imagenet", "widths": (64, 128, 256, 512)}
_BOTTLENECK = _RESNET | {"block": "bottleneck"}
_RESNET_CIFAR = {"family": "resnet", "shortcut": "identity"}
_PREACT = {"family": "resnet", "preactivation": True, "block": "bottleneck", "stride_on": "1x1"}
_PLAIN = {"family": "resnet", "connect": "chain"}
_VOVNET = {"family": "vovnet"}
_HARDNET = {"family": "hardnet"}
_RDNET = {"family": "rdnet"}
_VOVNET_V2 = _VOVNET | {"squeeze_excite": True}
MODELS = {
    "densenet_40_12": _DENSENET | VARIANTS["plain"] | {"depth": 40, "growth_rate": 12},
    "densenet_100_12": _DENSENET | VARIANTS["plain"] | {"depth": 100, "growth_rate": 12},
    "densenet_100_24": _DENSENET | VARIANTS["plain"] | {"depth": 100, "growth_rate": 24},
    "densenet_b_100_12": _DENSENET | VARIANTS["b"] | {"depth": 100, "growth_rate": 12},
    "densenet_c_40_12": _DENSENET | VARIANTS["c"] | {"depth": 40, "growth_rate": 12},
    "densenet_bc_40_12": _DENSENET | {"depth": 40, "growth_rate": 12},
    "densenet_bc_40_36": _DENSENET | {"depth": 40, "growth_rate": 36},
    "densenet_bc_40_48": _DENSENET | {"depth": 40, "growth_rate": 48},
    "densenet_bc_40_60": _DENSENET | {"depth": 40, "growth_rate": 60},
    "densenet_bc_100_12": _DENSENET | {"depth": 100, "growth_rate": 12},
    "densenet_bc_190_40": _DENSENET | {"depth": 190, "growth_rate": 40},
    "densenet_bc_250_24": _DENSENET | {"depth": 250, "growth_rate": 24},
    "sparsenet_bc_100_24": _DENSENET | {"depth": 100, "growth_rate": 24, "connect": "exponential"},
    "densenet121": _IMAGENET | {"blocks": (6, 12, 24, 16), "growth_rate": 32},
    "densenet161": _IMAGENET | {"blocks": (6, 12, 36, 24), "growth_rate": 48},
    "densenet169": _IMAGENET | {"blocks": (6, 12, 32, 32), "growth_rate": 32},
    "densenet201": _IMAGENET | {"blocks": (6, 12, 48, 32), "growth_rate": 32},
    "densenet232": _IMAGENET | {"blocks": (6, 12, 48, 48), "growth_rate": 48},
    "densenet264": _IMAGENET | {"blocks": (6, 12, 64, 48), "growth_rate": 32},
    "densenet264_48": _IMAGENET | {"blocks": (6, 12, 64, 48), "growth_rate": 48},
    "densenet_d2l": _IMAGENET
    | VARIANTS["c"]
    | {"blocks": (4, 4, 4, 4), "growth_rate": 32, "stem_width": 64, "convolution_bias": True},
    # One-shot aggregation in place of DenseNet-40's dense blocks. The widths in the published
    # experiment are not verified: it is said to use 12 layers of width 20, or 5 of width 43. With
    # 12 layers, width 27 comes nearest to the parameters of densenet_40_12.
    "densenet_one_shot_40_20": _ONE_SHOT | {"depth": 40, "growth_rate": 20},
    "densenet_one_shot_40_27": _ONE_SHOT | {"depth": 40, "growth_rate": 27},
    "densenet_one_shot_19_43": _ONE_SHOT | {"depth": 19, "growth_rate": 43},
    "resnet18": _RESNET | {"blocks": (2, 2, 2, 2)},
    "resnet34": _RESNET | {"blocks": (3, 4, 6, 3)},
    "resnet50": _BOTTLENECK | {"blocks": (3, 4, 6, 3)},
    "resnet101": _BOTTLENECK | {"blocks": (3, 4, 23, 3)},
    "resnet152": _BOTTLENECK | {"blocks": (3, 8, 36, 3)},
    "resnet20_cifar": _RESNET_CIFAR | {"blocks": (3, 3, 3)},
    "resnet32_cifar": _RESNET_CIFAR | {"blocks": (5, 5, 5)},
    "resnet44_cifar": _RESNET_CIFAR | {"blocks": (7, 7, 7)},
    "resnet56_cifar": _RESNET_CIFAR | {"blocks": (9, 9, 9)},
    "resnet110_cifar": _RESNET_CIFAR | {"blocks": (18, 18, 18)},
    "resnet1202_cifar": _RESNET_CIFAR | {"blocks": (200, 200, 200)},
    "preact_resnet164": _PREACT | {"blocks": (18, 18, 18)},
    "preact_resnet1001": _PREACT | {"blocks": (111, 111, 111)},
    "plain18": _RESNET | _PLAIN | {"blocks": (2, 2, 2, 2)},
    "plain34": _RESNET | _PLAIN | {"blocks": (3, 4, 6, 3)},
    "plain20_cifar": _PLAIN | {"blocks": (3, 3, 3)},
    "plain32_cifar": _PLAIN | {"blocks": (5, 5, 5)},
    "plain44_cifar": _PLAIN | {"blocks": (7, 7, 7)},
    "plain56_cifar": _PLAIN | {"blocks": (9, 9, 9)},
    "plain110_cifar": _PLAIN | {"blocks": (18, 18, 18)},
    "vovnet27_slim": _VOVNET
    | {"modules": (1, 1, 1, 1), "widths": (64, 80, 96, 112), "output_widths": (128, 256, 384, 512)},
    "vovnet39": _VOVNET | {"modules": (1, 1, 2, 2)},
    "vovnet57": _VOVNET | {"modules": (1, 1, 4, 3)},
    "ese_vovnet19b_dw": _VOVNET_V2
    | {"modules": (1, 1, 1, 1), "module_depth": 3, "stem_widths": (64, 64, 64), "separable": True},
    "ese_vovnet39b": _VOVNET_V2 | {"modules": (1, 1, 2, 2)},
    "ese_vovnet57b": _VOVNET_V2 | {"modules": (1, 1, 4, 3)},
    "rdnet_tiny": _RDNET,
    "rdnet_small": _RDNET
    | {"stem_width": 72, "growth_rates": (64, *(128,) * 8, 240, 240), "downsampling": (2, 3, 10)},
    "rdnet_base": _RDNET
    | {"stem_width": 120, "growth_rates": (96, 128, *(168,) * 7, 336, 336)}
    | {"downsampling": (2, 3, 10)},
    "rdnet_large": _RDNET
    | {"stem_width": 144, "growth_rates": (128, 192, *(256,) * 8, 360, 360)}
    | {"downsampling": (2, 3, 11)},
    # This one is ours, since no paper has an RDNet for small images. Its stages have 16x16, 8x8 and
    # 4x4 pixels, and it has about as many parameters as densenet_bc_100_12.
    "rdnet_cifar": _RDNET
    | {"stem_width": 32, "stem_stride": 2}
    | {"growth_rates": (24, 32, 40, 40), "downsampling": (2, 3)},
    "hardnet39ds": _HARDNET
    | {"stem_widths": (24, 48), "blocks": (4, 16, 8, 4), "growth_rates": (16, 20, 64, 160)}
    | {"output_widths": (96, 320, 640, 1024), "downsampling": (1, 2, 3)}
    | {"connect": "hardnet:multiplier=1.6", "separable": True, "dropout_rate": 0.05},
    "hardnet68": _HARDNET | {"dropout_rate": 0.1},
    "hardnet68ds": _HARDNET | {"separable": True, "dropout_rate": 0.05},
    "hardnet85": _HARDNET
    | {"stem_widths": (48, 96), "blocks": (8, 16, 16, 16, 16, 4), "dropout_rate": 0.2}
    | {"growth_rates": (24, 24, 28, 36, 48, 256), "downsampling": (1, 3, 5)}
    | {"output_widths": (192, 256, 320, 480, 720, 1280)},
}


# The arguments of a card that change a named network; None leaves it as it is.
CHANGES = {"variant": None, "depth": None, "growth_rate": None, "connect": None}


def changes(args: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a card's arguments change (raises UserError for an unknown variant)."""
    given = {name: args[name] for name in CHANGES if args[name] is not None}
    variant = given.pop("variant", None)
    if variant is not None and variant not in VARIANTS:
        raise UserError(f"variant = {variant!r}: allowed are {', '.join(VARIANTS)}")
    return given | VARIANTS.get(variant, {})


def _description(family: str) -> dict[str, dataclasses.Field]:
    """The fields that describe a network of a family, by name."""
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"model.family = {family!r}: allowed are {', '.join(FAMILIES)}")
    fields = dataclasses.fields(FAMILIES[family])
    return {field.name: field for field in fields if field.name not in RUN_FIELDS}


def meanings(family: str) -> dict[str, str]:
    """The meaning of each field of a family, from its class's docstring, and the field's type."""
    text = inspect.getdoc(FAMILIES[family]) or ""
    said = dict(re.findall(r"^  (\w+): ((?:.|\n    )+)", text, re.MULTILINE))
    found = {"family": f"Allowed: {' or '.join(FAMILIES)}."}
    for name, field in _description(family).items():
        meaning = " ".join(said.get(name, "").split())
        found[name] = f"{meaning} (type {_type_name(field.type)})".lstrip()
    return found


def described(section: Mapping[str, Any]) -> str:
    """The name of a network, or its family and what differs from the family's defaults."""
    values = dict(section)
    family = values.pop("family")
    defaults = {name: field.default for name, field in _description(family).items()}
    for name, known in MODELS.items():
        if defaults | known == values | {"family": family}:
            return name
    changed = [f"{name} = {values[name]}" for name in defaults if values[name] != defaults[name]]
    return f"{family} with {', '.join(changed) or 'the default fields'}"


def fields(name: str, **changes) -> config_dict.ConfigDict:
    """The section `config.model` of a named network, with every field of its family.

    Raises:
      UserError: an unknown name or field; the message lists what is allowed.
    """
    if name not in MODELS:
        hint = did_you_mean(name, MODELS)
        raise UserError(f"model = {name!r}{hint}: allowed are {', '.join(sorted(MODELS))}")
    values = MODELS[name] | changes
    description = _description(values["family"])
    if unknown := sorted(set(values) - set(description) - {"family"}):
        hint = did_you_mean(unknown[0], description)
        has = f"{values['family']} has {', '.join(description)}"
        raise UserError(f"model.{unknown[0]}{hint}: {has}")
    section = config_dict.ConfigDict({"family": values["family"]})
    hints = typing.get_type_hints(FAMILIES[values["family"]])
    for field in description.values():
        value = values.get(field.name, field.default)
        if isinstance(hints[field.name], types.UnionType):  # an override may have any of the types
            value = config_dict.FieldReference(value, field_type=object)
        section[field.name] = value
    return section


def usual_images(name: str) -> tuple[tuple[int, int, int], int]:
    """(image shape, number of classes) with which a named network is counted."""
    if name == "densenet_d2l":
        return (96, 96, 1), 10
    is_small = fields(name).get("stem") == "cifar" or name == "rdnet_cifar"
    return ((32, 32, 3), 10) if is_small else ((224, 224, 3), 1000)


def completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Updates a stored section `config.model`: today's names, and defaults for newer fields."""
    values = dict(stored)
    if "join" in values:  # the name of `connect` in earlier versions
        join = values.pop("join")
        values["connect"] = "chain" if join == "none" else join
    defaults = {name: field.default for name, field in _description(values["family"]).items()}
    return defaults | values


def create(
    model: Mapping[str, Any],
    num_classes: int,
    dtype: Any = jnp.float32,
    batch_norm_axis: str | None = None,
) -> nn.Module:
    """Builds a network from the section `config.model`; with 0 classes it has no classifier.

    Raises:
      UserError: a field that its family does not have, or a value that describes no network.
    """
    values = dict(model)
    if "family" not in values:
        raise UserError("model is empty: a card sets config.model = models.fields(NAME)")
    family = values.pop("family")
    description = _description(family)
    if wrong := sorted(set(values) ^ set(description)):
        raise UserError(f"model.{wrong[0]}: the fields of {family} are {', '.join(description)}")
    hints = typing.get_type_hints(FAMILIES[family])
    for name, value in values.items():
        if not _is_a(value, hints[name]):
            wanted = _type_name(hints[name])
            raise UserError(f"model.{name} = {value!r}: give a value of type {wanted}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"model.{name} = {value!r}: give a finite number")
    if (epsilon := values.get("batch_norm_epsilon", 1.0)) <= 0:
        raise UserError(f"model.batch_norm_epsilon = {epsilon!r}: must be above 0")
    known = {field.name for field in dataclasses.fields(FAMILIES[family])}
    of_run = {"num_classes": num_classes, "dtype": dtype, "batch_norm_axis": batch_norm_axis}
    values |= {name: value for name, value in of_run.items() if name in known}
    network = FAMILIES[family](**values)
    if hasattr(network, "check"):  # a user's own family need not have it
        network.check()
    return network


def reference(model: nn.Module) -> nn.Module:
    """The same network in the form of its paper, whose multiply-adds are counted.

    Another implementation of it may need fewer.
    """
    return model.clone(block="concat", recompute="none") if isinstance(model, DenseNet) else model


def feature_info(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> dict[str, tuple[int, int | None]]:
    """(channels, reduction) of each feature of a network, by name; only shapes are computed.

    The reduction is the height of the image divided by that of the feature, as a power of two. It
    is None for features without a height ("pooled"). `image_shape` is (height, width, channels).
    """
    info = {}

    def forward(image):
        (_, features), _ = model.init_with_output(jax.random.key(0), image)
        for name, feature in features.items():  # here, since JAX returns dicts with sorted keys
            ratio = image_shape[0] / feature.shape[1] if feature.ndim == 4 else None
            info[name] = feature.shape[-1], ratio and 2 ** round(math.log2(ratio))

    jax.eval_shape(forward, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return info


def depth(model: nn.Module) -> int:
    """The number of layers with weights, as papers count it: without projections in shortcuts."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)["params"]
    paths = flatten_dict(params)
    return sum(path[-1] == "kernel" and "projection" not in path for path in paths)


def _type_name(hint: Any) -> str:
    """An annotation as it is written: the own name of `tuple[int, ...]` would be `tuple`."""
    return hint.__name__ if type(hint) is type else str(hint)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type: a class, a union, or tuple[class, ...]."""
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_is_a(part, item) for part in value)
    return type(value) in ((float, int) if hint is float else (hint,))

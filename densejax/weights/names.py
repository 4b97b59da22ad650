"""How other projects name a network's variables: the layouts of each family."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

Rules = Mapping[str, Callable[..., str] | str]

TORCH_VARIABLES = {
    **{"kernel": "weight", "scale": "weight", "bias": "bias"},
    **{"mean": "running_mean", "var": "running_var", "layer_scale": "gamma"},
}
KERAS_VARIABLES = {"kernel": "kernel", "bias": "bias"}
KERAS_NORM_VARIABLES = {
    **{"scale": "gamma", "bias": "beta"},
    **{"mean": "moving_mean", "var": "moving_variance"},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names and axes of one project's weights.

    Attributes:
      project: who uses these names.
      rules: the project's name of each layer: a pattern that matches our path without collection
        and variable, and a name or a function of the pattern's groups (numbers as integers).
      is_torch: kernels are [out, in, height, width] and [out, in], not as here.
      aliases: patterns of other names that files have, and what replaces them.
      fields: the fields of the project's networks that no name or shape shows.
      marker: a pattern that matches a name in this project's weights alone; "" where there is none.
      others: projects that use the same names.
    """

    project: str
    rules: Rules
    is_torch: bool = True
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    marker: str = ""
    others: tuple[str, ...] = ()

    def name(self, path: str) -> str | None:
        """The project's name of a path such as "params/block1/layer3/conv2/kernel", or None."""
        layer, _, variable = path.partition("/")[2].rpartition("/")
        if self.is_torch:
            variables, separator = TORCH_VARIABLES, "."
        else:
            is_norm = "norm" in layer.rpartition("/")[2]
            variables, separator = KERAS_NORM_VARIABLES if is_norm else KERAS_VARIABLES, "/"
        for pattern, theirs in self.rules.items():
            if match := re.fullmatch(pattern, layer):
                groups = [int(part) if part.isdigit() else part for part in match.groups("")]
                theirs = theirs(*groups) if callable(theirs) else theirs
                return f"{theirs}{separator}{variables[variable]}"
        return None

    def without_alias(self, name: str) -> str | None:
        """A name of a file as `name` writes it; None for counters and random seeds."""
        if re.search(r"(^|[.:/])(num_batches_tracked|n_averaged|seed_generator.*)$", name):
            return None
        for pattern, replacement in self.aliases.items():
            name = re.sub(pattern, replacement, name)
        return name


_CLASSIFIER = "head/classifier"
_LAYER = r"block(\d+)/layer(\d+)/(norm|conv)(\d)"
_TRANSITION = r"transition(\d+)/(norm|conv)"
_STEM = r"stem/(norm|conv)"
_RESIDUAL = r"stage(\d+)_block(\d+)/(norm|conv)(\d)"
_PROJECTION = r"stage(\d+)_block(\d+)/projection(_norm)?"
_VOVNET_STEM = r"stem(\d)/(norm|conv)"
_VOVNET_LAYER = r"stage(\d+)_module(\d+)/layer(\d+)/(norm|conv)"
_AGGREGATION = r"stage(\d+)_module(\d+)/aggregation/(norm|conv)"
_SEPARABLE = "norm|conv|depthwise|pointwise"

_RDNET_LAYER = r"stage(\d+)_layer(\d+)"

_KERAS_ALIASES = {r":0$": ""}  # TensorFlow's output number
_KIND = {"norm": "bn", "conv": "conv", "depthwise": "conv_dw", "pointwise": "conv_pw"}


def _author_vovnet(stage: int, module: int, layer: int | str, kind: str) -> str:
    place = f"OSA{stage + 1}_{module}"
    inner = "concat" if layer == "concat" else f"layers.{layer}"
    return f"stage{stage + 1}.{place}.{inner}.{place}_{layer}/{kind}"


_RESNET = {
    _STEM: lambda kind: f"{_KIND[kind]}1",
    "stem_norm": "bn1",
    _RESIDUAL: lambda s, b, kind, i: f"layer{s}.{b - 1}.{_KIND[kind]}{i}",
    _PROJECTION: lambda s, b, norm: f"layer{s}.{b - 1}.downsample.{int(bool(norm))}",
}
_TIMM_VOVNET = {
    _VOVNET_STEM.replace("norm|conv", _SEPARABLE): lambda n, kind: f"stem.{n - 1}.{_KIND[kind]}",
    _VOVNET_LAYER.replace("norm|conv", _SEPARABLE): lambda s, m, n, kind: (
        f"stages.{s - 1}.blocks.{m - 1}.conv_mid.{n - 1}.{_KIND[kind]}"
    ),
    r"stage(\d+)_module(\d+)/reduction/(norm|conv)": lambda s, m, kind: (
        f"stages.{s - 1}.blocks.{m - 1}.conv_reduction.{_KIND[kind]}"
    ),
    _AGGREGATION: lambda s, m, kind: f"stages.{s - 1}.blocks.{m - 1}.conv_concat.{_KIND[kind]}",
    r"stage(\d+)_module(\d+)/squeeze_excite/conv": lambda s, m: (
        f"stages.{s - 1}.blocks.{m - 1}.attn.fc"
    ),
    _CLASSIFIER: "head.fc",
}


def _rdnet_layer(stage: int, layer: int, part: str = "") -> str:
    """Layers of a stage come after its transition, which the first stage does not have."""
    place = f"dense_stages.{stage - 1}.{0 if stage == 1 else 2}.dense_block{layer - 1}"
    numbers = {"depthwise": "0", "norm": "1", "expand": "2", "reduce": "4", "squeeze": "5.fc"}
    return f"{place}.layers.layers.{numbers[part]}" if part else place


_RDNET = {
    _STEM: lambda kind: f"stem.{int(kind == 'norm')}",
    _TRANSITION: lambda t, kind: f"dense_stages.{t}.{int(kind == 'conv')}",
    _RDNET_LAYER: _rdnet_layer,
    _RDNET_LAYER + "/(depthwise|norm|expand|reduce)": _rdnet_layer,
    _RDNET_LAYER + "/(squeeze)_excite/conv": _rdnet_layer,
    "head/norm": "head.norm",
    _CLASSIFIER: "head.fc",
}


def _hardnet(downsampling: tuple[int, ...], blocks: int, dropout: int = 0) -> Layout:
    """The authors' names, which are numbers in the order of computation.

    Args:
      downsampling: the field of the network.
      blocks: how many it has.
      dropout: 1 where the authors have a dropout layer before the last 1x1, which has a number.
    """
    number, starts = 3, []  # after the two layers of the stem and its downsampling
    for block in range(1, blocks + 1):
        starts.append(number)
        number += 3 if block in downsampling else 2
    last = starts[-1] + 1 + dropout
    joins = [*(start + 1 for start in starts[:-1]), last]
    parts = {"": "", "pointwise": ".layer1", "depthwise": ".layer2"}

    def layer(block, index, part, kind):
        kind = "dwconv" if (part, kind) == ("depthwise", "conv") else kind
        return f"base.{starts[block - 1]}.layers.{index - 1}{parts[part]}.{kind}"

    return Layout(
        "authors",
        {
            _VOVNET_STEM: lambda n, kind: f"base.{n - 1}.{kind}",
            r"downsampling(\d+)/(norm|conv)": lambda n, kind: (
                f"base.{joins[n - 1] + 1 if n else 2}.{'dwconv' if kind == 'conv' else kind}"
            ),
            r"block(\d+)/layer(\d+)_?(|pointwise|depthwise)/(norm|conv)": layer,
            _TRANSITION: lambda b, kind: f"base.{joins[b - 1]}.{kind}",
            _CLASSIFIER: f"base.{last + 1}.3",
        },
        fields={"downsampling": downsampling},
        marker=rf"(^|[.:])base\.{last}\.conv\.weight$",
    )


# The layouts of each family; `to_torch` writes the first one unless another is asked for.
LAYOUTS: dict[str, list[Layout]] = {
    "densenet": [
        Layout(
            "torchvision",  # other files have norm.1 for norm1, norm_final for norm5
            {
                _STEM: lambda kind: f"features.{kind}0",
                _LAYER: lambda b, n, kind, i: f"features.denseblock{b}.denselayer{n}.{kind}{i}",
                _TRANSITION: lambda t, kind: f"features.transition{t}.{kind}",
                "norm": "features.norm5",
                _CLASSIFIER: "classifier",
            },
            aliases={r"\.(norm|conv)\.(\d)\.": r".\1\2.", r"\.norm_final\.": ".norm5."},
            others=("timm",),
        ),
        Layout(
            "keras",
            {
                _STEM: lambda kind: f"conv1_{_KIND[kind]}",
                # A layer's norms are counted from 0, its convolutions from 1.
                _LAYER: lambda b, n, kind, i: (
                    f"conv{b + 1}_block{n}_{i - (kind == 'norm')}_{_KIND[kind]}"
                ),
                _TRANSITION: lambda t, kind: f"pool{t + 1}_{_KIND[kind]}",
                "norm": "bn",
                _CLASSIFIER: "predictions",
            },
            is_torch=False,
            aliases=_KERAS_ALIASES,
            fields={"batch_norm_epsilon": 1.001e-5},
        ),
    ],
    "resnet": [
        Layout("torchvision", _RESNET | {_CLASSIFIER: "fc"}, others=("timm",)),
        Layout(
            "keras",
            {
                _STEM: lambda kind: f"conv1_{_KIND[kind]}",
                _RESIDUAL: lambda s, b, kind, i: f"conv{s + 1}_block{b}_{i}_{_KIND[kind]}",
                _PROJECTION: lambda s, b, norm: (
                    f"conv{s + 1}_block{b}_0_{'bn' if norm else 'conv'}"
                ),
                _CLASSIFIER: "predictions",
            },
            is_torch=False,
            aliases=_KERAS_ALIASES,
            fields={"batch_norm_epsilon": 1.001e-5, "convolution_bias": True, "stride_on": "1x1"},
        ),
        Layout(
            "pytorch-cifar",
            _RESNET
            | {
                _PROJECTION: lambda s, b, norm: f"layer{s}.{b - 1}.shortcut.{int(bool(norm))}",
                _CLASSIFIER: "linear",
            },
            fields={"shortcut": "projection"},
            marker=r"\.shortcut\.0\.weight$",
        ),
        Layout(
            "pytorch_resnet_cifar10",
            _RESNET | {_CLASSIFIER: "linear"},
            fields={"shortcut": "identity_middle"},
            marker=r"(^|[.:])linear\.weight$",
        ),
    ],
    "vovnet": [
        Layout(
            "authors",
            {
                _VOVNET_STEM: lambda n, kind: f"stem.stem_{n}/{kind}",
                _VOVNET_LAYER: lambda s, m, n, kind: _author_vovnet(s, m, n - 1, kind),
                _AGGREGATION: lambda s, m, kind: _author_vovnet(s, m, "concat", kind),
                _CLASSIFIER: "classifier",
            },
            fields={"identity": True},
        ),
        Layout("timm", _TIMM_VOVNET, fields={"identity": False}),
        Layout(
            "timm",
            _TIMM_VOVNET,
            fields={"identity": True, "squeeze_excite": True},
            marker=r"\.attn\.fc\.weight$",
        ),
    ],
    "rdnet": [
        Layout("timm", _RDNET, fields={"head_norm_epsilon": 1e-6}),
        Layout(
            "authors",
            _RDNET | {_STEM: lambda kind: f"stem.stem.{int(kind == 'norm')}"},
            fields={"head_norm_epsilon": 1e-5},
            marker=r"(^|[.:])stem\.stem\.0\.weight$",
        ),
    ],
    # HarDNet-39DS, 68 (and 68DS) and 85.
    "hardnet": [_hardnet((1, 2, 3), 4), _hardnet((1, 3, 4), 5), _hardnet((1, 3, 5), 6, dropout=1)],
}
# What projects call networks of `densejax.models.MODELS`; with `Layout.fields` they are the same.
PEERS: dict[str, dict[str, str]] = {
    "torchvision": {
        **{name: name for name in ("densenet121", "densenet161", "densenet169", "densenet201")},
        **{name: name for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
    },
}
PEERS["timm"] = PEERS["torchvision"] | {
    **{"vovnet39": "vovnet39a", "vovnet57": "vovnet57a"},
    **{name: name for name in ("ese_vovnet19b_dw", "ese_vovnet39b", "ese_vovnet57b")},
    **{name: name for name in ("rdnet_tiny", "rdnet_small", "rdnet_base", "rdnet_large")},
}

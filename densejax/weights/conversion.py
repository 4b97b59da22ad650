"""Weights of torchvision, timm and Keras Applications <-> variables, with nothing left over."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from densejax import models
from densejax.config import UserError
from densejax.models.layers import fan_in_uniform
from densejax.weights.names import LAYOUTS, Layout

Weights = Mapping[str, np.ndarray]
STEMS = ("params/stem/conv/kernel", "params/stem1/conv/kernel")
CLASSIFIER = ("params/head/classifier/kernel", "params/head/classifier/bias")


def from_torch(model: nn.Module, state_dict: Weights, **adapt: Any) -> dict[str, Any]:
    """Variables from a state_dict by torchvision's, timm's or the VoVNet authors' names.

    DenseNet's other spellings are known ("norm.1", "norm_final"), and what is before every name
    ("module.") is left out, as is num_batches_tracked: nothing here reads it.

    Args:
      model: a network of densejax.models; its fields decide what has to be there.
      state_dict: arrays by name; each is used, or the whole is refused.
      **adapt: see `convert`.

    Raises:
      UserError: the names that are missing, unexpected or of another shape, in one line.
    """
    layouts = [layout for layout in LAYOUTS[_family(model)] if layout.is_torch]
    layout, found, _ = recognise(layouts, state_dict)
    return convert(model, found, layout, **adapt)


def from_keras(model: nn.Module, weights: Any, **adapt: Any) -> dict[str, Any]:
    """Variables from Keras Applications' weights; otherwise as `from_torch`.

    Args:
      model: a DenseNet or ResNet with the fields of Keras' layout in `weight_names.LAYOUTS`.
      weights: arrays by "layer/variable", such as "conv1_conv/kernel", or a Keras model.
      **adapt: see `convert`.
    """
    if not isinstance(weights, Mapping):
        weights = {
            f"{layer.name}/{variable.name}": np.asarray(variable)
            for layer in weights.layers
            for variable in layer.weights
        }
    layouts = [layout for layout in LAYOUTS[_family(model)] if not layout.is_torch]
    layout, found, _ = recognise(layouts, weights)
    return convert(model, found, layout, **adapt)


def to_torch(
    model: nn.Module, variables: Mapping[str, Any], project: str = ""
) -> dict[str, np.ndarray]:
    """The state_dict of a network, without num_batches_tracked: PyTorch then keeps its zeros.

    Args:
      model: the network.
      variables: its params and batch_stats.
      project: whose names, of `weight_names.LAYOUTS`; "": the first of the family.
    """
    layouts = [layout for layout in LAYOUTS[_family(model)] if layout.is_torch]
    layouts = [layout for layout in layouts if project in ("", layout.project)]
    if not layouts:
        raise UserError(f"project = {project!r}: has no names for a {_family(model)}")
    flat = {path: np.asarray(array) for path, array in flatten(variables).items()}
    paths = _paths(model, layouts[0], flat)
    return {name: _turned(flat[path], (3, 2, 0, 1)) for name, path in paths.items()}


def recognise(
    layouts: Sequence[Layout], weights: Weights
) -> tuple[Layout, dict[str, np.ndarray], list[str]]:
    """Whose weights they are, told by the name of their first kernel and by what is before it.

    Returns:
      The layout, the network's arrays by the layout's names, and what had to be assumed.
    """
    for layout in sorted(layouts, key=lambda layout: not layout.sign):
        spelled = {name: short for name in weights if (short := layout.spelled(name)) is not None}
        ends = tuple(filter(None, map(layout.name, STEMS)))
        starts = {s.removesuffix(end) for s in spelled.values() for end in ends if s.endswith(end)}
        starts = {start for start in starts if not start or start[-1] in "./:"}
        # A kernel of the same name within the network starts no other.
        starts = {
            s for s in starts if not any(s != other and s.startswith(other) for other in starts)
        }
        if not starts or not any(re.search(layout.sign, short) for short in spelled.values()):
            continue
        averages = [start for start in starts if "ema" in start]
        if len(starts) > 1 and len(averages) != 1:
            raise UserError(f"the weights are of several networks: {', '.join(sorted(starts))}")
        start = averages[0] if averages else min(starts)
        part, others, found = start.rpartition("::")[0], tuple(starts - {start}), {}
        for name, short in spelled.items():
            if short.rpartition("::")[0] == part and not short.startswith(others):
                short = short.removeprefix(start).rpartition("::")[2]
                if short in found:
                    raise UserError(f"{name}: the weights have this twice, under two spellings")
                found[short] = np.asarray(weights[name])
        assumed = [f"{start} is taken, not {other}" for other in others]
        return layout, found, assumed + _rename_classifier(layout, found)
    first = dict.fromkeys(layout.name(stem) for layout in layouts for stem in STEMS)
    raise UserError(
        f"the weights have none of {', '.join(filter(None, first)) or 'the known names'}: they "
        f"are of another family, or of a project whose names are not known"
    )


def _rename_classifier(layout: Layout, found: dict[str, np.ndarray]) -> list[str]:
    """Gives a classifier of another name its own: it alone has a matrix."""
    matrices = [name for name, array in found.items() if array.ndim == 2]
    if layout.name(CLASSIFIER[0]) in found or len(matrices) != 1:
        return []
    stem = re.sub("(weight|kernel)$", "", matrices[0])
    for name in map(layout.name, CLASSIFIER):
        theirs = stem + re.split("[./]", name)[-1]
        if theirs in found:
            found[name] = found.pop(theirs)
    return [f"{matrices[0]} is taken for {layout.name(CLASSIFIER[0])}"]


def convert(
    model: nn.Module,
    weights: Weights,
    layout: Layout,
    *,
    image_channels: int | None = None,
    adapt: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Variables of a network, float32 NumPy arrays, from weights in another project's layout.

    Args:
      model: the network.
      weights: arrays by the layout's names.
      layout: their names and axes.
      image_channels: of the images; None: as many as the weights are for.
      adapt: draw a new classifier where theirs has another length or is missing, drop it where the
        network has none, and fit the first kernel to other images: to one channel by the sum over
        theirs, from one channel by an even share for each, so that grey images give the same.
      seed: of the new classifier.

    Raises:
      UserError: the names that are missing, unexpected or of another shape, in one line.
    """
    first = next(weights[layout.name(path)] for path in STEMS if layout.name(path) in weights)
    channels = first.shape[1 if layout.is_torch else 2] if first.ndim == 4 else 3
    expected = abstract(model, image_channels or channels)
    paths = _paths(model, layout, expected)
    found = {paths.get(name, name): array for name, array in weights.items()}
    if layout.is_torch:
        found = {
            path: _turned(array, (2, 3, 1, 0)) if path in expected else array
            for path, array in found.items()
        }
    if adapt:
        _adapt(found, expected, layout, seed)
    names = {path: name for name, path in paths.items()}
    check_fit(found, expected, f"the weights, by {layout.project} names,", names)
    return unflatten({path: array.astype(np.float32) for path, array in found.items()})


def _adapt(found: dict, expected: Mapping, layout: Layout, seed: int) -> None:
    for path in CLASSIFIER:
        if path not in expected:
            found.pop(layout.name(path), None)
    if CLASSIFIER[0] in expected and any(
        path not in found or found[path].shape != expected[path].shape for path in CLASSIFIER
    ):
        shape = expected[CLASSIFIER[0]].shape
        found[CLASSIFIER[0]] = np.asarray(fan_in_uniform(jax.random.key(seed), shape))
        found[CLASSIFIER[1]] = np.zeros(shape[-1:], np.float32)
    for path in STEMS:
        if path in found and found[path].ndim == 4:
            has, wants = found[path].shape[2], expected[path].shape[2]
            if wants == 1 < has:
                found[path] = found[path].sum(2, keepdims=True)
            elif has == 1 < wants:
                found[path] = found[path].repeat(wants, 2) / np.float32(wants)


def check_fit(
    found: Weights, expected: Mapping[str, Any], what: str, names: Mapping[str, str] | None = None
) -> None:
    """Raises UserError unless both have the same paths and shapes, and finite numbers.

    Args:
      found: arrays by path.
      expected: arrays or shapes by path.
      what: `found`, in the message.
      names: what paths are called in the message.
    """
    both = sorted(found.keys() & expected.keys())
    shapes = {path: (found[path].shape, expected[path].shape) for path in both}
    wrong = [path for path in both if shapes[path][0] != shapes[path][1]]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape (height, width, in, out)": wrong,
        "not of finite numbers": [path for path in both if not _is_finite(found[path])],
        "of negative variance": [
            path for path in both if path.endswith("/var") and (found[path] < 0).any()
        ],
    }
    said = []
    for problem, paths in problems.items():
        items = [(names or {}).get(path, path) for path in paths[:5]]
        if paths is wrong:
            pairs = zip(items, paths, strict=False)
            items = ["{} {}, not {}".format(item, *shapes[path]) for item, path in pairs]
        rest = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        said += [f"{problem}: {', '.join(items)}{rest}"] if paths else []
    if said:
        adaptable = {path for paths in problems.values() for path in paths} <= {*STEMS, *CLASSIFIER}
        hint = "; `adapt` fits the classifier and the image channels" if adaptable else ""
        raise UserError(f"{what} do not fit the network: {'; '.join(said)}{hint}")


def abstract(model: nn.Module, image_channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a network's variables by path; computes nothing."""
    image = jax.ShapeDtypeStruct((1, 256, 256, image_channels), jnp.float32)
    return flatten(jax.eval_shape(model.init, jax.random.key(0), image))


def stem(flat: Mapping[str, Any]) -> Any:
    """A network's first kernel, of its variables by path."""
    return next(flat[path] for path in STEMS if path in flat)


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path: "params/block1/layer3/conv2/kernel", "batch_stats/..."."""
    return traverse_util.flatten_dict(dict(variables), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def _family(model: nn.Module) -> str:
    return next(name for name, family in models.FAMILIES.items() if isinstance(model, family))


def _paths(model: nn.Module, layout: Layout, flat: Mapping[str, Any]) -> dict[str, str]:
    """Our paths by their names."""
    for field, value in layout.fields.items():
        if (mine := getattr(model, field)) != value:
            raise UserError(
                f"model.{field} = {mine!r}: a network of {layout.project} has {value!r}; set it: "
                f"the weights do not show it"
            )
    paths = {layout.name(path): path for path in flat}
    if None in paths:
        raise UserError(f"{paths[None]}: {layout.project} has no name for it, nor such a network")
    return paths


def _turned(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(axes))
    return np.ascontiguousarray(array.T)


def _is_finite(array: np.ndarray) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return False
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        return bool(np.isfinite(array.astype(np.float32)).all())

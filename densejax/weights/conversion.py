"""Converts weights of torchvision, timm and Keras Applications to variables, and back.

Every array must be used and every variable filled; otherwise the weights are refused.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
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
# Variables by path: "params/block1/layer3/conv2/kernel", "batch_stats/..."; and back.
flatten = functools.partial(traverse_util.flatten_dict, sep="/")
unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")
STEMS = ("params/stem/conv/kernel", "params/stem1/conv/kernel")
CLASSIFIER = ("params/head/classifier/kernel", "params/head/classifier/bias")


def from_torch(model: nn.Module, state_dict: Weights, **adapt: Any) -> dict[str, Any]:
    """Converts a state_dict with the names of torchvision, timm or a network's authors.

    A prefix of all names ("module.") and the counters num_batches_tracked are left out.

    Args:
      model: a network of densejax.models; its fields decide which arrays there must be.
      state_dict: arrays by name.
      **adapt: see `convert`.

    Returns:
      The variables, float32 NumPy arrays.

    Raises:
      UserError: the names that are missing, unexpected or of another shape, in one line.
    """
    layout, found, _ = recognise(_layouts(model, is_torch=True), state_dict)
    return convert(model, found, layout, **adapt)


def from_keras(model: nn.Module, weights: Any, **adapt: Any) -> dict[str, Any]:
    """Converts weights of Keras Applications; otherwise as `from_torch`.

    Args:
      model: a DenseNet or ResNet with the fields of Keras' layout in `names.LAYOUTS`.
      weights: arrays by "layer/variable", such as "conv1_conv/kernel", or a Keras model.
      **adapt: see `convert`.
    """
    if not isinstance(weights, Mapping):
        weights = {variable.path: np.asarray(variable) for variable in weights.weights}
    layout, found, _ = recognise(_layouts(model, is_torch=False), weights)
    return convert(model, found, layout, **adapt)


def to_torch(
    model: nn.Module, variables: Mapping[str, Any], project: str = ""
) -> dict[str, np.ndarray]:
    """The state_dict of a network, without the counters num_batches_tracked.

    Args:
      model: the network.
      variables: its variables, or a collection of them.
      project: whose names to write, of `names.LAYOUTS`; "": the first that has such networks.
    """
    flat = {path: np.asarray(array) for path, array in flatten(variables).items()}
    paths = _paths_by_name(model, layout_of(model, project), flat)
    return {name: _transpose(flat[path], (3, 2, 0, 1)) for name, path in paths.items()}


def layout_of(model: nn.Module, project: str = "") -> Layout:
    """How a PyTorch project, "": the first, names such a network; UserError where it does not."""
    known = _layouts(model, is_torch=True)
    layouts = [x for x in known if project in ("", x.project, *x.others)]
    if not layouts:
        allowed = dict.fromkeys(name for x in known for name in (x.project, *x.others))
        raise UserError(
            f"project = {project!r}: has no names for a {type(model).__name__}; "
            f"known are {', '.join(allowed) or 'none'}"
        )
    fitting = [x for x in layouts if all(getattr(model, f) == v for f, v in x.fields.items())]
    return (fitting or layouts)[0]


def recognise(
    layouts: Sequence[Layout], weights: Weights
) -> tuple[Layout, dict[str, np.ndarray], list[str]]:
    """Finds the project that the names are from, and one network among the weights.

    Returns:
      The layout, the network's arrays by the layout's names, and what had to be assumed.

    Raises:
      UserError: no layout has such names, or the weights are of several networks.
    """
    # A layout with a marker comes first: those without one may have the same names otherwise.
    for layout in sorted(layouts, key=lambda layout: not layout.marker):
        names = {name: layout.without_alias(name) for name in weights}
        names = {name: known for name, known in names.items() if known is not None}
        prefixes = _prefixes(layout, names.values())
        if prefixes and any(re.search(layout.marker, name) for name in names.values()):
            found, assumed = _one_network(weights, names, prefixes)
            return layout, found, assumed + _rename_classifier(layout, found)
    kernels = dict.fromkeys(layout.name(stem) for layout in layouts for stem in STEMS)
    raise UserError(
        f"the weights have none of {', '.join(filter(None, kernels)) or 'the known names'}: they "
        f"are of another family, or of a project whose names are not known"
    )


def _prefixes(layout: Layout, names: Iterable[str]) -> set[str]:
    """What stands before the first kernel's name, such as "module.", for each network."""
    kernels = tuple(filter(None, map(layout.name, STEMS)))
    before = {n.removesuffix(end) for n in names for end in kernels if n.endswith(end)}
    before = {prefix for prefix in before if not prefix or prefix[-1] in "./:"}
    # A kernel of the same name deeper in a network is not the first one of another network.
    return {p for p in before if not any(p != other and p.startswith(other) for other in before)}


def _one_network(
    weights: Weights, names: Mapping[str, str], prefixes: set[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of the only network, or of the moving average of one, without its prefix."""
    averages = [prefix for prefix in prefixes if "ema" in prefix]
    if len(prefixes) > 1 and len(averages) != 1:
        raise UserError(f"the weights are of several networks: {', '.join(sorted(prefixes))}")
    taken = averages[0] if averages else min(prefixes)
    part, others, found = taken.rpartition("::")[0], tuple(prefixes - {taken}), {}
    for name, known in names.items():
        # What is in the same part of the file and outside of the prefix may be the classifier.
        if known.rpartition("::")[0] == part and not known.startswith(others):
            known = known.removeprefix(taken).rpartition("::")[2]
            if known in found:
                raise UserError(f"{name}: the weights have this array twice, under two names")
            found[known] = np.asarray(weights[name])
    return found, [f"{taken} is taken, not {other}" for other in others]


def _rename_classifier(layout: Layout, found: dict[str, np.ndarray]) -> list[str]:
    """Gives a classifier of another name the layout's name: only a classifier has a matrix."""
    matrices = [name for name, array in found.items() if array.ndim == 2]
    if layout.name(CLASSIFIER[0]) in found or len(matrices) != 1:
        return []
    module = re.sub("(weight|kernel)$", "", matrices[0])
    for name in map(layout.name, CLASSIFIER):
        theirs = module + re.split("[./]", name)[-1]
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
    """Converts weights in another project's layout to variables, float32 NumPy arrays.

    Args:
      model: the network.
      weights: arrays by the layout's names.
      layout: their names and axes.
      image_channels: of the images; None: as many as the weights are for.
      adapt: fit the weights to the network. A classifier that is missing or of another length is
        drawn; one that the network does not have is dropped. The first kernel is summed over its
        channels for grey images; a kernel for grey images is divided equally among the channels.
        Grey images then give the same result.
      seed: of a new classifier.

    Raises:
      UserError: the names that are missing, unexpected or of another shape, in one line.
    """
    first = next(weights[layout.name(path)] for path in STEMS if layout.name(path) in weights)
    channels = first.shape[1 if layout.is_torch else 2] if first.ndim == 4 else 3
    expected = abstract(model, image_channels or channels)
    paths = _paths_by_name(model, layout, expected)
    found = {paths.get(name, name): array for name, array in weights.items()}
    if layout.is_torch:
        found = {
            path: _transpose(array, (2, 3, 1, 0)) if path in expected else array
            for path, array in found.items()
        }
    if adapt:
        _adapt_classifier(found, expected, layout, seed)
        _adapt_channels(found, expected)
    names = {path: name for name, path in paths.items()}
    what = f"the weights, by {layout.project} names,"
    check_fit(found, expected, what, names, remedy="" if adapt else "`adapt`")
    return unflatten({path: array.astype(np.float32) for path, array in found.items()})


def _adapt_classifier(found: dict, expected: Mapping, layout: Layout, seed: int) -> None:
    kernel, bias = CLASSIFIER
    if kernel not in expected:
        for path in CLASSIFIER:
            found.pop(layout.name(path), None)
    elif any(p not in found or found[p].shape != expected[p].shape for p in CLASSIFIER):
        shape = expected[kernel].shape
        found[kernel] = np.asarray(fan_in_uniform(jax.random.key(seed), shape))
        found[bias] = np.zeros(shape[-1:], np.float32)


def _adapt_channels(found: dict, expected: Mapping) -> None:
    for path in STEMS:
        if path in found and path in expected and found[path].ndim == 4:
            has, wants = found[path].shape[2], expected[path].shape[2]
            if wants == 1 < has:
                found[path] = found[path].sum(2, keepdims=True)
            elif has == 1 < wants:
                found[path] = found[path].repeat(wants, 2) / np.float32(wants)


def fit(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Takes the classifier from both, and fits the image channels of the first.

    Args:
      found: arrays by path.
      expected: arrays or shapes by path.
    """
    for arrays in (found, expected):
        for path in CLASSIFIER:
            arrays.pop(path, None)
    _adapt_channels(found, expected)


def check_fit(
    found: Weights,
    expected: Mapping[str, Any],
    what: str,
    names: Mapping[str, str] | None = None,
    remedy: str = "",
) -> None:
    """Raises UserError unless both have the same paths and shapes, and the numbers are finite.

    Args:
      found: arrays by path.
      expected: arrays or shapes by path.
      what: what the message calls `found`.
      names: what the message calls the paths.
      remedy: what would fit the classifier and the image channels; "": nothing, or what is in use.
    """
    both = sorted(found.keys() & expected.keys())
    shapes = {
        path: f" {found[path].shape}, not {expected[path].shape}"
        for path in both
        if found[path].shape != expected[path].shape
    }
    fitting = [path for path in both if path not in shapes]
    variances = [path for path in fitting if path.endswith("/var")]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape (height, width, in, out)": list(shapes),
        "not of finite numbers": [path for path in fitting if not _is_finite(found[path])],
        "of negative variance": [path for path in variances if (found[path] < 0).any()],
    }
    lists = []
    for problem, paths in problems.items():
        shown = [(names or {}).get(path, path) + shapes.get(path, "") for path in paths[:5]]
        rest = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        lists += [f"{problem}: {', '.join(shown)}{rest}"] if paths else []
    if lists:
        wrong, hint = {path for paths in problems.values() for path in paths}, ""
        if remedy and wrong <= {*STEMS, *CLASSIFIER}:
            hint = f"; {remedy} fits the classifier and the image channels"
        raise UserError(f"{what} do not fit the network: {'; '.join(lists)}{hint}")


def abstract(model: nn.Module, image_channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a network's variables by path; computes nothing."""
    image = jax.ShapeDtypeStruct((1, 256, 256, image_channels), jnp.float32)
    return flatten(jax.eval_shape(model.init, jax.random.key(0), image))


def first_kernel(flat: Mapping[str, Any]) -> Any:
    """The kernel that reads the images, among a network's variables by path."""
    return next(flat[path] for path in STEMS if path in flat)


def _family(model: nn.Module) -> str:
    return next(name for name, family in models.FAMILIES.items() if isinstance(model, family))


def _layouts(model: nn.Module, is_torch: bool) -> list[Layout]:
    return [x for x in LAYOUTS.get(_family(model), ()) if x.is_torch == is_torch]


def _paths_by_name(model: nn.Module, layout: Layout, flat: Mapping[str, Any]) -> dict[str, str]:
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


def _transpose(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Moves the axes of a convolution's kernel to `axes`, and transposes a matrix."""
    return np.ascontiguousarray(array.transpose(axes) if array.ndim == 4 else array.T)


def _is_finite(array: np.ndarray) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return False
    with np.errstate(over="ignore"):  # a number that is too large for float32 becomes infinite
        return bool(np.isfinite(array.astype(np.float32)).all())

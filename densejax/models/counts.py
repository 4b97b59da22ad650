"""Exact counts of a network's parameters and computation, from its trace: no array is made."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from densejax import models
from densejax.models.connections import Graph
from densejax.models.convolution import tracing_for

# Trace for one platform: a trace for all has a branch for each, and all of them would be counted.
PLATFORM = "default"


def parameters(variables: Any) -> int:
    """Number of trainable values: the collection "params", without BatchNorm's statistics."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds of the convolutions and matrix products in a function's trace.

    Arguments are pytrees of arrays or jax.ShapeDtypeStruct. A `scan` counts each of its iterations,
    and all branches of a `cond` are added up.
    """
    with tracing_for(PLATFORM):
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return _by_scope(jaxpr, _multiply_adds).total()


def memory_access_cost(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Values that a network's convolutions read and write for one image, weights included.

    This is the MAC of Lee et al., arXiv:1904.09730, section 2.2: the sum of h w (c_in + c_out) +
    k^2 c_in c_out. At stride 2, inputs and outputs each count with their own size. The classifier
    is left out.
    """
    return _by_scope(_trace(model.clone(num_classes=0), image_shape)[1], _values).total()


def convolution_inputs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Values, other than weights, that convolutions and products of a network read for one image.

    A feature map counts once for every layer that reads it.
    """
    jaxpr = _trace(model, image_shape)[1]
    return _by_scope(jaxpr, lambda equation: equation.invars[0].aval.size).total()


@dataclasses.dataclass(frozen=True)
class Connections:
    """How much the layers of a network are connected.

    A path leads from the network's input to its output along connections. Its length is the number
    of layers in blocks that it passes. Stems, transitions and classifiers are not counted.

    Attributes:
      edges: outputs that layers and the ends of blocks read; an output counts once for each reader.
      longest_path: the most layers on a path.
      mean_path: the mean number of layers, over all paths.
    """

    edges: int
    longest_path: int
    mean_path: float


def connections(graphs: Iterable[Graph]) -> Connections:
    """Counts the connections and paths of blocks that follow each other."""
    edges, lengths = 0, [1]  # lengths[n]: paths of n layers
    for graph in graphs:
        edges += len(graph.emits) + sum(map(len, graph.reads))
        paths = [np.array([1], object)]  # of each output; whole numbers of any size
        for read in graph.reads:
            paths.append(np.concatenate([[0], _sum([paths[output] for output in read])]))
        lengths = np.convolve(lengths, _sum([paths[output] for output in graph.emits]))
    mean = sum(n * number for n, number in enumerate(lengths)) / sum(lengths)
    longest = max(n for n, number in enumerate(lengths) if number)
    return Connections(edges, longest, float(mean))


def _sum(arrays):
    """The sum of arrays of different lengths that start at the same place."""
    longest = max(map(len, arrays))
    zeros = np.zeros(longest, object)  # Python's own 0: a NumPy integer would overflow
    return sum(np.append(array, zeros[len(array) :]) for array in arrays)


def _trace(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """(shapes of the variables, jaxpr of the forward pass on one image), in the paper's form."""
    model, image = models.reference(model), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # One trace for both: drawing the variables takes no convolution and no product.
    trace = jax.make_jaxpr(model.init_with_output, return_shape=True)
    with tracing_for(PLATFORM):
        jaxpr, (_, variables) = trace(jax.random.key(0), image)
    return variables, jaxpr.jaxpr


def _by_scope(
    jaxpr, cost: Callable[[Any], int], outer: str = "", times: int = 1
) -> collections.Counter[str]:
    """The cost of all convolutions and matrix products under each `jax.named_scope`.

    Flax gives every layer a scope, such as "DenseNet/block1/layer1/conv1".
    """
    total = collections.Counter()
    for equation in jaxpr.eqns:
        scope = "/".join(filter(None, (outer, str(equation.source_info.name_stack))))
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            total[scope] += times * cost(equation)
        else:
            iterations = times * equation.params.get("length", 1)  # of a scan
            for inner in jaxprs_in_params(equation.params):
                total += _by_scope(inner, cost, scope, iterations)
    return total


def _values(equation) -> int:
    return sum(variable.aval.size for variable in (*equation.invars, *equation.outvars))


def _multiply_adds(equation) -> int:
    outputs = math.prod(equation.outvars[0].aval.shape)
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        # The kernel's input axis is already divided by the number of groups.
        return outputs * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    shape = equation.invars[0].aval.shape
    return outputs * math.prod(shape[axis] for axis in numbers[0][0])


def of_network(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """(parameters, multiply-adds of one image) of a network on images [height, width, channels]."""
    variables, jaxpr = _trace(model, image_shape)
    return parameters(variables), _by_scope(jaxpr, _multiply_adds).total()


@dataclasses.dataclass
class Layer:
    """A named part of a network; `output_shape` is that of one image, None where not known."""

    name: str
    output_shape: tuple[int, ...] | None = None
    parameters: int = 0
    multiply_adds: int = 0


def layers(model: nn.Module, image_shape: tuple[int, int, int], depth: int = 2) -> list[Layer]:
    """What each part of a network holds and computes for one image, in the network's order.

    Names have at most `depth` parts; deeper modules are added up. Images are [height, width,
    channels].
    """
    shapes = {}

    def record(call, arguments, keywords, context):
        result = call(*arguments, **keywords)
        if context.method_name == "__call__":
            shapes[context.module.path] = jax.tree.leaves(result)[0].shape[1:]
        return result

    with nn.intercept_methods(record):
        variables, jaxpr = _trace(model, image_shape)
    amounts = []
    for scope, number in _by_scope(jaxpr, _multiply_adds).items():
        parts = tuple(scope.split("/"))[1:]
        # A block that a `Stage` calls has a scope in the stage's, but is a module beside it.
        module = next((parts[n:] for n in range(len(parts)) if parts[n:] in shapes), parts)
        amounts.append((module, "multiply_adds", number))
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        module = tuple(key.key for key in path[:-1])
        amounts.append((module, "parameters", math.prod(leaf.shape)))
    rows = {path: Layer("/".join(path), shape) for path, shape in shapes.items()}
    for path, field, amount in amounts:
        row = rows.setdefault(path[:depth], Layer("/".join(path[:depth])))
        setattr(row, field, getattr(row, field) + amount)
    return [row for row in rows.values() if row.parameters or row.multiply_adds]


def recomputed(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one image that the backward pass of a network computes again.

    With `recompute` "layer" this is the 1x1 of every bottleneck: gradients do not need the output
    of a layer's last convolution. With "block" it is every convolution of the dense blocks.
    """
    wanted = {"layer": "conv1", "block": "conv"}.get(getattr(model, "recompute", "none"))
    if wanted is None or (wanted == "conv1" and not model.bottleneck):
        return 0
    rows = [row for row in layers(model, image_shape, depth=3) if row.name.startswith("block")]
    return sum(row.multiply_adds for row in rows if row.name.split("/")[2].startswith(wanted))


def pooled_first(model: nn.Module, image_shape: tuple[int, int, int], trains: bool) -> int:
    """Multiply-adds of one image that the forward pass of a DenseNet saves by pooling first.

    With in-place blocks a transition pools before its 1x1 convolution. Without dropout the result
    is the same.
    """
    if getattr(model, "block", None) != "in_place" or (trains and model.dropout_rate):
        return 0
    saved = 0
    for row in layers(model, image_shape, depth=2):
        if row.name.startswith("transition") and row.multiply_adds:
            height, width = row.output_shape[:2]
            of_a_pixel = row.multiply_adds // (height * width)
            saved += row.multiply_adds - of_a_pixel * (height // 2) * (width // 2)
    return saved

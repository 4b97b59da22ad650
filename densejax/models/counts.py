"""Exact counts of a network from its abstract evaluation: no array is ever made."""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from densejax import models


def parameters(variables: Any) -> int:
    """Number of trainable values: the collection "params", without BatchNorm's statistics."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds of the convolutions and matrix products in a function's trace.

    Args:
      function: traced on the abstract arguments; loops count once per iteration of `scan`.
      *arguments: pytrees of arrays or jax.ShapeDtypeStruct.
    """
    return _by_scope(jax.make_jaxpr(function)(*arguments).jaxpr, _multiply_adds).total()


def memory_access_cost(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """MAC of Lee et al., arXiv:1904.09730, section 2.2, without the classifier.

    Values that a network's convolutions read and write for one image, weights included: the sum of
    h w (c_in + c_out) + k^2 c_in c_out (at stride 2 inputs and outputs each count at their size).
    """
    return _by_scope(_trace(model.clone(num_classes=0), image_shape)[1], _values).total()


def convolution_inputs(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Values that all convolutions and products of a network read for one image, without weights.

    A feature map counts once for every layer that reads it.
    """
    jaxpr = _trace(model, image_shape)[1]
    return _by_scope(jaxpr, lambda equation: equation.invars[0].aval.size).total()


def _trace(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """(abstract variables, jaxpr of the forward pass on one image) of a network's literal form."""
    model, image = models.reference(model), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # One trace for both: the draws of the variables are neither convolutions nor products.
    trace = jax.make_jaxpr(model.init_with_output, return_shape=True)
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
            turns = times * equation.params.get("length", 1)
            for inner in jaxprs_in_params(equation.params):
                total += _by_scope(inner, cost, scope, turns)
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
    """A named part of a network; `output_shape` is of one image, None where it is not known."""

    name: str
    output_shape: tuple[int, ...] | None = None
    parameters: int = 0
    multiply_adds: int = 0


def layers(model: nn.Module, image_shape: tuple[int, int, int], depth: int = 2) -> list[Layer]:
    """What each part of a network holds and computes for one image, in the network's order.

    Args:
      model: from densejax.models.create.
      image_shape: height, width, channels.
      depth: names are cut after so many parts; what lies deeper is added up.
    """
    shapes = {}

    def record(call, arguments, keywords, context):
        result = call(*arguments, **keywords)
        if context.method_name == "__call__":
            shapes[context.module.path] = jax.tree.leaves(result)[0].shape[1:]
        return result

    with nn.intercept_methods(record):
        variables, jaxpr = _trace(model, image_shape)
    scopes = _by_scope(jaxpr, _multiply_adds).items()
    amounts = [(tuple(scope.split("/"))[1:], "multiply_adds", n) for scope, n in scopes]
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        module = tuple(key.key for key in path[:-1])
        amounts.append((module, "parameters", math.prod(leaf.shape)))
    rows = {path: Layer("/".join(path), shape) for path, shape in shapes.items()}
    for path, field, amount in amounts:
        row = rows.setdefault(path[:depth], Layer("/".join(path[:depth])))
        setattr(row, field, getattr(row, field) + amount)
    return [row for row in rows.values() if row.parameters or row.multiply_adds]


def recomputed(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of one image that a network's `recompute` does again, by the level's meaning.

    The output of a layer's last convolution is no input of its backward pass: "layer" computes the
    1x1 of every bottleneck again, "block" every convolution of the dense blocks, "norm" none.
    """
    wanted = {"layer": "conv1", "block": "conv"}.get(getattr(model, "recompute", "none"))
    if wanted is None or (wanted == "conv1" and not model.bottleneck):
        return 0
    rows = [row for row in layers(model, image_shape, depth=3) if row.name.startswith("block")]
    return sum(row.multiply_adds for row in rows if row.name.split("/")[2].startswith(wanted))


def pooled_first(model: nn.Module, image_shape: tuple[int, int, int], trains: bool) -> int:
    """Multiply-adds of one image that an in-place DenseNet's forward pass does without.

    Its transitions pool before their 1x1 convolution, which commutes but for dropout.
    """
    if getattr(model, "block", None) != "in_place" or (trains and model.dropout_rate):
        return 0
    left_out = 0
    for row in layers(model, image_shape, depth=2):
        if row.name.startswith("transition") and row.multiply_adds:
            height, width = row.output_shape[:2]
            a_pixel = row.multiply_adds // (height * width)
            left_out += row.multiply_adds - a_pixel * (height // 2) * (width // 2)
    return left_out

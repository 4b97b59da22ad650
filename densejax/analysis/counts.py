"""Exact counts of a network from its abstract evaluation: no array is ever made."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params


def parameters(variables: Any) -> int:
    """Number of trainable values: the collection "params", without BatchNorm's statistics."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds of the convolutions and matrix products in a function's trace.

    Args:
      function: traced on the abstract arguments; loops count once per iteration of `scan`.
      *arguments: pytrees of arrays or jax.ShapeDtypeStruct.
    """
    return _total(jax.make_jaxpr(function)(*arguments).jaxpr, _multiply_adds)


def memory_access_cost(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """MAC of Lee et al., arXiv:1904.09730, section 2.2, without the classifier.

    Values that a network's convolutions read and write for one image, weights included: the sum of
    h w (c_in + c_out) + k^2 c_in c_out (at stride 2 inputs and outputs each count at their size).
    """
    model = model.clone(num_classes=0)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    jaxpr = jax.make_jaxpr(lambda v, x: model.apply(v, x)[1])(variables, image).jaxpr
    return _total(jaxpr, _values)


def _total(jaxpr, cost: Callable[[Any], int]) -> int:
    """The sum of the cost of every convolution and matrix product."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            total += cost(equation)
        else:
            inner = sum(_total(sub, cost) for sub in jaxprs_in_params(equation.params))
            total += inner * equation.params.get("length", 1)
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
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return parameters(variables), multiply_adds(lambda v, x: model.apply(v, x)[0], variables, image)

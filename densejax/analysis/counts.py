"""Exact counts of a network from its abstract evaluation: no array is ever made."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp


def parameters(variables: Any) -> int:
    """Number of trainable values: the collection "params", without BatchNorm's statistics."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiply-adds of the convolutions and matrix products in a function's trace.

    Args:
      function: traced on the abstract arguments; loops count once per iteration of `scan`.
      *arguments: pytrees of arrays or jax.ShapeDtypeStruct.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, parameters_ = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            numbers = parameters_["dimension_numbers"]
            # The kernel's input axis is already divided by the number of groups.
            outputs = math.prod(equation.outvars[0].aval.shape)
            total += outputs * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        elif name == "dot_general":
            (contracted, _), _ = parameters_["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            length = math.prod(shape[axis] for axis in contracted)
            total += math.prod(equation.outvars[0].aval.shape) * length
        else:
            inner = sum(_of_jaxpr(sub) for sub in jax.extend.core.jaxprs_in_params(parameters_))
            total += inner * parameters_.get("length", 1)
    return total


def of_network(model: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """(parameters, multiply-adds of one image) of a network on images [height, width, channels]."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return parameters(variables), multiply_adds(lambda v, x: model.apply(v, x)[0], variables, image)

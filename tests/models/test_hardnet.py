"""Blocks of HarDNet against NumPy."""

import jax
import numpy as np
import pytest

from densejax.models import layers
from densejax.models.hardnet import Block
from tests.models import oracle

BOUND = layers.Layers(train=False)


@pytest.mark.parametrize("separable", [False, True])
def test_block_equals_numpy(separable):
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 5)).astype(np.float32)
    module = Block("hardnet:multiplier=1.6", 4, 4, separable, BOUND)
    variables = oracle.random_variables(module, x)
    assert len(variables["params"]) == (8 if separable else 4)

    def normalised(y, own, convolve):
        return oracle.norm(convolve(y, oracle.child(own, "conv")), oracle.child(own, "norm"))

    def layer(number, *sources):
        y, name = np.concatenate(sources, axis=-1), f"layer{number}"
        if separable:
            y = normalised(y, oracle.child(variables, f"{name}_pointwise"), oracle.conv)
            y = np.clip(y, 0, 6)
            return normalised(y, oracle.child(variables, f"{name}_depthwise"), oracle.depthwise)
        return np.clip(normalised(y, oracle.child(variables, name), oracle.conv), 0, 6)

    x = 9 * x  # some results are above 6
    first = layer(1, x.astype(float))
    second = layer(2, first, x)
    third = layer(3, second)
    fourth = layer(4, third, second, x)
    assert [y.shape[-1] for y in (first, second, third, fourth)] == [4, 6, 4, 10]
    expected = np.concatenate([first, third, fourth], axis=-1)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=1e-4)

"""Pooling and its gradients against flax's, XLA's and window means in NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax import models
from densejax.config import UserError
from densejax.models.pooling import average_pool, max_pool
from densejax.models.vovnet import ceil_max_pool


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def with_gradient(pool, x, dy):
    """The pooled x and the gradient of x, from the first entries of dy."""
    y, pull = jax.vjp(pool, x)
    return y, pull(dy[:, : y.shape[1], : y.shape[2]])[0]


def ours(x):
    return max_pool(x, ((1, 1), (1, 1)))


def flaxs(x):
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@pytest.mark.parametrize("shape", [(8, 8), (7, 6), (5, 9)])
def test_max_pool_is_flaxs_and_gives_ties_to_the_first(shape):
    distinct, dy = draws(2, *shape, 3), draws(2, *shape, 3, seed=1)
    for x in (
        distinct,
        np.round(distinct),
        np.ones_like(distinct),
    ):  # all differ, some are equal, all are
        (y, dx), (expected_y, expected_dx) = (with_gradient(pool, x, dy) for pool in (ours, flaxs))
        np.testing.assert_array_equal(y, expected_y)
        np.testing.assert_allclose(dx, expected_dx, rtol=1e-6, atol=1e-6)


def test_pools_make_no_infinities():
    with jax.debug_infs(True):  # which stops at one
        jax.grad(lambda x: ours(x).sum())(jnp.asarray(draws(2, 7, 6, 3)))


def test_the_first_of_equal_values_is_the_first_in_the_order_of_rows():
    x = np.zeros((1, 3, 3, 1), np.float32)
    x[0, 0, 2] = x[0, 1, 0] = x[0, 2, 0] = 1  # by columns (1, 0) would come first
    _, dx = with_gradient(lambda x: max_pool(x, ((0, 0), (0, 0))), x, np.ones_like(x))
    assert np.argwhere(dx).tolist() == [[0, 0, 2, 0]] and dx.sum() == 1


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7])
def test_ceil_max_pool_lets_the_last_window_reach_over_the_edge(size):
    """PyTorch's ceil_mode: ceil((size - 3) / 2) + 1 windows, from the first pixel."""
    x = draws(1, size, size + 1, 2)
    dy, expected = draws(*x.shape, seed=1), np.zeros_like(x)
    y, dx = jax.device_get(with_gradient(ceil_max_pool, x, dy))
    rows, columns = (int(np.ceil((length - 3) / 2)) + 1 for length in (size, size + 1))
    assert y.shape == (1, rows, columns, 2)
    for i, j, channel in np.ndindex(y.shape[1:]):
        window = x[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, channel]
        row, column = np.unravel_index(window.argmax(), window.shape)
        assert y[0, i, j, channel] == window[row, column]
        expected[0, 2 * i + row, 2 * j + column, channel] += dy[0, i, j, channel]
    np.testing.assert_allclose(dx, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (2, 3)])
def test_average_pool_is_the_mean_of_windows_and_odd_edges_drop_out(shape):
    x = draws(2, *shape, 3)
    height, width = (length // 2 for length in shape)
    dy, expected = draws(*x.shape, seed=1), np.zeros_like(x)
    y, dx = with_gradient(average_pool, x, dy)
    windows = x[:, : 2 * height, : 2 * width].reshape(2, height, 2, width, 2, 3)
    np.testing.assert_allclose(y, windows.mean((2, 4)), rtol=1e-6, atol=1e-6)
    dy = dy[:, :height, :width]
    expected[:, : 2 * height, : 2 * width] = dy.repeat(2, 1).repeat(2, 2) / 4
    np.testing.assert_allclose(dx, expected, rtol=1e-6)


def test_a_map_of_one_pixel_cannot_be_halved():
    with pytest.raises(UserError, match="feature maps of 1x4 cannot be halved.*data.image_size"):
        average_pool(jnp.zeros((1, 1, 4, 1)))


@pytest.mark.parametrize(
    "name, changes, size, message",
    [
        ("densenet_bc_100_12", {"depth": None, "blocks": (1, 1)}, 1, "1x1 cannot be halved"),
        ("rdnet_tiny", {"growth_rates": (8, 8), "downsampling": (2,)}, 4, "1x1 cannot be halved"),
        ("rdnet_tiny", {}, 3, "3x3 cannot be divided into patches of 4x4"),
        (
            "hardnet68",
            {"blocks": (4,), "growth_rates": (8,), "output_widths": (8,), "downsampling": (1,)},
            4,
            "1x1 cannot be halved",
        ),
    ],
)
def test_a_network_that_halves_images_too_often_is_refused(name, changes, size, message):
    network = models.create(models.fields(name, **changes), 10)
    with pytest.raises(UserError, match=f"feature maps of {message}.*data.image_size"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def test_pools_keep_bfloat16():
    x = draws(1, 4, 4, 1).astype(jnp.bfloat16)
    for pool in (average_pool, ceil_max_pool):
        y, dx = with_gradient(pool, x, x)
        assert y.dtype == dx.dtype == jnp.bfloat16

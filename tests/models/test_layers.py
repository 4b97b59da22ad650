"""Padding, norms, stems and the head, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax.models import layers


def naive_windows(image, size, stride, padding, fill):
    """Every window of image [height, width], as PyTorch pads and steps, by loops alone."""
    padded = np.pad(image, padding, constant_values=fill)
    steps = (len(image) + 2 * padding - size) // stride + 1
    return [
        [padded[i * stride : i * stride + size, j * stride : j * stride + size]]
        for i in range(steps)
        for j in range(steps)
    ], (steps, steps)


def draws(*shape, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size, stride, edge", [(7, 2, 8), (7, 2, 9), (3, 1, 8), (1, 2, 8)])
def test_convolution_pads_as_pytorch(size, stride, edge):
    image, kernel = draws(edge, edge), draws(size, size, seed=1)
    windows, shape = naive_windows(image, size, stride, size // 2, 0.0)
    expected = np.reshape([(window * kernel).sum() for window in windows], shape)
    conv = layers.Layers(False).conv(1, (size, size), stride)
    variables = {"params": {"kernel": kernel[:, :, None, None]}}
    result = jax.jit(conv.apply)(variables, image[None, :, :, None])
    np.testing.assert_allclose(result[0, :, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_imagenet_stem_equals_loops():
    # Channel c of the convolution reads its window's centre times c + 1: 16x16 -> 8x8 -> 4x4.
    image = draws(16, 16)
    kernel = np.zeros((7, 7, 1, 2), np.float32)
    kernel[3, 3, 0] = [1, 2]
    bound = layers.Layers(train=False, batch_norm_epsilon=0.0)
    norm = {"scale": jnp.ones(2), "bias": jnp.full(2, 20.0)}
    variables = {
        "params": {"conv": {"kernel": kernel}, "norm": norm},
        "batch_stats": {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}},
    }
    stem = layers.STEMS["imagenet"](2, bound)
    result = jax.jit(stem.apply)(variables, image[None, :, :, None])
    for channel in range(2):
        centre = np.maximum(image[::2, ::2] * (channel + 1) + 20, 0)
        windows, shape = naive_windows(centre, 3, 2, 1, -np.inf)
        expected = np.reshape([np.max(window) for window in windows], shape)
        np.testing.assert_allclose(result[0, :, :, channel], expected, rtol=1e-5)


def test_cifar_stem_is_one_convolution():
    bound = layers.Layers(train=False)
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    features, variables = jax.eval_shape(
        layers.STEMS["cifar"](5, bound).init_with_output, jax.random.key(0), image
    )
    assert features.shape == (2, 8, 8, 5)
    assert jax.tree.map(lambda leaf: leaf.shape, variables) == {
        "params": {"conv": {"kernel": (3, 3, 3, 5)}}
    }


def test_norm_over_an_axis_sees_the_whole_batch():
    x = draws(2, 4, 3, 3, 5) + np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1, 1)
    variables = {
        "params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
        "batch_stats": {"mean": jnp.zeros(5), "var": jnp.ones(5)},
    }

    def apply(x, axis):
        bound = layers.Layers(train=True, batch_norm_axis=axis)
        return bound.norm().apply(variables, x, mutable=["batch_stats"])

    together, stats = jax.vmap(lambda x: apply(x, "data"), axis_name="data")(x)
    alone, own = jax.vmap(lambda x: apply(x, None), axis_name="data")(x)
    axes = (0, 1, 2, 3)
    expected = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
    np.testing.assert_allclose(together, expected, rtol=1e-4, atol=1e-5)
    for device in range(2):
        np.testing.assert_allclose(
            stats["batch_stats"]["mean"][device], 0.1 * x.mean(axes), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            stats["batch_stats"]["var"][device], 0.9 + 0.1 * x.var(axes), rtol=1e-5
        )
        part = (x[device] - x[device].mean((0, 1, 2))) / np.sqrt(x[device].var((0, 1, 2)) + 1e-5)
        np.testing.assert_allclose(alone[device], part, rtol=1e-4, atol=1e-5)
    assert np.abs(own["batch_stats"]["mean"][0] - own["batch_stats"]["mean"][1]).max() > 0.05


def test_head():
    features = draws(2, 3, 3, 4).astype(jnp.bfloat16)
    (logits, pooled), variables = jax.jit(layers.Head(6).init_with_output)(
        jax.random.key(0), features
    )
    classifier = variables["params"]["classifier"]
    expected = np.asarray(features, np.float64).mean((1, 2))
    assert logits.dtype == pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, expected @ classifier["kernel"], rtol=1e-4, atol=1e-6)

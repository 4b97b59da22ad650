"""Padding, dropout, norms, pooling, stems and the head, against NumPy and statistics."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax.data.augment import example_keys
from densejax.models import layers, pooling, regularization


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


@pytest.mark.parametrize("size, stride, edge", [(7, 2, 8), (7, 2, 9), (3, 1, 8), (3, 2, 8)])
def test_convolution_pads_as_pytorch(size, stride, edge):
    image, kernel = draws(edge, edge), draws(size, size, seed=1)
    windows, shape = naive_windows(image, size, stride, size // 2, 0.0)
    expected = np.reshape([(window * kernel).sum() for window in windows], shape)
    conv = layers.Layers(False, jnp.float32, None).conv(1, (size, size), stride)
    variables = {"params": {"kernel": kernel[:, :, None, None]}}
    result = jax.jit(conv.apply)(variables, image[None, :, :, None])
    np.testing.assert_allclose(result[0, :, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_imagenet_stem_equals_loops():
    # Channel c of the convolution reads its window's centre times c + 1: 16x16 -> 8x8 -> 4x4.
    image = draws(16, 16)
    kernel = np.zeros((7, 7, 1, 2), np.float32)
    kernel[3, 3, 0] = [1, 2]
    bound = layers.Layers(train=False, dtype=jnp.float32, batch_norm_axis=None, epsilon=0.0)
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
    bound = layers.Layers(train=False, dtype=jnp.float32, batch_norm_axis=None)
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    features, variables = jax.eval_shape(
        layers.STEMS["cifar"](5, bound).init_with_output, jax.random.key(0), image
    )
    assert features.shape == (2, 8, 8, 5)
    assert jax.tree.map(lambda leaf: leaf.shape, variables) == {
        "params": {"conv": {"kernel": (3, 3, 3, 5)}}
    }


def test_average_pool():
    x = draws(2, 4, 6, 3)
    expected = x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(pooling.average_pool(x), expected, rtol=1e-6)
    odd = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=99)
    np.testing.assert_allclose(pooling.average_pool(odd), expected, rtol=1e-6)


def test_norm_over_an_axis_sees_the_whole_batch():
    x = draws(2, 4, 3, 3, 5) + np.arange(2, dtype=np.float32).reshape(2, 1, 1, 1, 1)
    variables = {
        "params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
        "batch_stats": {"mean": jnp.zeros(5), "var": jnp.ones(5)},
    }

    def apply(x, axis, epsilon=1e-5):
        bound = layers.Layers(train=True, dtype=jnp.float32, batch_norm_axis=axis, epsilon=epsilon)
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


def test_norm_survives_a_large_mean():
    # E[x^2] - E[x]^2 in float32 gives a variance of 0 or worse here; its true value is 1.
    x = 10_000 + draws(64, 4, 4, 1)
    bound = layers.Layers(train=True, dtype=jnp.float32, batch_norm_axis=None)
    result, _ = jax.jit(bound.norm().init_with_output)(jax.random.key(0), x)
    np.testing.assert_allclose(np.std(result), 1.0, rtol=1e-3)


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


KEYS = {
    "counters": jnp.stack([jnp.zeros(256, jnp.uint32), jnp.arange(256, dtype=jnp.uint32)], 1),
    "examples": jax.random.key_data(
        example_keys(jax.random.key(5), jnp.arange(256, dtype=jnp.int32))
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_hash_bits_look_random(name):
    bits = np.asarray(regularization.hash_bits(KEYS[name], salt=0xDECAF, size=4096))
    assert bits.dtype == np.uint32 and bits.shape == (256, 4096)
    planes = np.unpackbits(bits.view(np.uint8).reshape(-1, 4), axis=1)
    assert np.abs(planes.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(planes))
    for place in range(4):
        counts = np.bincount(bits.view(np.uint8)[:, place::4].ravel(), minlength=256)
        expected = bits.size / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
    assert len(np.unique(bits, axis=0)) == 256


def test_hash_bits_read_both_words_the_salt_and_the_place():
    def bits(first, second, salt=1):
        return np.asarray(
            regularization.hash_bits(jnp.asarray([[first, second]], jnp.uint32), salt, 1024)
        )

    base = bits(3, 4)
    for other in (bits(2, 4), bits(3, 5), bits(4, 3), bits(3, 4, salt=2)):
        assert (base == other).mean() < 0.01
    assert len(np.unique(base)) == base.size


class Network(nn.Module):
    """One dropout, so that it has a path."""

    rate: float
    place: str

    @nn.compact
    def __call__(self, x, keys):
        bound = layers.Layers(
            train=True, dtype=x.dtype, batch_norm_axis=None, dropout_rate=self.rate, keys=keys
        )
        return bound.dropout(x, name=self.place)


@functools.partial(jax.jit, static_argnames=("rate", "place"))
def apply(x, keys, rate, place):
    return Network(rate, place).apply({}, x, keys)


def dropout(x, keys, rate=0.2, place="here"):
    return np.asarray(apply(x, keys, rate, place))


KEY_DATA = KEYS["examples"]


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_dropout_rate_and_scale(rate):
    x = np.exp(draws(256, 8, 8, 16))
    result = dropout(x, KEY_DATA, rate)
    kept = result != 0
    sigma = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * sigma
    np.testing.assert_allclose(result[kept], x[kept] / (1 - rate), rtol=1e-6)
    ones = dropout(np.ones_like(x), KEY_DATA, rate)
    assert abs(ones.mean() - 1) < 5 * sigma / (1 - rate)


def test_dropout_depends_on_key_and_place_alone():
    x = np.ones((8, 4, 4, 3), np.float32)
    keys = KEY_DATA[:8]
    whole = dropout(x, keys)
    order = np.asarray([3, 1, 4, 0, 5, 7, 2, 6])
    np.testing.assert_array_equal(dropout(x, keys[order]), whole[order])
    halves = [dropout(x[:4], keys[:4]), dropout(x[4:], keys[4:])]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    same = dropout(x, jnp.broadcast_to(keys[:1], (8, 2)))
    np.testing.assert_array_equal(same, np.broadcast_to(whole[:1], x.shape))
    np.testing.assert_array_equal(dropout(x * 7, keys) != 0, whole != 0)


def test_dropout_is_independent_between_layers_examples_and_places():
    x = np.ones((256, 16, 16, 8), np.float32)
    mask = dropout(x, KEY_DATA, 0.5) != 0
    other = dropout(x, KEY_DATA, 0.5, place="there") != 0

    def correlation(one, two):
        return abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) * np.sqrt(one.size)

    assert correlation(mask, other) < 5
    assert correlation(mask[:-1], mask[1:]) < 5
    assert correlation(mask[:, :-1], mask[:, 1:]) < 5
    assert correlation(mask[:, :, :-1], mask[:, :, 1:]) < 5
    assert correlation(mask[..., :-1], mask[..., 1:]) < 5


def test_no_dropout_without_training_or_rate():
    x = draws(2, 2, 2, 2)
    np.testing.assert_array_equal(dropout(x, None, 0.0), x)
    bound = layers.Layers(train=False, dtype=jnp.float32, batch_norm_axis=None, dropout_rate=0.5)
    assert bound.dropout(x, name="place") is x

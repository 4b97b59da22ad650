"""Random masks by statistics, and where they are applied."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax.config import UserError
from densejax.data.augment import example_keys
from densejax.models import layers, regularization


def draws(*shape, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).normal(size=shape).astype(np.float32)


KEYS = {
    "counters": jnp.stack([jnp.zeros(256, jnp.uint32), jnp.arange(256, dtype=jnp.uint32)], 1),
    "examples": jax.random.key_data(
        example_keys(jax.random.key(5), jnp.arange(256, dtype=jnp.int32))
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_random_bits_look_random(name):
    bits = np.asarray(regularization.random_bits(KEYS[name], seed=0xDECAF, size=4096))
    assert bits.dtype == np.uint32 and bits.shape == (256, 4096)
    planes = np.unpackbits(bits.view(np.uint8).reshape(-1, 4), axis=1)
    assert np.abs(planes.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(planes))
    for place in range(4):
        counts = np.bincount(bits.view(np.uint8)[:, place::4].ravel(), minlength=256)
        expected = bits.size / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
    assert len(np.unique(bits, axis=0)) == 256


def test_random_bits_read_both_words_the_seed_and_the_place():
    def bits(first, second, seed=1):
        return np.asarray(
            regularization.random_bits(jnp.asarray([[first, second]], jnp.uint32), seed, 1024)
        )

    base = bits(3, 4)
    for other in (bits(2, 4), bits(3, 5), bits(4, 3), bits(3, 4, seed=2)):
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
    bound = layers.Layers(train=False, dropout_rate=0.5)
    assert bound.dropout(x, name="place") is x


def test_stochastic_depth_drops_whole_examples_and_does_not_scale_them():
    x = np.exp(draws(256, 4, 4, 3))
    module = regularization.StochasticDepth(0.7, name="survival")
    result = np.asarray(jax.jit(lambda x: module.apply({}, x, True, KEY_DATA))(x))
    kept = (result != 0).any((1, 2, 3))
    np.testing.assert_array_equal(result, x * kept[:, None, None, None])
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.7 * 0.3 / 256)
    halves = [module.apply({}, part, True, keys) for part, keys in halved(x, KEY_DATA)]
    np.testing.assert_array_equal(np.concatenate(halves), result)


def halved(*arrays):
    return zip(*(np.split(np.asarray(array), 2) for array in arrays), strict=True)


def test_stochastic_depth_scales_by_its_probability_after_training():
    x = draws(2, 2, 2, 2)
    module = regularization.StochasticDepth(0.7)
    np.testing.assert_allclose(module.apply({}, x, False, None), 0.7 * x, rtol=1e-6)
    assert regularization.StochasticDepth(1.0).apply({}, x, True, None) is x


def test_masks_are_their_own_transposes():
    x, y = draws(8, 3, 3, 2), draws(8, 3, 3, 2, seed=1)
    for mask in (regularization.dropout, regularization.stochastic_depth):
        pull = jax.vjp(lambda x, mask=mask: mask(x, 0.5, 7, KEY_DATA[:8]), x)[1]
        np.testing.assert_array_equal(pull(y)[0], mask(y, 0.5, 7, KEY_DATA[:8]))


@pytest.mark.parametrize("mask", [regularization.dropout, regularization.stochastic_depth])
def test_masks_need_keys(mask):
    with pytest.raises(ValueError, match="needs `keys`, one for each example"):
        mask(jnp.ones((2, 2)), 0.5, 1, None)


def test_typed_keys_are_as_good_as_raw_ones_and_each_example_has_its_own():
    images, key = jnp.zeros((4, 2, 2, 1)), jax.random.key(3)
    raw = jax.random.key_data(typed := jax.random.split(key, 4))
    for keys in (typed, raw, np.asarray(raw)):
        np.testing.assert_array_equal(regularization.raw_keys(keys, images), raw)
    assert regularization.raw_keys(None, images) is None
    for keys in (key, raw[0], typed[:3], raw[:3]):
        with pytest.raises(UserError, match=r"keys \[.*\]: give one for each example"):
            regularization.raw_keys(keys, images)


def test_every_path_has_a_seed_of_its_own():
    paths = [
        (f"block{block}", f"layer{layer}", name)
        for block in range(1, 5)
        for layer in range(1, 100)
        for name in ("dropout1", "dropout2", "survival")
    ]
    assert len(set(map(regularization.layer_seed, paths))) == len(paths)

"""Dropout, stochastic depth and drop path, with one random key for each example."""

import math
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax.config import UserError


def random_bits(keys: jax.Array, seed: int, size: int) -> jax.Array:
    """Random bits uint32 [batch, size] from keys uint32 [batch, 2] and the seed of a layer.

    MurmurHash3's finaliser (Appleby) is applied to the element's number with each word of its
    example's key. The bits depend only on the example's key and the layer, never on how devices
    share the batch. They compile at once, while a threefry draw takes seconds to compile.
    """

    def mix(bits):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        return bits ^ (bits >> 16)

    first, second = (mix(keys[:, i : i + 1] ^ jnp.uint32(seed)) for i in range(2))
    counter = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    return mix(mix(counter[None] ^ first) + second)


def raw_keys(keys: jax.Array | None, images: jax.Array) -> jax.Array | None:
    """Raw keys uint32 [batch, words] of raw or typed ones; UserError unless one for each image."""
    if keys is None:
        return None
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        keys = jax.random.key_data(keys)
    if keys.ndim != 2 or len(keys) != len(images):
        wanted = f"jax.random.split(key, {len(images)})"
        raise UserError(f"keys {list(keys.shape)}: give one for each example, such as {wanted}")
    return keys


def layer_seed(path: tuple[str, ...]) -> int:
    """The seed of a layer: a number of its own for each path of module names."""
    return zlib.crc32("/".join(path).encode())


def dropout(x: jax.Array, rate: float, seed: int, keys: jax.Array | None) -> jax.Array:
    """Drops elements of x [batch, ...] and scales up the others; this is its own transpose."""
    if rate == 0.0:
        return x
    bits = random_bits(_given(keys, "dropout"), seed, math.prod(x.shape[1:])).reshape(x.shape)
    return jnp.where(_kept(bits, rate), x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))


def stochastic_depth(
    x: jax.Array, probability: float, seed: int, keys: jax.Array | None
) -> jax.Array:
    """Keeps whole examples of x [batch, ...] with a probability; this is its own transpose."""
    if probability == 1.0:
        return x
    bits = random_bits(_given(keys, "stochastic depth"), seed, 1)
    bits = bits.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(_kept(bits, 1 - probability), x, jnp.zeros_like(x))


def _given(keys, reader):
    if keys is None:
        raise ValueError(f"{reader} in training needs `keys`, one for each example")
    return keys


def _kept(bits, rate):
    """Whether each element is kept, where a fraction `rate` is dropped."""
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


class Dropout(nn.Module):
    """Element-wise dropout (Srivastava et al. 2014); the module's path is its seed."""

    rate: float

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Drops elements of x [batch, ...] with keys uint32 [batch, 2]; scales up the others."""
        return dropout(x, self.rate, layer_seed(self.path), keys) if self.rate else x


class StochasticDepth(nn.Module):
    """Drops whole branches at random (Huang et al., arXiv:1603.09382), each example by itself.

    As in the paper, a branch that is kept is not scaled in training, and every branch is scaled by
    its probability in evaluation. Unlike here, the paper draws once for a whole mini-batch.
    """

    probability: float

    def __call__(self, x: jax.Array, train: bool, keys: jax.Array | None) -> jax.Array:
        """Drops examples of x [batch, ...] with keys uint32 [batch, 2], or scales x."""
        if self.probability == 1.0:
            return x
        if not train:
            return x * jnp.asarray(self.probability, x.dtype)
        return stochastic_depth(x, self.probability, layer_seed(self.path), keys)

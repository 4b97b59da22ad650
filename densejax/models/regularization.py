"""Dropout and stochastic depth, with one random key per example."""

import math
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax.config import UserError


def hash_bits(keys: jax.Array, salt: int, size: int) -> jax.Array:
    """Random bits from a counter: uint32 [batch, size] from keys uint32 [batch, 2].

    MurmurHash3's finaliser (Appleby), applied to the element's number with each word of its
    example's key. A mask depends on the example's key and place alone, never on how the batch is
    laid out over devices, and it compiles in a blink where a threefry draw takes seconds.
    """

    def mix(bits):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        return bits ^ (bits >> 16)

    first, second = (mix(keys[:, i : i + 1] ^ jnp.uint32(salt)) for i in range(2))
    counter = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    return mix(mix(counter[None] ^ first) + second)


def one_for_each(keys: jax.Array | None, images: jax.Array) -> jax.Array | None:
    """Raw keys uint32 [batch, words] of raw or typed ones; UserError where they are not as many."""
    if keys is None:
        return None
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        keys = jax.random.key_data(keys)
    if keys.ndim != 2 or len(keys) != len(images):
        wanted = f"jax.random.split(key, {len(images)})"
        raise UserError(f"keys {list(keys.shape)}: give one for each example, such as {wanted}")
    return keys


def salt(path: tuple[str, ...]) -> int:
    """A number of its own for every place in a network, by its path of module names."""
    return zlib.crc32("/".join(path).encode())


def dropout(x: jax.Array, rate: float, salt: int, keys: jax.Array | None) -> jax.Array:
    """Drops elements of x [batch, ...]; linear in x and diagonal, so its own transpose."""
    if rate == 0.0:
        return x
    if keys is None:
        raise ValueError("dropout in training needs `keys`, one for each example")
    bits = hash_bits(keys, salt, math.prod(x.shape[1:])).reshape(x.shape)
    keep = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros_like(x))


def survive(x: jax.Array, probability: float, salt: int, keys: jax.Array | None) -> jax.Array:
    """Drops whole examples of x [batch, ...]; linear in x and diagonal, so its own transpose."""
    if probability == 1.0:
        return x
    if keys is None:
        raise ValueError("stochastic depth in training needs `keys`, one for each example")
    bits = hash_bits(keys, salt, 1).reshape(-1, *(1,) * (x.ndim - 1))
    keep = bits >= jnp.uint32(min(round((1 - probability) * 2**32), 2**32 - 1))
    return jnp.where(keep, x, jnp.zeros_like(x))


class Dropout(nn.Module):
    """Element-wise dropout (Srivastava et al. 2014) with one key per example."""

    rate: float

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Drops elements of x [batch, ...] with keys uint32 [batch, 2]; scales up what is left."""
        return dropout(x, self.rate, salt(self.path), keys) if self.rate else x


class StochasticDepth(nn.Module):
    """Drops whole branches at random (Huang et al., arXiv:1603.09382), each example by itself.

    As in the paper a branch that survives is not scaled in training, and every branch is scaled by
    its probability of survival afterwards. The paper draws once for a mini-batch.
    """

    probability: float

    def __call__(self, x: jax.Array, train: bool, keys: jax.Array | None) -> jax.Array:
        """Drops examples of x [batch, ...] with keys uint32 [batch, 2], or scales x."""
        if self.probability == 1.0:
            return x
        if not train:
            return x * jnp.asarray(self.probability, x.dtype)
        return survive(x, self.probability, salt(self.path), keys)

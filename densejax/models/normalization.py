"""Batch normalisation (Ioffe and Szegedy, arXiv:1502.03167) with statistics in float32."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

IMAGE_AXES = (0, 1, 2)  # batch, height, width


class Statistics(NamedTuple):
    """Mean and biased variance of each channel, at least float32."""

    mean: jax.Array
    variance: jax.Array


class Seen(NamedTuple):
    """Statistics of features that are known when they come to a norm.

    Attributes:
      batch: what the norm uses; gradients flow through it.
      running: the same numbers for the running statistics, known to be equal on all devices.
    """

    batch: Statistics
    running: Statistics


def wide(x: jax.Array) -> jax.Array:
    """Casts x to float32, or leaves it at float64: the precision of statistics."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def statistics(x: jax.Array, axis: Any = None) -> Statistics:
    """Statistics of x [batch, height, width, channels], over all devices of the mapped `axis`.

    In two passes: E[x^2] - E[x]^2 cancels where the mean is large.
    """
    x = wide(x)
    mean = mean_over(x.mean(IMAGE_AXES), axis)
    return Statistics(mean, mean_over(jnp.square(x - mean).mean(IMAGE_AXES), axis))


def mean_over(x: jax.Array, axis: Any) -> jax.Array:
    """The mean of x over the devices of a mapped axis or axes; None: x itself."""
    return x if axis is None else lax.pmean(x, axis)


def sum_over(x: jax.Array, axis: Any) -> jax.Array:
    """The sum of x over the devices of a mapped axis or axes; None: x itself."""
    return x if axis is None else lax.psum(x, axis)


def normalise(x: jax.Array, stats: Statistics, params: dict[str, jax.Array], epsilon: float):
    """BatchNorm of x with given statistics and params {"scale", "bias"}; at least float32."""
    return (wide(x) - stats.mean) * _slope(stats, params, epsilon) + params["bias"]


def affine(stats: Statistics, params: dict[str, jax.Array], epsilon: float):
    """(slope, shift) of the map of each channel that BatchNorm with given statistics is."""
    slope = _slope(stats, params, epsilon)
    return slope, params["bias"] - stats.mean * slope


def _slope(stats, params, epsilon):
    return params["scale"] * lax.rsqrt(stats.variance + epsilon)


def update(running: dict[str, jax.Array], batch: Statistics) -> dict[str, jax.Array]:
    """Running statistics {"mean", "var"} after a batch; 0.9 is a momentum of 0.1 in PyTorch."""
    mean, variance = map(lax.stop_gradient, batch)
    return {
        "mean": 0.9 * running["mean"] + 0.1 * mean,
        "var": 0.9 * running["var"] + 0.1 * variance,
    }


class BatchNorm(nn.Module):
    """BatchNorm with nn.BatchNorm's variables, that takes statistics which are known already.

    Attributes:
      train: batch statistics, which update the collection "batch_stats"; false: running ones.
      axis: mapped axis or axes over which batch statistics are averaged; None: none.
      epsilon: added to the variance.
      dtype: of the result.
    """

    train: bool
    axis: Any
    epsilon: float
    dtype: Any
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, seen: Seen | None = None) -> jax.Array:
        """Normalises the last axis of x [batch, height, width, channels]."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        params = {
            "scale": self.param("scale", self.scale_init, shape),
            "bias": self.param("bias", nn.initializers.zeros, shape),
        }
        stats = Statistics(mean.value, variance.value)
        if self.train:
            if seen is None:
                # Initialisation runs outside of the mapped axis.
                batch = statistics(x, None if self.is_initializing() else self.axis)
                seen = Seen(batch, batch)
            stats = seen.batch
        if self.train and not self.is_initializing():
            new = update({"mean": mean.value, "var": variance.value}, seen.running)
            mean.value, variance.value = new["mean"], new["var"]
        return normalise(x, stats, params, self.epsilon).astype(self.dtype)

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """(slope, shift) of each channel by the running statistics."""
        stats = self.variables["batch_stats"]
        stats = Statistics(stats["mean"], stats["var"])
        return affine(stats, self.variables["params"], self.epsilon)

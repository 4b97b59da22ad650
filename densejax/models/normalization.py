"""Batch normalisation (Ioffe and Szegedy, arXiv:1502.03167) with statistics in float32."""

import functools
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


def pixelwise(values: jax.Array) -> jax.Array:
    """Values [channels] in the rank of features: JAX may be set to refuse another rank."""
    return values[None, None, None]


def wide(x: jax.Array) -> jax.Array:
    """Casts x to float32, or leaves it at float64: the precision of statistics."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def statistics(x: jax.Array, axis: Any = None) -> Statistics:
    """Statistics of x [batch, height, width, channels], over all devices of the mapped `axis`.

    In two passes: E[x^2] - E[x]^2 cancels where the mean is large.
    """
    mean = mean_over(wide(x).mean(IMAGE_AXES), axis)
    return Statistics(mean, mean_over(_mean_square(x, mean), axis))


@jax.custom_vjp
def _mean_square(x, mean):
    """The mean of (x - mean)^2. As a function of the mean it is stationary: x has that mean."""
    return jnp.square(wide(x) - pixelwise(mean)).mean(IMAGE_AXES)


def _mean_square_forward(x, mean):
    return _mean_square(x, mean), (x, mean)


def _mean_square_backward(saved, gradient):
    x, mean = saved
    x = _made_again(x)
    slope = pixelwise(gradient * (2 * mean.size / max(x.size, 1)))
    return ((wide(x) - pixelwise(mean)) * slope).astype(x.dtype), jnp.zeros_like(mean)


_mean_square.defvjp(_mean_square_forward, _mean_square_backward)


def _made_again(x):
    """For a backward pass: XLA would else keep x - mean from the forward pass, and read that."""
    return lax.optimization_barrier(x)


def varying_as(x: jax.Array, tree: Any) -> Any:
    """The arrays of a tree, varying over mapped devices as x does, as a gradient by hand will.

    x must vary at least as they do.
    """
    zero = jnp.zeros_like(x, shape=(), dtype=jnp.float32)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)


def mean_over(x: jax.Array, axis: Any) -> jax.Array:
    """The mean of x over the devices of a mapped axis or axes; None: x itself."""
    return x if axis is None else lax.pmean(x, axis)


def sum_over(x: jax.Array, axis: Any) -> jax.Array:
    """The sum of x over the devices of a mapped axis or axes; None: x itself."""
    return x if axis is None else lax.psum(x, axis)


def normalise(x: jax.Array, stats: Statistics, params: dict[str, jax.Array], epsilon: float):
    """BatchNorm of x with given statistics and params {"scale", "bias"}; at least float32."""
    slope, shift = map(pixelwise, (_slope(stats, params, epsilon), params["bias"]))
    return (wide(x) - pixelwise(stats.mean)) * slope + shift


def normalise_relu(x, stats: Statistics, params: dict[str, jax.Array], epsilon: float) -> jax.Array:
    """ReLU of `normalise`, in the precision of x: its gradient keeps nothing but x."""
    return _normalise_relu(x, *varying_as(x, (stats, params)), epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise_relu(x, stats, params, epsilon):
    return jnp.maximum(normalise(x, stats, params, epsilon), 0).astype(x.dtype)


def _normalise_relu_forward(x, stats, params, epsilon):
    return _normalise_relu(x, stats, params, epsilon), (x, stats, params)


def _normalise_relu_backward(epsilon, saved, dz):
    x, stats, params = saved
    x = _made_again(x)
    # Written otherwise than in `normalise`: XLA:CPU would make the difference an array for both.
    centred = wide(x) + pixelwise(-stats.mean)
    dz, sums = through_relu(_normalise_relu(x, stats, params, epsilon), dz, centred)
    dx = (wide(dz) * pixelwise(_slope(stats, params, epsilon))).astype(x.dtype)
    gradients = norm_gradients(stats, params, epsilon, sums)
    return dx, *jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradients, (stats, params))


_normalise_relu.defvjp(_normalise_relu_forward, _normalise_relu_backward)


def through_relu(z, dz, centred):
    """dz where z is positive, and its sums: with 1 for the bias, with x - mean for the scale."""
    dz = jnp.where(z > 0, dz, 0)
    return dz, {"scale": (wide(dz) * centred).sum(IMAGE_AXES), "bias": wide(dz).sum(IMAGE_AXES)}


def norm_gradients(stats, params, epsilon, sums) -> tuple[Statistics, dict[str, jax.Array]]:
    """Gradients of a norm's statistics and parameters, from the sums of `through_relu`."""
    rate = lax.rsqrt(stats.variance + epsilon)
    slope = params["scale"] * rate
    of_stats = Statistics(-slope * sums["bias"], -0.5 * slope * rate**2 * sums["scale"])
    return of_stats, {"scale": sums["scale"] * rate, "bias": sums["bias"]}


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
    def __call__(self, x: jax.Array, seen: Seen | None = None, relu: bool = False) -> jax.Array:
        """Normalises the last axis of x [batch, height, width, channels]; then ReLU, if asked."""
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
        function = normalise_relu if relu else normalise
        return function(x, stats, params, self.epsilon).astype(self.dtype)

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """(slope, shift) of each channel by the running statistics."""
        stats = self.variables["batch_stats"]
        stats = Statistics(stats["mean"], stats["var"])
        return affine(stats, self.variables["params"], self.epsilon)

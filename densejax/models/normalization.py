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


class PrecomputedStatistics(NamedTuple):
    """Batch statistics of features that the layer before a norm has already computed.

    Attributes:
      batch: what the norm uses; gradients flow through it.
      running: the same numbers, for the running statistics; JAX knows that these are equal on all
        devices.
    """

    batch: Statistics
    running: Statistics


def per_channel(values: jax.Array) -> jax.Array:
    """Values [channels] as [1, 1, 1, channels], since JAX may be set to refuse mixed ranks."""
    return values[None, None, None]


def at_least_float32(x: jax.Array) -> jax.Array:
    """Casts x to float32, or leaves it at float64: the precision of statistics."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def statistics(x: jax.Array, axis: Any = None) -> Statistics:
    """Statistics of x [batch, height, width, channels], over all devices of the mapped `axis`.

    The variance takes a second pass: E[x^2] - E[x]^2 loses all digits where the mean is large.
    """
    mean = mean_over(at_least_float32(x).mean(IMAGE_AXES), axis)
    return Statistics(mean, mean_over(_mean_square(x, mean), axis))


@jax.custom_vjp
def _mean_square(x, mean):
    """The mean of (x - mean)^2. Its derivative by the mean is 0, since x has that mean."""
    return jnp.square(at_least_float32(x) - per_channel(mean)).mean(IMAGE_AXES)


def _mean_square_forward(x, mean):
    return _mean_square(x, mean), (x, mean)


def _mean_square_backward(saved, gradient):
    x, mean = saved
    x = _read_again(x)
    slope = per_channel(gradient * (2 * mean.size / max(x.size, 1)))
    dx = (at_least_float32(x) - per_channel(mean)) * slope
    return dx.astype(x.dtype), jnp.zeros_like(mean)


_mean_square.defvjp(_mean_square_forward, _mean_square_backward)


def _read_again(x):
    """x, read anew in a backward pass. Otherwise XLA would keep x - mean of the forward pass."""
    return lax.optimization_barrier(x)


def varying_like(x: jax.Array, tree: Any) -> Any:
    """The arrays of a tree, marked as different on each device wherever x is.

    `jax.shard_map` tracks which arrays may differ between devices. A hand-written gradient is each
    device's own, so JAX expects the same of the array that it belongs to. The mark comes from a
    zero that is made from x and added; this works under `jax.pmap`, too. x must be marked with at
    least the axes of the tree.
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
    slope, shift = map(per_channel, (_slope(stats, params, epsilon), params["bias"]))
    return (at_least_float32(x) - per_channel(stats.mean)) * slope + shift


def normalise_relu(x, stats: Statistics, params: dict[str, jax.Array], epsilon: float) -> jax.Array:
    """ReLU of `normalise`, in the precision of x.

    Of the large arrays, the backward pass needs only x.
    """
    return _normalise_relu(x, *varying_like(x, (stats, params)), epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise_relu(x, stats, params, epsilon):
    return jnp.maximum(normalise(x, stats, params, epsilon), 0).astype(x.dtype)


def _normalise_relu_forward(x, stats, params, epsilon):
    return _normalise_relu(x, stats, params, epsilon), (x, stats, params)


def _normalise_relu_backward(epsilon, saved, dz):
    x, stats, params = saved
    x = _read_again(x)
    # This is a sum where `normalise` has a difference. If both were the same expression, XLA:CPU
    # would store its result.
    centred = at_least_float32(x) + per_channel(-stats.mean)
    dz, sums = relu_backward(_normalise_relu(x, stats, params, epsilon), dz, centred)
    dx = (at_least_float32(dz) * per_channel(_slope(stats, params, epsilon))).astype(x.dtype)
    gradients = norm_gradients(stats, params, epsilon, sums)
    return dx, *jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradients, (stats, params))


_normalise_relu.defvjp(_normalise_relu_forward, _normalise_relu_backward)


def relu_backward(z, dz, centred):
    """The gradient before the ReLU after a norm, and the sums that the norm's gradients need.

    Args:
      z: the ReLU's result.
      dz: the gradient of z.
      centred: the norm's input minus its mean.

    Returns:
      The gradient: dz where z is positive, else 0; and its sums for each channel: of the gradient
      alone ("bias") and of the gradient times `centred` ("scale").
    """
    dz = jnp.where(z > 0, dz, 0)
    scale = (at_least_float32(dz) * centred).sum(IMAGE_AXES)
    return dz, {"scale": scale, "bias": at_least_float32(dz).sum(IMAGE_AXES)}


def norm_gradients(stats, params, epsilon, sums) -> tuple[Statistics, dict[str, jax.Array]]:
    """Gradients of a norm's statistics and parameters, from the sums of `relu_backward`."""
    rate = lax.rsqrt(stats.variance + epsilon)
    slope = params["scale"] * rate
    d_stats = Statistics(-slope * sums["bias"], -0.5 * slope * rate**2 * sums["scale"])
    return d_stats, {"scale": sums["scale"] * rate, "bias": sums["bias"]}


def affine(stats: Statistics, params: dict[str, jax.Array], epsilon: float):
    """(slope, shift) of each channel: with given statistics BatchNorm is slope * x + shift."""
    slope = _slope(stats, params, epsilon)
    return slope, params["bias"] - stats.mean * slope


def _slope(stats, params, epsilon):
    return params["scale"] * lax.rsqrt(stats.variance + epsilon)


def update_running(running: dict[str, jax.Array], batch: Statistics) -> dict[str, jax.Array]:
    """Running statistics {"mean", "var"} after a batch; PyTorch calls this a momentum of 0.1."""
    mean, variance = map(lax.stop_gradient, batch)
    return {
        "mean": 0.9 * running["mean"] + 0.1 * mean,
        "var": 0.9 * running["var"] + 0.1 * variance,
    }


class BatchNorm(nn.Module):
    """BatchNorm with nn.BatchNorm's variables, which can take precomputed statistics.

    Attributes:
      train: use batch statistics and update the collection "batch_stats"; false: use running ones.
      axis: mapped axis or axes over which batch statistics are averaged; None: none.
      epsilon: added to the variance.
      dtype: of the result.
      scale_init: initial values of the scale.
      scale_and_bias: whether it has a scale and a bias; otherwise it only normalises.
    """

    train: bool
    axis: Any
    epsilon: float
    dtype: Any
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    scale_and_bias: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, precomputed: PrecomputedStatistics | None = None, relu: bool = False
    ) -> jax.Array:
        """Normalises the last axis of x [batch, height, width, channels]; then ReLU, if asked."""
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if self.scale_and_bias:
            params = {
                "scale": self.param("scale", self.scale_init, shape),
                "bias": self.param("bias", nn.initializers.zeros, shape),
            }
        else:
            params = {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}
        stats = Statistics(mean.value, variance.value)
        if self.train:
            if precomputed is None:
                # The mapped axis does not exist while variables are initialised.
                batch = statistics(x, None if self.is_initializing() else self.axis)
                precomputed = PrecomputedStatistics(batch, batch)
            stats = precomputed.batch
            if not self.is_initializing():
                running = {"mean": mean.value, "var": variance.value}
                running = update_running(running, precomputed.running)
                mean.value, variance.value = running["mean"], running["var"]
        function = normalise_relu if relu else normalise
        return function(x, stats, params, self.epsilon).astype(self.dtype)

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """(slope, shift) of each channel by the running statistics."""
        stats, params = self.variables["batch_stats"], self.variables["params"]
        return affine(Statistics(stats["mean"], stats["var"]), params, self.epsilon)

"""The in-place dense block: every feature map is stored, normalised and differentiated once.

Forward, a block's features live in ONE buffer: a layer reads the channels before its own and writes
its new ones behind them, so that memory grows linearly with depth where concatenation grows
quadratically. A feature map's batch statistics are the same for every layer that reads it: they are
taken once. Backward there is ONE gradient buffer, to which every layer adds its share; the gradient
through the shared statistics is gathered in two numbers per channel and applied once. Normalised
activations are never kept: they cost one pass to make again.

On a CPU a batch goes through each layer in pieces that stay in the cache.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from densejax.models.convolution import (
    Params,
    Plan,
    conv3x3,
    conv3x3_backward,
    divisor,
    fold,
    from_taps,
    per_platform,
    pointwise,
    pointwise_backward,
    taps,
)
from densejax.models.normalization import (
    Seen,
    Statistics,
    affine,
    norm_gradients,
    normalise,
    pixelwise,
    statistics,
    sum_over,
    through_relu,
    varying_as,
    wide,
)
from densejax.models.regularization import dropout, survive

LayerParams = dict[str, Params]  # "norm1", "conv1" and, with a bottleneck, "norm2", "conv2"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when a block is traced.

    Attributes:
      epsilon: added to BatchNorm's variance.
      axis: mapped axis or axes that batch statistics are averaged over; None: none.
      dropout_rate: of elements after every convolution.
      salts: of each layer: those of its first and last dropout and of its stochastic depth.
      survivals: of each layer: its probability of survival.
      keep_bottlenecks: keep the bottlenecks' outputs for the backward pass; else make them again.
    """

    epsilon: float
    axis: Any
    dropout_rate: float
    salts: tuple[tuple[int, int, int], ...]
    survivals: tuple[float, ...]
    keep_bottlenecks: bool


def train(
    settings: Settings, x: jax.Array, layers: list[LayerParams], keys: jax.Array | None
) -> tuple[jax.Array, Seen, list[Statistics | None]]:
    """The block with batch statistics.

    Args:
      settings: what is fixed.
      x: [batch, height, width, channels], in the precision of the computation.
      layers: float32, of each layer.
      keys: uint32 [batch, 2], one random key per example; None where nothing is random.

    Returns:
      The block's features, x first; their statistics; those of each layer's bottleneck.
    """
    # Parameters vary over devices as x does: the gradients of the block are each device's own.
    layers = varying_as(x, layers)
    features, batch, running, bottlenecks = _train(settings, x, layers, keys)
    return features, Seen(batch, running), bottlenecks


def evaluate(
    epsilon: float,
    survivals: tuple[float, ...],
    x: jax.Array,
    layers: list[LayerParams],
    running: list[LayerParams],
) -> jax.Array:
    """The block with running statistics; a bottleneck's second norm is folded into its 1x1.

    Args:
      epsilon: added to BatchNorm's variance.
      survivals: of each layer: what its new maps are scaled by.
      x: [batch, height, width, channels], in the precision of the computation.
      layers: float32, of each layer.
      running: its statistics, {"norm1": {"mean", "var"}, ...}.

    Returns:
      The block's features, x first.
    """
    return per_platform(functools.partial(_evaluate, epsilon, survivals), x, layers, running)


def _evaluate(epsilon, survivals, plan, x, layers, running):
    features, channels = _widen(x, layers), x.shape[-1]
    for params, stats, survival in zip(layers, running, survivals, strict=True):
        norms = {name: Statistics(pair["mean"], pair["var"]) for name, pair in stats.items()}
        features = _evaluate_layer(epsilon, plan, features, channels, params, norms, survival)
        channels += _growth(params)
    return features


def _evaluate_layer(epsilon, plan, features, channels, params, norms, survival):
    """Features with a layer's new maps written behind; nothing else leaves the cache."""
    first, last = params["conv1"], params[_last_conv(params)]
    last = taps(jax.tree.map(lambda leaf: leaf * survival, last), plan)
    if "conv2" in params:
        first = fold(first, *affine(norms["norm2"], params["norm2"], epsilon))

    def piece(_, written):
        x = written(channels)
        z = _relu(normalise(x, norms["norm1"], params["norm1"], epsilon), x)
        if "conv2" in params:
            z = _relu(pointwise(z, first), x)
        return (), conv3x3(z, last)

    return _in_pieces(plan, features, piece, (), features, channels)[1]


def _widen(x, layers):
    """x with room behind it for all layers' new maps."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, sum(map(_growth, layers)))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(settings, x, layers, keys):
    return _train_forward(settings, x, layers, keys)[0]


def _train_forward(settings, x, layers, keys):
    forward = functools.partial(_forward, settings)
    features, running, outputs, bottlenecks = per_platform(forward, x, layers, keys)
    # What is equal on all devices is returned as if it were not: its cotangents are then each
    # device's own, under shard_map as under pmap, and the backward pass adds them up.
    batch = varying_as(features, running)
    saved = features, running, outputs, bottlenecks, layers, keys
    return (features, batch, running, bottlenecks), saved


def _train_backward(settings, saved, cotangents):
    gradient, of_statistics, *_ = cotangents
    backward = functools.partial(_backward, settings)
    dx, gradients = per_platform(backward, saved, gradient, of_statistics)
    return dx, gradients, None


_train.defvjp(_train_forward, _train_backward)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer of a block in training, and its share of both passes."""

    settings: Settings
    plan: Plan
    keys: jax.Array | None
    index: int
    params: LayerParams
    channels: int  # that it reads

    def normalise(self, number: int, x: jax.Array, stats: Statistics) -> jax.Array:
        """ReLU of the first or second norm of x."""
        return _relu(normalise(x, stats, self.params[f"norm{number}"], self.settings.epsilon), x)

    def drop(self, y: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Dropout after a bottleneck's 1x1 convolution; its own transpose."""
        return dropout(y, self.settings.dropout_rate, self.settings.salts[self.index][0], keys)

    def thin_out(self, y: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Dropout and stochastic depth of the new maps; its own transpose."""
        first, second, survival = self.settings.salts[self.index]
        salt = second if "conv2" in self.params else first
        y = dropout(y, self.settings.dropout_rate, salt, keys)
        return survive(y, self.settings.survivals[self.index], survival, keys)

    def bottleneck(self, features: jax.Array, stats: Statistics, after: jax.Array) -> jax.Array:
        """The output h of the 1x1 convolution; its memory is taken when `after` is there."""

        def piece(cut, _):
            z = self.normalise(1, cut(features, self.channels), stats)
            return (), self.drop(pointwise(z, self.params["conv1"]), cut(self.keys))

        h = _scratch(after, self.params["conv1"]["kernel"].shape[-1])
        return _in_pieces(self.plan, features, piece, (), h)[1]

    def write(self, features: jax.Array, h: jax.Array | None, stats: Statistics) -> jax.Array:
        """Features with the new maps behind, from the bottleneck's h or, without, themselves."""
        number = 1 if h is None else 2
        conv = taps(self.params[_last_conv(self.params)], self.plan)

        def piece(cut, written):
            x = written(self.channels) if h is None else cut(h)
            y = conv3x3(self.normalise(number, x, stats), conv)
            return (), self.thin_out(y, cut(self.keys))

        return _in_pieces(self.plan, features, piece, (), features, self.channels)[1]

    def through_last(self, h, stats, dy, scratch):
        """(gradients of norm2 and conv2, that of norm2's result where its ReLU lets it through)."""
        conv = taps(self.params["conv2"], self.plan)

        def piece(cut, _):
            x, dy_here = cut(h), self.thin_out(cut(dy), cut(self.keys))
            u = self.normalise(2, x, stats)
            dv, dconv = conv3x3_backward(u, dy_here, conv)
            dv, sums = through_relu(u, dv, wide(x) - pixelwise(stats.mean))
            return (dconv, sums), dv

        sums = _zeros(conv, self.params["norm2"])
        (dconv, sums), dv = _in_pieces(self.plan, h, piece, sums, scratch)
        _, norm = norm_gradients(stats, self.params["norm2"], self.settings.epsilon, sums)
        return {"norm2": norm, "conv2": from_taps(dconv, self.plan)}, dv

    def through_norm2(self, h, stats, dnorm):
        """A function of pieces of h and of the gradient dv of norm2's result: that of h."""
        rate = lax.rsqrt(stats.variance + self.settings.epsilon)
        slope = pixelwise(self.params["norm2"]["scale"] * rate)
        sums = jnp.stack([dnorm["bias"], dnorm["scale"] * rate])
        sums = sum_over(sums, self.settings.axis) / _count(self.settings, h)
        of_mean, of_variance = map(pixelwise, sums)

        def backward(h, dv):
            centred = wide(h) - pixelwise(stats.mean)
            return ((wide(dv) - of_mean - centred * of_variance) * slope).astype(h.dtype)

        return backward

    def through_first(self, features, stats, dy, gradient, of_statistics, through_norm2, h):
        """Adds the layer's share to the gradients of the features before it and their statistics.

        dy is the gradient of the new maps or, with a bottleneck, of norm2's result.
        """
        conv = self.params["conv1"] if h is not None else taps(self.params["conv1"], self.plan)

        def piece(cut, written):
            x, keys = cut(features, self.channels), cut(self.keys)
            z = self.normalise(1, x, stats)
            if h is None:
                dy_here = self.thin_out(cut(dy), keys)
                dz, dconv = conv3x3_backward(z, dy_here, conv)
            else:
                dh = self.drop(through_norm2(cut(h), cut(dy)), keys)
                dz, dconv = pointwise_backward(z, dh, conv)
            dz, sums = through_relu(z, dz, wide(x) - pixelwise(stats.mean))
            share, gradient = wide(dz) * slope, written(self.channels)
            if self.plan.shrink:  # a rounded summand would be one more result of XLA:TPU's kernel
                return (dconv, sums), (wide(gradient) + share).astype(x.dtype)
            return (dconv, sums), gradient + share.astype(x.dtype)

        rate = lax.rsqrt(stats.variance + self.settings.epsilon)
        slope = pixelwise(self.params["norm1"]["scale"] * rate)
        sums = _zeros(conv, self.params["norm1"])
        if self.plan.shrink:
            gradient = gradient[..., : self.channels]
        (dconv, sums), gradient = _in_pieces(self.plan, features, piece, sums, gradient)
        dconv = from_taps(dconv, self.plan) if h is None else dconv
        shares, norm = norm_gradients(stats, self.params["norm1"], self.settings.epsilon, sums)
        # The first norm's statistics are shared with all later layers.
        of_statistics = jax.tree.map(
            lambda leaf, share: leaf.at[: self.channels].add(share), of_statistics, shares
        )
        return {"norm1": norm, "conv1": dconv}, gradient, of_statistics


def _layers(settings, plan, layers, keys, channels):
    """The layers of a block, the first of which reads so many channels."""
    for index, params in enumerate(layers):
        yield _Layer(settings, plan, keys, index, params, channels)
        channels += _growth(params)


def _forward(settings: Settings, plan: Plan, x, layers, keys):
    """(features, their statistics, bottlenecks' outputs or None, bottlenecks' statistics)."""
    features = plan.laid_out(_widen(x, layers))
    stats, outputs, bottlenecks = statistics(x, settings.axis), [], []
    for layer in _layers(settings, plan, layers, keys, x.shape[-1]):
        h = inner = None
        if "conv2" in layer.params:
            h = layer.bottleneck(features, stats, features[..., layer.channels - 1 :])
            inner = statistics(h, settings.axis)
        features = layer.write(features, h, stats if inner is None else inner)
        new = features[..., layer.channels : layer.channels + _growth(layer.params)]
        stats = Statistics(
            *map(jnp.concatenate, zip(stats, statistics(new, settings.axis), strict=True))
        )
        outputs.append(h if settings.keep_bottlenecks else None)
        bottlenecks.append(inner)
    return features, stats, outputs, bottlenecks


def _backward(settings: Settings, plan: Plan, saved, gradient, of_statistics):
    """Gradients of the block's input and of its layers' parameters."""
    features, stats, outputs, bottlenecks, layers, keys = saved
    gradient = plan.laid_out(gradient)
    gradients, scratch, last = [], None, features.shape[-1]
    first = last - sum(map(_growth, layers))

    def through_statistics(channels):
        return _through_statistics(settings, features, gradient, stats, of_statistics, channels)

    for layer in reversed(list(_layers(settings, plan, layers, keys, first))):
        dy, last = through_statistics(slice(layer.channels, last)), layer.channels
        h, inner, of_layer = outputs[layer.index], bottlenecks[layer.index], {}
        before = Statistics(*(leaf[: layer.channels] for leaf in stats))
        # Without the barrier XLA would keep what the forward pass made instead of making it again.
        features, h, dy = lax.optimization_barrier((features, h, dy))
        through_norm2 = None
        if inner is not None:
            h = layer.bottleneck(features, before, dy) if h is None else h
            scratch = _scratch(dy, h.shape[-1]) if scratch is None else scratch
            of_layer, dy = layer.through_last(h, inner, dy, scratch)
            through_norm2, scratch = layer.through_norm2(h, inner, of_layer["norm2"]), dy
        share, gradient, of_statistics = layer.through_first(
            features, before, dy, gradient, of_statistics, through_norm2, h
        )
        gradients.append(of_layer | share)
    return through_statistics(slice(0, first)), gradients[::-1]


def _through_statistics(settings, features, gradient, stats, of_statistics, channels):
    """The gradient of some channels, with that through their batch statistics."""
    x, dx = wide(features[..., channels]), wide(gradient[..., channels])
    sums = sum_over(jnp.stack([leaf[channels] for leaf in of_statistics]), settings.axis)
    of_mean, of_variance = map(pixelwise, sums / _count(settings, features))
    dx += of_mean + (x - pixelwise(stats.mean[channels])) * (2 * of_variance)
    return dx.astype(features.dtype)


def _relu(x, like):
    return jnp.maximum(x, 0).astype(like.dtype)


def _last_conv(params):
    return "conv2" if "conv2" in params else "conv1"


def _growth(params):
    return params[_last_conv(params)]["kernel"].shape[-1]


def _count(settings, x):
    """Pixels that a batch statistic is taken over, on all devices."""
    return sum_over(jnp.full((), x.size // x.shape[-1], wide(x).dtype), settings.axis)


def _zeros(conv, norm):
    return jax.tree.map(jnp.zeros_like, (conv, norm))


def _scratch(x, channels):
    """An array to be written, whose contents do not matter; made after x and not before."""
    return jnp.broadcast_to(x[:1, :1, :1, :1], (*x.shape[:3], channels))


def _in_pieces(plan: Plan, features, function, sums, output, channel: int = 0):
    """Applies a function to pieces of the batch that stay in the cache.

    Args:
      plan: says how many bytes of `features` a piece has.
      features: [batch, height, width, channels].
      function: (cut, written) -> (sums, new channels of the output); `cut(x, channels)` is this
        piece of x [batch, ...], its first channels or all; `written(channels)` of the output.
      sums: what the function's sums are added to.
      output: [batch, height, width, channels], written in place.
      channel: of the output, the first that is written.

    Returns:
      The sums over all pieces, and the output.
    """
    batch = features.shape[0]
    size = batch
    if isinstance(batch, int) and batch:  # an exported program may leave it open
        most = batch
        if plan.piece_bytes < math.inf:  # outside of a loop XLA:CPU copies the output of each layer
            most = min(batch / 2, plan.piece_bytes / features.nbytes * batch)
        size = divisor(batch, most)

    def step(number, state):
        sums, output = state
        start = number * size

        def cut(x, channels=None):
            if x is None:
                return None
            lengths = (size, *x.shape[1:-1], channels or x.shape[-1])
            return lax.dynamic_slice(x, (start, *(0,) * (x.ndim - 1)), lengths)

        more, new = function(cut, functools.partial(cut, output))
        output = lax.dynamic_update_slice(output, new, (start, 0, 0, channel))
        return jax.tree.map(jnp.add, sums, more), output

    if size == batch:
        return step(0, (sums, output))
    return lax.fori_loop(0, batch // size, step, (sums, output))

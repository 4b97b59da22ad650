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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from densejax.models.convolution import (
    Params,
    Plan,
    conv3x3,
    conv3x3_backward,
    fold,
    per_platform,
    pointwise,
    pointwise_backward,
)
from densejax.models.normalization import (
    IMAGE_AXES,
    Seen,
    Statistics,
    affine,
    normalise,
    statistics,
    sum_over,
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
    zero = jnp.zeros_like(x, shape=(), dtype=jnp.float32)
    layers = jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), layers)
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
    for layer, stats, survival in zip(layers, running, survivals, strict=True):
        norms = {name: Statistics(pair["mean"], pair["var"]) for name, pair in stats.items()}
        features = _evaluate_layer(epsilon, plan, features, channels, layer, norms, survival)
        channels += _growth(layer)
    return features


def _evaluate_layer(epsilon, plan, features, channels, layer, norms, survival):
    """Features with a layer's new maps written behind; nothing else leaves the cache."""
    first, last = layer["conv1"], layer["conv2" if "conv2" in layer else "conv1"]
    last = jax.tree.map(lambda leaf: leaf * survival, last)
    if "conv2" in layer:
        first = fold(first, *affine(norms["norm2"], layer["norm2"], epsilon))

    def piece(_, features):
        x = features[..., :channels]
        z = _relu(normalise(x, norms["norm1"], layer["norm1"], epsilon), x)
        if "conv2" in layer:
            z = _relu(pointwise(z, first), x)
        return (), conv3x3(z, last, plan.products)

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
    batch = running
    if settings.axis is not None:
        batch = jax.tree.map(lambda leaf: lax.pcast(leaf, settings.axis, to="varying"), running)
    saved = features, running, outputs, bottlenecks, layers, keys
    return (features, batch, running, bottlenecks), saved


def _train_backward(settings, saved, cotangents):
    gradient, of_statistics, *_ = cotangents
    backward = functools.partial(_backward, settings)
    dx, gradients = per_platform(backward, saved, gradient, of_statistics)
    return dx, gradients, None


_train.defvjp(_train_forward, _train_backward)


def _forward(settings: Settings, plan: Plan, x, layers, keys):
    """(features, their statistics, bottlenecks' outputs or None, bottlenecks' statistics)."""
    features = _widen(x, layers)
    stats, outputs, bottlenecks = statistics(x, settings.axis), [], []
    for index, layer in enumerate(layers):
        first, last = len(stats.mean), len(stats.mean) + _growth(layer)
        h = inner = None
        if "conv2" in layer:
            h = _bottleneck(settings, plan, index, features, stats, layer, keys)
            inner = statistics(h, settings.axis)
        features = _new_maps(settings, plan, index, features, h, inner or stats, layer, keys)
        outputs.append(h if settings.keep_bottlenecks else None)
        bottlenecks.append(inner)
        new = statistics(features[..., first:last], settings.axis)
        stats = Statistics(*map(jnp.concatenate, zip(stats, new, strict=True)))
    return features, stats, outputs, bottlenecks


def _bottleneck(settings, plan, index, features, stats, layer, keys):
    """The output of a layer's 1x1 convolution."""
    channels = len(stats.mean)

    def piece(cut, _):
        x = cut(features, channels)
        z = _relu(normalise(x, stats, layer["norm1"], settings.epsilon), x)
        h = pointwise(z, layer["conv1"])
        return (), dropout(h, settings.dropout_rate, settings.salts[index][0], cut(keys))

    h = _scratch(features[..., channels - 1 : channels], layer["conv1"]["kernel"].shape[-1])
    return _in_pieces(plan, features, piece, (), h)[1]


def _new_maps(settings, plan, index, features, h, stats, layer, keys):
    """Features with a layer's new maps, the output of its 3x3 convolution, written behind."""
    channels, number = len(layer["norm1"]["scale"]), 1 if h is None else 2

    def piece(cut, features):
        u = features[..., :channels] if h is None else cut(h)
        u = _relu(normalise(u, stats, layer[f"norm{number}"], settings.epsilon), u)
        y = conv3x3(u, layer[f"conv{number}"], plan.products)
        return (), _thin_out(settings, index, number, y, cut(keys))

    return _in_pieces(plan, features, piece, (), features, channels)[1]


def _thin_out(settings, index, number, y, keys):
    """Dropout and stochastic depth of a layer's new maps; its own transpose."""
    y = dropout(y, settings.dropout_rate, settings.salts[index][number - 1], keys)
    return survive(y, settings.survivals[index], settings.salts[index][2], keys)


def _backward(settings: Settings, plan: Plan, saved, gradient, of_statistics):
    """Gradients of the block's input and of its layers' parameters."""
    features, stats, outputs, bottlenecks, layers, keys = saved
    channels, gradients, scratch = features.shape[-1], [], None
    for index in reversed(range(len(layers))):
        layer, inner, h = layers[index], bottlenecks[index], outputs[index]
        new = slice(channels - _growth(layer), channels)
        channels = new.start
        dy = _through_statistics(settings, features, gradient, stats, of_statistics, new)
        # Without the barrier XLA would keep what the forward pass made instead of making it again.
        features, h, dy = lax.optimization_barrier((features, h, dy))
        before = Statistics(*(leaf[:channels] for leaf in stats))
        of_layer = {}
        if inner is not None:
            if h is None:
                h = _bottleneck(settings, plan, index, features, before, layer, keys)
            if scratch is None:
                scratch = _scratch(dy, h.shape[-1])
            inner_gradients, dy = _through_last(
                settings, plan, index, h, dy, inner, layer, keys, scratch
            )
            scratch = dy
            of_layer |= inner_gradients
        first, of_statistics, gradient = _through_first(
            settings,
            plan,
            index,
            features,
            before,
            h,
            inner,
            dy,
            layer,
            keys,
            gradient,
            of_statistics,
            of_layer,
        )
        gradients.append(of_layer | first)
    new = slice(0, channels)
    dx = _through_statistics(settings, features, gradient, stats, of_statistics, new)
    return dx, gradients[::-1]


def _through_last(settings, plan, index, h, dy, inner, layer, keys, scratch):
    """Gradients of a bottleneck's second norm and convolution, and of that norm's result."""

    def piece(cut, _):
        x = cut(h)
        u = _relu(normalise(x, inner, layer["norm2"], settings.epsilon), x)
        dv, dconv = conv3x3_backward(
            u, _thin_out(settings, index, 2, cut(dy), cut(keys)), layer["conv2"], plan.products
        )
        dv, sums = _through_relu(u, dv, x, inner.mean)
        return (dconv, sums), dv

    zeros = _zeros(layer["conv2"], layer["norm2"])
    (dconv, sums), dv = _in_pieces(plan, h, piece, zeros, scratch)
    rate = lax.rsqrt(inner.variance + settings.epsilon)
    return {"norm2": {"scale": sums["scale"] * rate, "bias": sums["bias"]}, "conv2": dconv}, dv


def _through_first(
    settings,
    plan,
    index,
    features,
    before,
    h,
    inner,
    dy,
    layer,
    keys,
    gradient,
    of_statistics,
    of_layer,
):
    """Adds a layer's share to the gradient of the features before it."""
    channels = len(before.mean)
    if inner is not None:
        rate2 = lax.rsqrt(inner.variance + settings.epsilon)
        slope2 = layer["norm2"]["scale"] * rate2
        sums = jnp.stack([of_layer["norm2"]["bias"], of_layer["norm2"]["scale"] * rate2])
        mean_share, variance_share = sum_over(sums, settings.axis) / _count(settings, h)
    rate = lax.rsqrt(before.variance + settings.epsilon)
    slope = layer["norm1"]["scale"] * rate

    def piece(cut, gradient):
        x, dv = cut(features, channels), cut(dy)
        z = _relu(normalise(x, before, layer["norm1"], settings.epsilon), x)
        if inner is None:
            dv = _thin_out(settings, index, 1, dv, cut(keys))
            dz, dconv = conv3x3_backward(z, dv, layer["conv1"], plan.products)
        else:
            centred = wide(cut(h)) - inner.mean
            dh = ((wide(dv) - mean_share - centred * variance_share) * slope2).astype(x.dtype)
            dh = dropout(dh, settings.dropout_rate, settings.salts[index][0], cut(keys))
            dz, dconv = pointwise_backward(z, dh, layer["conv1"])
        dz, sums = _through_relu(z, dz, x, before.mean)
        return (dconv, sums), gradient[..., :channels] + (wide(dz) * slope).astype(x.dtype)

    zeros = _zeros(layer["conv1"], layer["norm1"])
    (dconv, sums), gradient = _in_pieces(plan, features, piece, zeros, gradient)
    # The first norm's statistics are shared with all later layers.
    of_mean, of_variance = of_statistics
    of_mean = of_mean.at[:channels].add(-slope * sums["bias"])
    of_variance = of_variance.at[:channels].add(-0.5 * slope * rate**2 * sums["scale"])
    gradients = {"norm1": {"scale": sums["scale"] * rate, "bias": sums["bias"]}, "conv1": dconv}
    return gradients, Statistics(of_mean, of_variance), gradient


def _through_statistics(settings, features, gradient, stats, of_statistics, channels):
    """The gradient of some channels, with that through their batch statistics."""
    x, dx = wide(features[..., channels]), wide(gradient[..., channels])
    sums = sum_over(jnp.stack([leaf[channels] for leaf in of_statistics]), settings.axis)
    of_mean, of_variance = sums / _count(settings, features)
    dx += of_mean + (x - stats.mean[channels]) * (2 * of_variance)
    return dx.astype(features.dtype)


def _through_relu(z, dz, x, mean):
    """dz where z is positive, and its sums: with 1 for the bias, with x - mean for the scale."""
    dz = jnp.where(z > 0, dz, 0)
    scale = (wide(dz) * (wide(x) - mean)).sum(IMAGE_AXES)
    return dz, {"scale": scale, "bias": wide(dz).sum(IMAGE_AXES)}


def _relu(x, like):
    return jnp.maximum(x, 0).astype(like.dtype)


def _growth(layer):
    return layer["conv2" if "conv2" in layer else "conv1"]["kernel"].shape[-1]


def _count(settings, x):
    """Pixels that a batch statistic is taken over, on all devices."""
    return sum_over(jnp.full((), x.size // x.shape[-1], jnp.float32), settings.axis)


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
      function: (cut, output) -> (sums, new channels of the output); `cut(x, channels)` is this
        piece of x [batch, ...], its first channels or all.
      sums: what the function's sums are added to.
      output: [batch, height, width, channels], written in place.
      channel: of the output, the first that is written.

    Returns:
      The sums over all pieces, and the output.
    """
    batch = features.shape[0]
    size = batch
    if isinstance(batch, int):  # an exported program may leave it open
        divisors = (size for size in range(1, batch + 1) if batch % size == 0)
        size = max(n for n in divisors if n == 1 or n * features.nbytes <= plan.piece_bytes * batch)

    def step(number, state):
        sums, output = state
        start = number * size

        def cut(x, channels=None):
            if x is None:
                return None
            lengths = (size, *x.shape[1:-1], channels or x.shape[-1])
            return lax.dynamic_slice(x, (start, *(0,) * (x.ndim - 1)), lengths)

        more, new = function(cut, cut(output))
        output = lax.dynamic_update_slice(output, new, (start, 0, 0, channel))
        return jax.tree.map(jnp.add, sums, more), output

    if size == batch:
        return step(0, (sums, output))
    return lax.fori_loop(0, batch // size, step, (sums, output))

"""A block in one buffer, with its gradients written by hand.

In the paper's form every layer reads a concatenation of earlier outputs. Automatic differentiation
keeps all of these concatenations, so that the memory of a dense block grows with the square of the
depth. Here it grows linearly, and every feature map is stored once:

- One buffer. `features` holds the block's input and then all maps of its layers. A layer reads the
  channels of the outputs that its graph names, as ranges: neighbouring outputs form one range. All
  that a layer of a dense block reads is one range.
- Each map's statistics once. Mean and variance over the batch are the same for every layer that
  reads a map, so they are computed when the map is written.
- The backward pass takes the layers in reverse order. `d_features` is the gradient of `features`; a
  layer adds its part to the channels that it read. When the pass comes to a layer, all readers of
  this layer have added their parts. The gradient of its maps then lacks only the path through their
  statistics. That path is summed up too, as two numbers for each channel (`d_stats`). It is added
  to the gradient of the maps at this moment, once for all readers.
- Norms are computed again. The forward pass keeps `features`, the statistics and the outputs of the
  1x1 convolutions (`hidden`). It keeps no output of a norm, ReLU or dropout.

A layer is norm1-ReLU-conv1, or with a bottleneck norm1-ReLU-conv1-norm2-ReLU-conv2, where `hidden`
is the output of conv1. `d_x` always means the gradient of x. On a CPU a batch goes through a layer
in pieces that stay in the processor's cache.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from densejax.models.connections import Graph
from densejax.models.convolution import (
    Params,
    Plan,
    arrange_kernel,
    cache_bytes,
    conv3x3,
    conv3x3_backward,
    divisor,
    fold,
    per_platform,
    pointwise,
    pointwise_backward,
    restore_kernel,
)
from densejax.models.normalization import (
    PrecomputedStatistics,
    Statistics,
    affine,
    at_least_float32,
    mean_over,
    norm_gradients,
    normalise,
    per_channel,
    relu_backward,
    statistics,
    sum_over,
    varying_like,
)
from densejax.models.regularization import dropout, stochastic_depth
from densejax.models.sharding import EXAMPLES, WHOLE, by_device

LayerParams = dict[str, Params]  # "norm1", "conv1" and, with a bottleneck, "norm2", "conv2"
Ranges = tuple[tuple[int, int], ...]  # (first channel, number of channels) of each


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when a block is traced.

    Attributes:
      graph: what each layer reads and the block emits.
      epsilon: added to BatchNorm's variance.
      axis: mapped axis or axes that batch statistics are averaged over; None: none.
      dropout_rate: share of the elements that are dropped after every convolution.
      seeds: for each layer, those of its first and last dropout and of its stochastic depth.
      survivals: for each layer, the probability that an example keeps its new maps; in evaluation,
        the factor that scales them.
      keep_hidden: keep the outputs of the 1x1 convolutions; otherwise the backward pass computes
        them again.
    """

    graph: Graph
    epsilon: float
    axis: Any
    dropout_rate: float
    seeds: tuple[tuple[int, int, int], ...]
    survivals: tuple[float, ...]
    keep_hidden: bool


def evaluate(
    settings: Settings, x: jax.Array, layers: list[LayerParams], running: list[LayerParams]
) -> jax.Array:
    """The outputs that the block emits, with running statistics.

    Args:
      settings: what is fixed; `axis`, the dropout and `keep_hidden` are not read.
      x: [batch, height, width, channels], in the precision of the computation.
      layers: the parameters of each layer, float32.
      running: the running statistics of each layer, {"norm1": {"mean", "var"}, ...}.
    """

    def compute(plan, x, layers, running):
        # There is no sum along rows, and fewer arrays are in use than in training. On two cores of
        # an Intel Xeon with a cache of 2 MB each, DenseNet-BC-100 took 0.31 s with pieces of 16 MB
        # and 0.42 s with 2 MB. With 0.5 MB each, on an AMD EPYC, it took 0.72 and 0.59 s, and
        # 0.52 s with 4 MB. So these pieces have about four times the size of the caches. If each
        # core is a device, their size hardly matters: 0.42 to 0.44 s with 0.25 to 4 MB there.
        size = plan.piece_bytes * cache_bytes() / 2**19
        plan = dataclasses.replace(plan, channels_first=False, piece_bytes=size)
        features = _with_room(x, settings.graph)
        parts = _layers(settings, plan, layers, None, x.shape[-1])
        for layer, stats in zip(parts, running, strict=True):
            features = layer.evaluate(features, stats)
        return _select(features, _ranges(settings.graph, x.shape[-1])[1])

    def on_one(axes, *arguments):
        return per_platform(compute, *arguments)

    return by_device(on_one, (x, layers, running), (EXAMPLES, WHOLE, WHOLE), EXAMPLES)


def train(
    settings: Settings, x: jax.Array, layers: list[LayerParams], keys: jax.Array | None
) -> tuple[jax.Array, PrecomputedStatistics, list[dict[str, Statistics]]]:
    """The block with batch statistics.

    Args:
      settings: what is fixed.
      x: [batch, height, width, channels], in the precision of the computation.
      layers: the parameters of each layer, float32.
      keys: uint32 [batch, 2], one random key per example; None where nothing is random.

    Returns:
      The outputs that the block emits; the statistics of these outputs; and, for each layer, the
      statistics of its norms by name.
    """

    def on_one(axes, x, layers, keys):
        own = dataclasses.replace(settings, axis=axes or settings.axis)
        features, stats, norms = _train(own, x, varying_like(x, layers), keys)
        # Outside, these statistics have one gradient. The mean gives each device its part of this
        # gradient, and the backward pass adds the parts up.
        return features, stats._replace(batch=mean_over(stats.batch, axes)), norms

    if settings.axis is not None:
        return on_one(None, x, layers, keys)  # mapped over devices already
    return by_device(
        on_one, (x, layers, keys), (EXAMPLES, WHOLE, EXAMPLES), (EXAMPLES, WHOLE, WHOLE)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(settings, x, layers, keys):
    return _train_forward(settings, x, layers, keys)[0]


def _train_forward(settings, x, layers, keys):
    forward = functools.partial(_forward, settings)
    features, stats, hidden, hidden_stats = per_platform(forward, x, layers, keys)
    reads, emits = _ranges(settings.graph, x.shape[-1])
    emitted = _statistics_of(stats, emits)
    norms = [
        {"norm1": _statistics_of(stats, read), "norm2": of_hidden}
        for read, of_hidden in zip(reads, hidden_stats, strict=True)
    ]
    # Gradients flow only through the first of the two. Each device has its own gradient there, and
    # the backward pass adds them up.
    both = PrecomputedStatistics(varying_like(features, emitted), emitted)
    saved = features, stats, hidden, hidden_stats, layers, keys
    return (_select(features, emits), both, norms), saved


def _train_backward(settings, saved, gradients):
    d_features, d_stats, _ = gradients
    backward = functools.partial(_backward, settings)
    dx, d_layers = per_platform(backward, saved, d_features, d_stats.batch)
    return dx, d_layers, None


_train.defvjp(_train_forward, _train_backward)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer of a block: its evaluation, and the parts of its forward and backward pass."""

    settings: Settings
    plan: Plan
    keys: jax.Array | None
    index: int
    params: LayerParams
    read: Ranges
    new: tuple[int, int]  # the range of its new maps

    @property
    def last_conv(self) -> Params:
        """The parameters of the 3x3 convolution."""
        return self.params.get("conv2", self.params["conv1"])

    @property
    def place(self) -> tuple[Any, int]:
        """The range of its new maps, for use inside of loops; the plan may hide it from XLA."""
        first, width = self.new
        if self.plan.shared_code:
            first = lax.optimization_barrier(jnp.asarray(first))
        return first, width

    def norm_relu(self, number: int, x: jax.Array, stats: Statistics) -> jax.Array:
        """ReLU of the first or second norm of x."""
        return _relu(normalise(x, stats, self.params[f"norm{number}"], self.settings.epsilon), x)

    def evaluate(self, features: jax.Array, running: LayerParams) -> jax.Array:
        """Features with the new maps, by running statistics; norm2 is folded into the 1x1."""
        norms = {name: Statistics(pair["mean"], pair["var"]) for name, pair in running.items()}
        survival, epsilon = self.settings.survivals[self.index], self.settings.epsilon
        first, last = self.params["conv1"], self.last_conv
        last = arrange_kernel(jax.tree.map(lambda leaf: leaf * survival, last), self.plan)
        if "conv2" in self.params:
            first = fold(first, *affine(norms["norm2"], self.params["norm2"], epsilon))

        def part(piece, features):
            x = piece(features, self.read)
            z = self.norm_relu(1, x, norms["norm1"])
            if "conv2" in self.params:
                z = _relu(pointwise(z, first), x)
            return (), conv3x3(z, last)

        return _in_pieces(self.plan, features, part, (), features, (self.place,))[1]

    def drop_hidden(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Dropout after a bottleneck's 1x1 convolution; it is its own transpose."""
        return dropout(x, self.settings.dropout_rate, self.settings.seeds[self.index][0], keys)

    def drop_new(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Dropout and stochastic depth of the new maps; they are their own transpose."""
        first, second, survival = self.settings.seeds[self.index]
        seed = second if "conv2" in self.params else first
        x = dropout(x, self.settings.dropout_rate, seed, keys)
        return stochastic_depth(x, self.settings.survivals[self.index], survival, keys)

    def hidden(self, features: jax.Array, stats: Statistics, after: jax.Array) -> jax.Array:
        """The output of the 1x1 convolution, made after the array `after`."""
        output = _unset(features, self.params["conv1"]["kernel"].shape[-1], after)

        def part(piece, _):
            z = self.norm_relu(1, piece(features, self.read), stats)
            return (), self.drop_hidden(pointwise(z, self.params["conv1"]), piece(self.keys))

        return _in_pieces(self.plan, features, part, (), output)[1]

    def write(self, features: jax.Array, hidden: jax.Array | None, stats: Statistics) -> jax.Array:
        """Features with the new maps, made from `hidden` or, without a bottleneck, from features.

        `stats` are the statistics of the array that the maps are made from.
        """
        number = 1 if hidden is None else 2
        conv = arrange_kernel(self.last_conv, self.plan)

        def part(piece, features):
            x = piece(features, self.read) if hidden is None else piece(hidden)
            y = conv3x3(self.norm_relu(number, x, stats), conv)
            return (), self.drop_new(y, piece(self.keys))

        return _in_pieces(self.plan, features, part, (), features, (self.place,))[1]

    def d_new(self, features, stats, d_stats):
        """A function from `piece` and the features' gradient to that of the last convolution.

        The gradient of the new maps is completed inside of the loop, where it is read, so that one
        kernel serves all layers.
        """
        new, place = (self.new,), (self.place,)
        mean, d_stats = _select(stats.mean, new), _select(d_stats, new)
        complete = _through_statistics(self.settings, features, mean, d_stats)

        def gradient(piece, d_features):
            dy = complete(piece(features, place), piece(d_features, place))
            return self.drop_new(dy, piece(self.keys))

        return gradient

    def backward_conv2(self, hidden, stats, d_new, d_features, output):
        """(gradients of norm2 and conv2, that before norm2's ReLU), from that of the features."""
        conv = arrange_kernel(self.params["conv2"], self.plan)

        def part(piece, _):
            x, dy = piece(hidden), d_new(piece, d_features)
            z = self.norm_relu(2, x, stats)
            dz, d_conv = conv3x3_backward(z, dy, conv)
            dz, sums = relu_backward(z, dz, at_least_float32(x) - per_channel(stats.mean))
            return (d_conv, sums), dz

        sums = jax.tree.map(jnp.zeros_like, (conv, self.params["norm2"]))
        (d_conv, sums), dz = _in_pieces(self.plan, hidden, part, sums, output)
        _, d_norm = norm_gradients(stats, self.params["norm2"], self.settings.epsilon, sums)
        return {"norm2": d_norm, "conv2": restore_kernel(d_conv, self.plan)}, dz

    def backward_norm2(self, hidden, stats, dz, d_norm):
        """A function from `piece` to the gradient of the 1x1 convolution; dz is before the ReLU."""
        rate = lax.rsqrt(stats.variance + self.settings.epsilon)
        slope = per_channel(self.params["norm2"]["scale"] * rate)
        sums = jnp.stack([d_norm["bias"], d_norm["scale"] * rate])
        sums = sum_over(sums, self.settings.axis) / _pixels(self.settings, hidden)
        through_mean, through_variance = map(per_channel, sums)

        def gradient(piece, _):
            x = piece(hidden)
            centred = at_least_float32(x) - per_channel(stats.mean)
            dx = at_least_float32(piece(dz)) - through_mean - centred * through_variance
            return self.drop_hidden((dx * slope).astype(x.dtype), piece(self.keys))

        return gradient

    def backward_conv1(self, features, stats, d_output, d_features, d_stats):
        """(gradients of norm1 and conv1, `d_features`, `d_stats`), with this layer's part added.

        `d_output` is a function from `piece` and `d_features` to the convolution's gradient.
        """
        conv, backward = self.params["conv1"], pointwise_backward
        if not (bottleneck := "conv2" in self.params):
            conv, backward = arrange_kernel(conv, self.plan), conv3x3_backward

        def part(piece, output):
            x = piece(features, self.read)
            z = self.norm_relu(1, x, stats)
            # `output` has no gradient of the new maps if it is a new array. If it is updated in
            # place, XLA would copy an array that is read beside it.
            gradients = d_features if self.plan.new_gradients else output
            dz, d_conv = backward(z, d_output(piece, gradients), conv)
            dz, sums = relu_backward(z, dz, at_least_float32(x) - per_channel(stats.mean))
            dx, before = at_least_float32(dz) * slope, piece(output, self.read)
            if self.plan.new_gradients:  # XLA:TPU would write a rounded dx as one more array
                return (d_conv, sums), (at_least_float32(before) + dx).astype(x.dtype)
            return (d_conv, sums), before + dx.astype(x.dtype)

        rate = lax.rsqrt(stats.variance + self.settings.epsilon)
        slope = per_channel(self.params["norm1"]["scale"] * rate)
        sums = jax.tree.map(jnp.zeros_like, (conv, self.params["norm1"]))
        output = d_features[..., : self.new[0]] if self.plan.new_gradients else d_features
        (d_conv, sums), output = _in_pieces(self.plan, features, part, sums, output, self.read)
        d_conv = d_conv if bottleneck else restore_kernel(d_conv, self.plan)
        parts, d_norm = norm_gradients(stats, self.params["norm1"], self.settings.epsilon, sums)
        d_stats = _write(d_stats, _select(d_stats, self.read) + jnp.stack(parts), self.read)
        return {"norm1": d_norm, "conv1": d_conv}, output, d_stats


def _layers(settings, plan, layers, keys, channels):
    """The layers of a block whose input has so many channels."""
    reads, _ = _ranges(settings.graph, channels)
    widths = settings.graph.widths
    for index, (params, read, width) in enumerate(zip(layers, reads, widths, strict=True)):
        yield _Layer(settings, plan, keys, index, params, read, (channels, width))
        channels += width


def _forward(settings: Settings, plan: Plan, x, layers, keys):
    """(features, their statistics, each layer's hidden maps or None, their statistics)."""
    features = plan.with_layout(_with_room(x, settings.graph))
    stats = new_stats = statistics(x, settings.axis)
    all_hidden, all_hidden_stats = [], []
    for layer in _layers(settings, plan, layers, keys, x.shape[-1]):
        hidden = hidden_stats = None
        stats_read = _statistics_of(stats, layer.read)
        if "conv2" in layer.params:
            hidden = layer.hidden(features, stats_read, new_stats.variance)
            hidden_stats = statistics(hidden, settings.axis)
        features = layer.write(features, hidden, stats_read if hidden is None else hidden_stats)
        new_stats = statistics(_select(features, (layer.new,)), settings.axis)
        stats = Statistics(*map(jnp.concatenate, zip(stats, new_stats, strict=True)))
        all_hidden.append(hidden if settings.keep_hidden else None)
        all_hidden_stats.append(hidden_stats)
    return features, stats, all_hidden, all_hidden_stats


def _backward(settings: Settings, plan: Plan, saved, d_features, d_stats):
    """Gradients of the block's input and of its layers' parameters."""
    features, stats, all_hidden, all_hidden_stats, layers, keys = saved
    channels = features.shape[-1] - sum(settings.graph.widths)
    _, emits = _ranges(settings.graph, channels)
    d_stats = jnp.stack(d_stats)
    if emits != ((0, features.shape[-1]),):
        d_features = _write(jnp.zeros_like(features), d_features, emits)
        d_stats = _write(jnp.zeros((2, features.shape[-1]), d_stats.dtype), d_stats, emits)
    d_features = plan.with_layout(d_features)
    d_layers, buffer = [], None
    for layer in reversed(list(_layers(settings, plan, layers, keys, channels))):
        hidden, hidden_stats = all_hidden[layer.index], all_hidden_stats[layer.index]
        stats_read = _statistics_of(stats, layer.read)
        # Without the barrier XLA would keep what the forward pass made instead of making it again.
        features, hidden, d_features = lax.optimization_barrier((features, hidden, d_features))
        d_output, d_conv2 = layer.d_new(features, stats, d_stats), {}
        if hidden_stats is not None:
            if hidden is None:
                hidden = layer.hidden(features, stats_read, d_features)
            if buffer is None or buffer.shape != hidden.shape:  # one for all layers of a width
                buffer = _unset(features, hidden.shape[-1], d_features)
            d_conv2, buffer = layer.backward_conv2(
                hidden, hidden_stats, d_output, d_features, buffer
            )
            d_output = layer.backward_norm2(hidden, hidden_stats, buffer, d_conv2["norm2"])
        d_conv1, d_features, d_stats = layer.backward_conv1(
            features, stats_read, d_output, d_features, d_stats
        )
        d_layer = d_conv2 | d_conv1
        if plan.channels_first:  # without it XLA:GPU would keep this layer's arrays until the end
            d_features, d_stats, d_layer = lax.optimization_barrier((d_features, d_stats, d_layer))
        d_layers.append(d_layer)
    complete = _through_statistics(settings, features, stats.mean[:channels], d_stats[:, :channels])
    return complete(features[..., :channels], d_features[..., :channels]), d_layers[::-1]


def _through_statistics(settings, features, mean, d_stats):
    """A function that completes gradients of features by that through their batch statistics."""
    sums = sum_over(d_stats, settings.axis) / _pixels(settings, features)
    through_mean, through_variance = map(per_channel, sums)

    def complete(x, dx):
        centred = at_least_float32(x) - per_channel(mean)
        dx = at_least_float32(dx) + (through_mean + centred * (2 * through_variance))
        return dx.astype(x.dtype)

    return complete


def _with_room(x, graph):
    """x with room behind it for all layers' new maps."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, sum(graph.widths))))


def _ranges(graph: Graph, channels: int) -> tuple[list[Ranges], Ranges]:
    """(what each layer reads, what the block emits) in the buffer; the input has `channels`.

    Outputs that follow each other in the buffer are one range.
    """
    widths = (channels, *graph.widths)
    starts = list(itertools.accumulate(widths, initial=0))

    def merged(outputs):
        ranges = []
        for output in outputs:
            first, size = starts[output], widths[output]
            if ranges and sum(ranges[-1]) == first:
                first, size = ranges[-1][0], ranges.pop()[1] + size
            ranges.append((first, size))
        return tuple(ranges)

    return [merged(read) for read in graph.reads], merged(graph.emits)


def _select(x, ranges: Ranges):
    """The channels of x in some ranges, one after the other."""
    if ranges == ((0, x.shape[-1]),):
        return x
    parts = [x[..., first : first + size] for first, size in ranges]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _statistics_of(stats: Statistics, ranges: Ranges) -> Statistics:
    return Statistics(*(_select(leaf, ranges) for leaf in stats))


def _write(x, new, ranges: Ranges, start: Any = 0):
    """x with new channels in some ranges, of the examples from `start` on."""
    done = 0
    for first, size in ranges:
        index = (start, *(0,) * (x.ndim - 2), first)
        part = new[..., done : done + size]
        x = lax.dynamic_update_slice(x, part, index, allow_negative_indices=False)
        done += size
    return x


def _relu(x, like):
    return jnp.maximum(x, 0).astype(like.dtype)


def _pixels(settings, x):
    """The number of pixels that a batch statistic is taken over, on all devices."""
    pixels = jnp.full((), x.size // x.shape[-1], at_least_float32(x).dtype)
    return sum_over(pixels, settings.axis)


def _unset(x, channels, after):
    """An array like x to be overwritten; it takes no memory before `after` is computed."""
    value = after[(slice(1),) * after.ndim]
    value = varying_like(x, value.reshape(len(value), 1, 1, 1))  # of an empty batch, it is empty
    return jnp.broadcast_to(value.astype(x.dtype), (*x.shape[:3], channels))


def _in_pieces(plan: Plan, features, function, sums, output, written: Ranges = ()):
    """Applies a function to pieces of the batch that stay in the cache.

    Args:
      plan: says how many bytes of `features` a piece has.
      features: [batch, height, width, channels].
      function: (piece, output) -> (terms, new channels of the output). `piece(array, ranges)` gives
        the current examples of an array [batch, ...], with the channels in `ranges` or with all.
      sums: what the terms of all pieces are added to.
      output: [batch, height, width, channels], updated in place.
      written: the ranges of channels of the output that are written; (): all.

    Returns:
      The sums over all pieces, and the output.
    """
    batch = features.shape[0]
    size = _piece_size(plan, features)

    def step(number, state):
        sums, output = state
        start = number * size

        def piece(array, ranges=()):
            if array is None:
                return None
            zeros = (0,) * (array.ndim - 2)
            parts = [
                lax.dynamic_slice(
                    array,
                    (start, *zeros, first),
                    (size, *array.shape[1:-1], channels),
                    allow_negative_indices=False,
                )
                for first, channels in ranges or ((0, array.shape[-1]),)
            ]
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

        terms, new = function(piece, output)
        output = _write(output, new, written or ((0, output.shape[-1]),), start)
        return jax.tree.map(jnp.add, sums, terms), output

    if size == batch:
        return step(0, (sums, output))
    return lax.fori_loop(0, batch // size, step, (sums, output))


def _piece_size(plan, features):
    """The number of examples in a piece: a divisor of the batch size."""
    batch, most = features.shape[0], plan.most_bytes()
    # An exported program may leave the batch size open, and a batch may be empty.
    if most == math.inf or not isinstance(batch, int) or not batch:
        return batch
    # At least two pieces, to have a loop: outside of one XLA:CPU copies the output of each layer.
    return divisor(batch, min(batch / 2, most / features.nbytes * batch))

"""How the layers of a block are joined: every connection pattern is one function.

A block has an input, which counts as output 0, and layers 1, 2, ..., n. The output of a layer has
the number of the layer. There are two tables of patterns:

- `CONCATENATING`, for DenseNet: a function says which outputs each layer reads. A layer reads their
  concatenation.
- `ADDING`, for ResNet with pre-activation: a function computes a stage from its layers. It adds
  outputs up, often with weights that are learned.

`connect` names a pattern and, after colons, its options: "window:size=3".
"""

import dataclasses
import functools
import inspect
import random as standard_random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from densejax.config import UserError, did_you_mean, parse_pairs
from densejax.models.layers import Layers
from densejax.models.normalization import at_least_float32, per_channel

Connect = str | tuple  # a pattern's name and options, or a graph: see `graph`


@dataclasses.dataclass(frozen=True)
class Graph:
    """Which outputs, by their numbers, the layers of a block read.

    Attributes:
      reads: for each layer, the outputs that it reads, in the order of its concatenation.
      emits: the outputs that the block gives to what follows it; None: all.
      widths: the feature maps that each layer makes; None: the growth rate.
    """

    reads: Sequence[Sequence[int]]
    emits: Sequence[int] | None = None
    widths: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Reader:
    """A place where a network reads outputs of a block as one concatenation.

    Attributes:
      name: "layer1", "layer2", ..., or the name of what follows the block.
      reads: the outputs, in the order of the concatenation.
      module: path of the module that gets the concatenation.
      kernel: path of the first layer whose kernel mixes the channels of the concatenation.
    """

    name: str
    reads: Sequence[int]
    module: str
    kernel: str


def readers(
    graphs: Mapping[str, Graph],
    layer: Callable[[str, int], tuple[str, str]],
    before_classifier: str | None,
) -> dict[str, list[Reader]]:
    """The readers of each block's outputs: its layers, then a transition or the classifier.

    A transition follows each block but the last, and a classifier follows the last.

    Args:
      graphs: of the blocks, by name.
      layer: a function of (block, n) that gives `module` and `kernel` of the block's n-th layer.
      before_classifier: path of the module that gets what the last block emits; "": no classifier;
        None: a transition follows the last block, too.
    """
    found = {}
    for number, (block, graph) in enumerate(graphs.items(), 1):
        found[block] = [
            Reader(f"layer{n}", read, *layer(block, n)) for n, read in enumerate(graph.reads, 1)
        ]
        if number < len(graphs) or before_classifier is None:
            name = f"transition{number}"
            found[block].append(Reader(name, graph.emits, name, f"{name}/conv"))
        elif before_classifier:
            end = Reader("classifier", graph.emits, before_classifier, "head/classifier")
            found[block].append(end)
    return found


def dense(depth: int, growth_rate: int) -> Graph:
    """A layer reads all outputs before it (Huang et al., arXiv:1608.06993)."""
    return Graph([range(layer) for layer in range(1, depth + 1)])


def chain(depth: int, growth_rate: int) -> Graph:
    """A layer reads the one before it, and the block gives only its last output."""
    return Graph([(layer - 1,) for layer in range(1, depth + 1)], emits=(depth,))


def one_shot(depth: int, growth_rate: int) -> Graph:
    """As a chain, but the block gives all outputs (Lee et al., arXiv:1904.09730, section 3.2)."""
    return Graph([(layer - 1,) for layer in range(1, depth + 1)])


def window(depth: int, growth_rate: int, size: int = 3) -> Graph:
    """A layer reads the last `size` outputs ("local dense", arXiv:1806.01935)."""
    return Graph([range(max(0, layer - size), layer) for layer in range(1, depth + 1)])


def exponential(depth: int, growth_rate: int) -> Graph:
    """Layer l reads the outputs l - 1, l - 2, l - 4, l - 8 and so on: a few, in growing steps.

    What follows the block reads such outputs, too. This is SparseNet (Zhu et al., ECCV 2018).
    Within a block, Log-DenseNet (arXiv:1711.00002) reads the same outputs.
    """

    def before(layer):
        return [layer - 2**power for power in range(layer.bit_length()) if layer >= 2**power][::-1]

    return Graph([before(layer) for layer in range(1, depth + 1)], emits=before(depth + 1))


def hardnet(depth: int, growth_rate: int, multiplier: float = 1.7) -> Graph:
    """Layer l reads output l - 2^j for each j where 2^j divides l, the nearest output first.

    A layer that reads r outputs makes k m^(r - 1) feature maps, rounded to an even number. The
    block gives the outputs of the odd layers and of the last one. HarDNet, Chao et al.,
    arXiv:1909.00948.
    """
    if not 1 <= multiplier <= 10:
        raise ValueError(f"multiplier = {multiplier} must be from 1 to 10")
    reads = []
    for layer in range(1, depth + 1):
        powers = [power for power in range(layer.bit_length()) if layer % 2**power == 0]
        reads.append([layer - 2**power for power in powers])
    widths = [growth_rate * multiplier ** (len(read) - 1) for read in reads]
    emits = [layer for layer in range(1, depth + 1) if layer % 2 or layer == depth]
    return Graph(reads, emits, [2 * int(int(width + 1) / 2) for width in widths])


def random(depth: int, growth_rate: int, seed: int = 0, probability: float = 0.5) -> Graph:
    """A layer reads the one before it, and each output before that with a probability.

    Random graphs as networks: Xie et al., arXiv:1904.01569. Blocks of one depth have one graph.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability = {probability} must be from 0 to 1")
    draw = standard_random.Random(seed).random
    return Graph(
        [
            [source for source in range(layer) if draw() < probability or source == layer - 1]
            for layer in range(1, depth + 1)
        ]
    )


CONCATENATING: dict[str, Callable[..., Graph]] = {
    "dense": dense,
    "chain": chain,
    "one_shot": one_shot,
    "window": window,
    "exponential": exponential,
    "hardnet": hardnet,
    "random": random,
}


def graph(connect: Connect, depth: int, growth_rate: int) -> Graph:
    """The graph of a block, with every field set.

    A graph may be written in the configuration: what each layer reads, then what the block gives.
    ((0,), (0, 1), (1, 2)) is a block of two layers. Layer 1 reads output 0, layer 2 reads the
    outputs 0 and 1, and what follows the block reads the outputs 1 and 2.

    Args:
      connect: a name in `CONCATENATING` with its options, or such a graph.
      depth: number of layers.
      growth_rate: k in the paper, the feature maps that a layer adds.

    Raises:
      UserError: an unknown pattern or option, or a graph that no block can have.
    """

    def require(holds, what):
        if not holds:
            raise UserError(f"model.connect = {connect!r}: {what}")

    if isinstance(connect, str):
        make = pattern(connect, CONCATENATING)
        try:
            found = make(depth, growth_rate)
        except ValueError as error:
            raise UserError(f"model.connect = {connect!r}: {error}") from error
    else:
        needed = f"for a block of {depth} layers give {depth + 1}, what each layer reads and then"
        needed += " what the block gives"
        require(len(connect) == depth + 1, f"has {len(connect)} tuples; {needed}")
        require(all(isinstance(read, tuple) for read in connect), "each part is a tuple, as (0,)")
        found = Graph(connect[:-1], emits=connect[-1])
    reads = tuple(map(tuple, found.reads))
    emits = tuple(range(depth + 1) if found.emits is None else found.emits)
    widths = tuple((growth_rate,) * depth if found.widths is None else found.widths)
    require(len(reads) == len(widths) == depth, f"describes no block of {depth} layers")
    readers = [*((f"layer {layer}", layer, read) for layer, read in enumerate(reads, 1))]
    for name, outputs, read in (*readers, ("what follows the block", depth + 1, emits)):
        known = all(type(source) is int and 0 <= source < outputs for source in read)
        allowed = "0" if outputs == 1 else f"from 0 to {outputs - 1}"
        require(read and known, f"{name} reads {read}; it can read the outputs {allowed}")
        require(len(set(read)) == len(read), f"{name} reads {read}: give each output once")
    used = {source for read in (*reads, emits) for source in read}
    for layer, width in enumerate(widths, 1):
        require(layer in used, f"nothing reads layer {layer}")
        require(width >= 1, f"layer {layer} makes {width} feature maps; at least 1 is needed")
    return Graph(reads, emits, widths)


def pattern(connect: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that `connect` names in a table, with its options set.

    Raises:
      UserError: an unknown pattern or option; the message lists what is allowed.
    """
    name, colon, options = connect.partition(":")
    if colon and not options:
        raise UserError(f"model.connect = {connect!r}: give an option after ':', or leave it out")
    if name not in table:
        hint = did_you_mean(name, table)
        raise UserError(f"model.connect = {connect!r}{hint}: allowed are {', '.join(table)}")
    parameters = inspect.signature(table[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    values = parse_pairs(options, ":", defaults, f"model.connect = {connect!r}: option")
    for option, value in values.items():
        if type(value) is int and value < 1 <= defaults[option]:
            raise UserError(f"model.connect = {connect!r}: {option} = {value} must be at least 1")
    return functools.partial(table[name], **values)


Layer = Callable[[jax.Array], jax.Array]  # maps features to features of the same shape


class Stage(nn.Module):
    """The layers of a stage, all of one width, joined by a pattern of `ADDING`.

    Attributes:
      connect: the pattern's name and options.
      layers: how the network builds its layers.
    """

    connect: str
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
        """Maps x [batch, height, width, channels] to features of the same shape."""
        return pattern(self.connect, ADDING)(self, x, layers)

    def weights(self, name: str, initial: Any) -> jax.Array:
        """Learned weights in float32, with their initial values."""
        return self.param(name, lambda _: jnp.asarray(initial, jnp.float32))


def _combine(weights: Iterable[Any], features: Sequence[jax.Array]) -> jax.Array:
    """The weighted sum of features: added up in float32, returned in the features' precision."""
    terms = (w * at_least_float32(x) for w, x in zip(weights, features, strict=True))
    return functools.reduce(jnp.add, terms).astype(features[0].dtype)


def coefficients(stage: Stage, variables: Any, depth: int, channels: int) -> jax.Array:
    """The weight of each output in what each layer of a stage reads, and in what the stage gives.

    The output of a layer is H alone, without what the pattern adds to it. The weights are the
    derivatives at features of 0: there the dynamic part of hyper-connections is 0.

    Returns:
      [readers, channels, outputs, channels]; the last reader is what follows the stage.
    """

    def read(outputs):
        seen = []

        def layer(output, x):
            seen.append(x)
            return output

        layers = [functools.partial(layer, output[None, None, None]) for output in outputs[1:]]
        seen.append(stage.apply(variables, outputs[0][None, None, None], layers))
        return jnp.stack(seen)[:, 0, 0, 0]

    return jax.jit(jax.jacfwd(read))(jnp.zeros((depth + 1, channels)))


@functools.cache
def adding_graph(connect: str, depth: int) -> Graph:
    """Which outputs each layer of a stage can read, through its weights, in an `ADDING` pattern."""
    stage, x = Stage(connect, Layers(train=False), parent=None), jnp.zeros((1, 1, 1, 1))
    same = [lambda x: x] * depth
    shapes = jax.eval_shape(lambda: stage.init(jax.random.key(0), x, same))
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), shapes)  # none is zero
    reads = np.abs(coefficients(stage, variables, depth, 1)[:, 0, :, 0]) > 0
    *reads, emits = (tuple(np.flatnonzero(row).tolist()) for row in reads)
    return Graph(tuple(reads), emits, (1,) * depth)


def add(stage: Stage, x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
    """A layer reads the sum of all outputs before it: ResNet (He et al., arXiv:1512.03385)."""
    for layer in layers:
        x = x + layer(x)
    return x


def plain(stage: Stage, x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
    """A layer reads the one before it: no shortcuts."""
    for layer in layers:
        x = layer(x)
    return x


def weighted(
    stage: Stage, x: jax.Array, layers: Sequence[Layer], dilation: int = 1, period: int = 1
) -> jax.Array:
    """Depth-weighted averages of all outputs (DenseFormer, Pagliardini et al., arXiv:2402.02622).

    The layers are residual. After every `period` layers, the output is replaced by a weighted sum
    of this output and of earlier ones: every `dilation`-th, counted back from it.
    """
    outputs = [x]
    for number, layer in enumerate(layers, 1):
        x = x + layer(x)
        outputs.append(x)
        if number % period == 0:
            sources = outputs[number % dilation :: dilation]
            start = np.eye(len(sources))[-1]  # the last one alone: a residual network
            x = _combine(stage.weights(f"weights{number}", start), sources)
    return x


def laurel(stage: Stage, x: jax.Array, layers: Sequence[Layer], rank: int = 4) -> jax.Array:
    """x_l = a H(x_{l-1}) + sum_j g_j x_j + B A x_{l-1}, with A and B of a low rank.

    H is the layer, and a and g_j are learned numbers. These are all three forms of LAuReL (Menghani
    et al., arXiv:2411.07501) in one; B starts at 0.
    """
    outputs, channels = [x], x.shape[-1]
    for number, layer in enumerate(layers, 1):
        start = np.eye(number + 1)[-1] + np.eye(number + 1)[-2]
        initial = nn.initializers.lecun_normal()
        down = stage.param(f"down{number}", initial, (channels, rank)).astype(x.dtype)
        up = stage.weights(f"up{number}", np.zeros((rank, channels))).astype(x.dtype)
        weights = stage.weights(f"weights{number}", start)
        x = _combine(weights, [*outputs, layer(x)]) + x @ down @ up
        outputs.append(x)
    return x


def dsnet(stage: Stage, x: jax.Array, layers: Sequence[Layer]) -> jax.Array:
    """x_l = H(x_{l-1}) + sum_j w_j N(x_j), a weight for each channel (DSNet, arXiv:2010.12496).

    H is the layer. N is BatchNorm without scale and bias; it is computed once for each output.
    """
    normalised = []
    for number, layer in enumerate(layers, 1):
        normalised.append(stage.layers.norm(name=f"norm{number}", scale_and_bias=False)(x))
        weights = stage.weights(f"weights{number}", np.ones((number, x.shape[-1])))
        x = layer(x) + _combine(map(per_channel, weights), normalised)
    return x


def hyper(
    stage: Stage,
    x: jax.Array,
    layers: Sequence[Layer],
    streams: int = 4,
    dynamic: bool = False,
) -> jax.Array:
    """Hyper-connections (Zhu et al., arXiv:2409.19606): several streams in place of one.

    The streams start as copies of the stage's input. A layer reads a weighted sum of them (A_m in
    the paper). Then each stream becomes a weighted sum of all streams (A_r), and the layer's output
    is added to it with a weight (B). At the end, the stage gives the mean of the streams. With
    `dynamic`, each pixel's features change the weights a little.
    """
    state = [x] * streams
    for number, layer in enumerate(layers, 1):
        read, mix, write = _hyper_weights(stage, number, state, dynamic)
        new = layer(_combine(read, state))
        state = [
            _combine((*mix[target], write[target]), (*state, new)) for target in range(streams)
        ]
    return _combine([1 / streams] * streams, state)


def _hyper_weights(stage, number, state, dynamic):
    """(read, mix, write): the weights of one layer.

    `read[s]` is the weight of stream s in what the layer reads, `mix[t][s]` that of stream s in the
    new stream t, and `write[t]` that of the layer's output in the new stream t.
    """
    streams, channels = len(state), state[0].shape[-1]
    start = np.eye(streams)
    read = list(stage.weights(f"read{number}", start[(number - 1) % streams]))
    mix = [list(row) for row in stage.weights(f"mix{number}", start)]  # [target][source]
    write = list(stage.weights(f"write{number}", np.ones(streams)))
    if dynamic:
        scale = stage.weights(f"scale{number}", (0.01, 0.01, 0.01))
        kernel = stage.weights(f"dynamic{number}", np.zeros((channels, streams + 2)))
        for source, x in enumerate(map(at_least_float32, state)):
            rate = lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
            parts = jnp.split(jnp.tanh((x * rate) @ kernel), streams + 2, axis=-1)
            read[source] += scale[0] * parts[0]
            write[source] += scale[1] * parts[1]
            for target, part in enumerate(parts[2:]):
                mix[target][source] += scale[2] * part
    return read, mix, write


ADDING: dict[str, Callable[..., jax.Array]] = {
    "add": add,
    "chain": plain,
    "weighted": weighted,
    "laurel": laurel,
    "dsnet": dsnet,
    "hyper": hyper,
}

"""Connection patterns: against their papers' rules, the paper's form of a block, and NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax.config import UserError
from densejax.models import connections, convolution
from densejax.models.connections import ADDING, CONCATENATING, Graph, Stage
from densejax.models.densenet import DenseNet
from densejax.models.layers import Layers
from densejax.models.resnet import ResNet
from densejax.training import parallel
from tests.models.test_in_place import assert_close, compiled, example, on_a_cpu, pull  # noqa: F401

graph = connections.graph
OWN = ((0,), (0, 1), (2, 0), (1, 3), (4, 2))  # of four layers, in no order


@pytest.fixture
def double():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


# What is read.


def test_layers_read_what_their_papers_say():
    assert sum(map(len, graph("dense", 12, 4).reads)) == 12 * 13 / 2
    assert graph("chain", 3, 4) == Graph(((0,), (1,), (2,)), (3,), (4, 4, 4))
    assert graph("one_shot", 3, 4).emits == (0, 1, 2, 3)
    assert graph("window:size=2", 4, 4).reads == ((0,), (0, 1), (1, 2), (2, 3))
    log = graph("exponential", 9, 4)  # the block's end reads as a tenth layer
    assert log.reads[7] == (0, 4, 6, 7) and log.emits == (2, 6, 8, 9)
    harmonic = graph("hardnet", 8, 10)
    assert harmonic.reads[7] == (7, 6, 4, 0) and harmonic.reads[4] == (4,)
    assert harmonic.emits == (1, 3, 5, 7, 8)
    assert harmonic.widths == (10, 18, 10, 28, 10, 18, 10, 50)  # of 17, 28.9 and 49.1
    assert graph(OWN, 4, 3) == Graph(OWN[:4], OWN[4], (3, 3, 3, 3))


def test_a_random_graph_is_its_seed_s():
    one, again, other = (graph(f"random:seed={seed}", 9, 4) for seed in (1, 1, 2))
    assert one == again != other
    assert all(layer - 1 in read for layer, read in enumerate(one.reads, 1))
    assert graph("random:probability=0.0", 9, 4) == graph("one_shot", 9, 4)
    assert graph("random:probability=1.0", 9, 4) == graph("dense", 9, 4)


@pytest.mark.parametrize(
    "connect, said",
    [
        ("log", "allowed are dense, chain"),
        ("chain:", "give an option after ':', or leave it out"),
        ("window:width=2", "option 'width=2': give key=value pairs of size=3"),
        ("window:size=0", "size = 0 must be at least 1"),
        ("window:size=wide", "option size = wide: give a value of type int"),
        ("hardnet:multiplier=1e999", "multiplier = 1e999: give a value of type float"),
        ("hardnet:multiplier=0.1", "multiplier = 0.1 must be from 1 to 10"),
        ("hardnet:multiplier=1e300", "multiplier = 1e+300 must be from 1 to 10"),
        ("random:probability=7.0", "probability = 7.0 must be from 0 to 1"),
        (((0), (0, 1), (1,), (2,), (3,)), "each part is a tuple, as (0,)"),
        (((0,), (1,)), "has 2 tuples; for a block of 4 layers give 5"),
        (((0,), (0, 2), (0,), (0,), (4,)), "layer 2 reads (0, 2); it can read the outputs from 0"),
        (((0,), (1, 1), (2,), (3,), (4,)), "layer 2 reads (1, 1): give each output once"),
        (((0,), (1,), (2,), (3,), (5,)), "what follows the block reads (5,)"),
        (((0,), (1,), (2,), (2,), (4,)), "nothing reads layer 3"),
        (((0,), (1.0,), (2,), (3,), (4,)), "layer 2 reads (1.0,)"),
        (((0,), (), (2,), (3,), (4,)), "layer 2 reads ()"),
    ],
)
def test_what_is_no_pattern_is_said_in_one_line(connect, said):
    line = f"^{re.escape(f'model.connect = {connect!r}: ')}.*{re.escape(said)}"
    with pytest.raises(UserError, match=line):
        graph(connect, 4, 4)


def test_each_block_may_have_a_graph_of_its_own():
    one = ((0,), (0, 1), (2,))
    network = DenseNet(3, blocks=(2, 1), connect=(one, ((0,), (0, 1))))
    assert list(network.graphs()) == ["block1", "block2"]
    assert [g.emits for g in network.graphs().values()] == [(2,), (0, 1)]
    with pytest.raises(UserError, match="one for each of the 2 blocks"):
        network.clone(connect=(one,)).graphs()
    with pytest.raises(UserError, match="for a block of 1 layers give 2"):
        network.clone(connect=one).graphs()


# The in-place block against the concatenating one.

PATTERNS = [*CONCATENATING, OWN]
FAST = [
    ("hardnet", True, True, (np.inf, False, True, 8)),
    (OWN, True, True, (1, True)),
    (OWN, False, True, (1, True)),
    ("chain", True, False, (1, True)),
]
GRID = [
    (connect, bottleneck, train, plan)
    for connect in PATTERNS
    for bottleneck in (False, True)
    for train in (False, True)
    for plan in ((1, True), (np.inf, False, True, 8))
]


def tiny(connect, bottleneck, **fields):
    random = {"dropout_rate": 0.3, "survival": 0.5}
    fields = {"dtype": jnp.float64, "growth_rate": 2, "stem_width": 3} | random | fields
    return DenseNet(3, blocks=(4,), connect=connect, bottleneck=bottleneck, **fields)


@functools.cache
def by_concatenation(connect, bottleneck, train):
    model = tiny(connect, bottleneck, block="concat")
    inputs = example(model)
    return inputs, jax.device_get(compiled(pull(model, train))(*inputs))


@pytest.mark.parametrize(
    "connect, bottleneck, train, plan",
    FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in GRID if case not in FAST],
)
def test_in_place_is_the_concatenating_form(double, monkeypatch, connect, bottleneck, train, plan):
    inputs, expected = by_concatenation(connect, bottleneck, train)
    monkeypatch.setitem(convolution.PLANS, "cpu", convolution.Plan(*plan))
    found = compiled(pull(tiny(connect, bottleneck), train))(*inputs)
    assert_close(found, expected)
    if train:
        assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1])) > 1e-6


def of_examples(pulled):
    """Logits and images' gradients, which belong to one example each, of what `pull` gives."""
    (_, (logits, _)), (_, dx) = pulled
    return [logits, dx]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
@pytest.mark.parametrize("connect", PATTERNS, ids=str)
def test_four_devices_compute_what_one_does(double, connect, mode):
    inputs, expected = by_concatenation(connect, True, True)
    value = pull(tiny(connect, True, batch_norm_axis=parallel.AXIS), True)
    variables, images, keys = inputs
    if mode == "pmap":
        spread = [leaf.reshape(4, -1, *leaf.shape[1:]) for leaf in (images, keys)]
        run = jax.pmap(value, parallel.AXIS, in_axes=(None, 0, 0))
        found = of_examples(run(variables, *spread))
        found = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in found]
    else:
        split = jax.P(parallel.AXIS)
        run = jax.shard_map(
            lambda *inputs: of_examples(value(*inputs)),
            mesh=parallel.mesh(devices=jax.devices()[:4]),
            in_specs=(jax.P(), split, split),
            out_specs=split,
        )
        found = compiled(run)(variables, images, keys)
    assert_close(found, of_examples(expected))


@pytest.mark.slow
@pytest.mark.parametrize("connect", CONCATENATING)
def test_memory_grows_linearly_with_depth(monkeypatch, connect):
    """Twice the layers take twice the memory that is added."""
    monkeypatch.setitem(convolution.PLANS, "cpu", convolution.Plan(1, True))

    def temporary_bytes(depth):
        model = DenseNet(3, blocks=(depth,), growth_rate=2, stem_width=4, connect=connect)
        images = jax.ShapeDtypeStruct((64, 8, 8, 2), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        lowered = compiled(pull(model, True)).lower(variables, images, None)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    first, second, third = map(temporary_bytes, (4, 8, 16))
    widths = [sum(graph(connect, depth, 2).widths) for depth in (4, 8, 16)]
    assert (third - second) / (second - first) < 1.1 * np.divide(*np.diff(widths)[::-1])


# Patterns that add, against NumPy at random weights.

LEARNED = [
    *("weighted", "weighted:dilation=2", "weighted:period=2", "laurel:rank=2"),
    *("dsnet", "hyper:streams=3", "hyper:streams=2:dynamic=True"),
]
DEPTH = 4


def numpy_stage(connect, x, layers, params, stats):
    """What the papers' equations give for features x [pixels, channels]."""
    name, *pairs = connect.split(":")
    options = dict(pair.split("=") for pair in pairs)
    outputs = [x]
    if name == "weighted":  # DenseFormer: Y_i = sum_j a_ij X_j, X_i = B_i(Y_{i-1})
        y, dilation, period = x, int(options.get("dilation", 1)), int(options.get("period", 1))
        for i, layer in enumerate(layers, 1):
            y = y + layer(y)
            outputs.append(y)
            if i % period == 0:
                used = [j for j in range(i + 1) if (i - j) % dilation == 0]
                y = sum(a * outputs[j] for a, j in zip(params[f"weights{i}"], used, strict=True))
        return y
    if name == "laurel":
        for i, layer in enumerate(layers, 1):
            *gammas, alpha = params[f"weights{i}"]
            low_rank = outputs[-1] @ (params[f"down{i}"] @ params[f"up{i}"])
            before = sum(g * y for g, y in zip(gammas, outputs, strict=True))
            outputs.append(alpha * layer(outputs[-1]) + before + low_rank)
        return outputs[-1]
    if name == "dsnet":
        for i, layer in enumerate(layers, 1):
            y = layer(outputs[-1])
            for j in range(i):
                mean, var = stats[f"norm{j + 1}"]["mean"], stats[f"norm{j + 1}"]["var"]
                y = y + params[f"weights{i}"][j] * (outputs[j] - mean) / np.sqrt(var + 1e-5)
            outputs.append(y)
        return outputs[-1]
    streams = int(options["streams"])
    hidden = np.stack([x] * streams, 1)  # H: [pixels, n, channels]
    for i, layer in enumerate(layers, 1):
        rows = np.ones((len(x), 1, 1))
        read, write = rows[0] * params[f"read{i}"], rows[0] * params[f"write{i}"]
        mix = rows * params[f"mix{i}"].T  # A_r: [source, target]
        if "dynamic" in options:
            rms = np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6)
            drawn = np.tanh(hidden / rms @ params[f"dynamic{i}"])  # [pixels, n, n + 2]
            scale = params[f"scale{i}"]
            read, write = read + scale[0] * drawn[..., 0], write + scale[1] * drawn[..., 1]
            mix = mix + scale[2] * drawn[..., 2:]
        y = layer((np.broadcast_to(read, hidden.shape[:2])[..., None] * hidden).sum(1))
        written = np.broadcast_to(write, hidden.shape[:2])[..., None] * y[:, None]
        hidden = np.einsum("pst,psc->ptc", mix, hidden) + written
    return hidden.mean(1)


@pytest.mark.parametrize("connect", LEARNED)
def test_learned_patterns_equal_numpy_at_random_weights(double, connect):
    generator = np.random.default_rng(0)
    stage = Stage(connect, Layers(train=False, dtype=jnp.float64))
    layers = [functools.partial(lambda factor, x: x * x * factor, f) for f in (0.3, -0.2, 0.4, 0.1)]
    x = generator.normal(size=(2, 3, 2, 5))
    shapes = jax.eval_shape(lambda x: stage.init(jax.random.key(0), x, layers), x)
    variables = jax.tree.map(lambda leaf: generator.uniform(0.2, 0.9, leaf.shape), shapes)
    found = stage.apply(variables, x, layers)
    rows = x.reshape(-1, 5)
    stats = variables.get("batch_stats")
    expected = numpy_stage(connect, rows, layers, variables["params"], stats)
    np.testing.assert_allclose(found.reshape(-1, 5), expected, rtol=1e-10)


def test_learned_patterns_start_as_the_residual_network():
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 6)).astype(np.float32)
    layers = [functools.partial(lambda factor, x: jnp.tanh(factor * x), f) for f in (2, -1, 3, 1)]

    def start(connect):
        stage = Stage(connect, Layers(train=False))
        return stage.init_with_output(jax.random.key(0), x, layers)[0]

    for connect in LEARNED:
        if connect != "dsnet":
            np.testing.assert_allclose(start(connect), start("add"), rtol=1e-5, err_msg=connect)


@pytest.mark.parametrize(
    "connect",
    [*LEARNED[:1], *LEARNED[3:5], LEARNED[-1], pytest.param("hyper", marks=pytest.mark.slow)],
)
def test_every_connection_weight_learns(connect):
    """Its gradient is not zero at the start or, for a factor of a zero, after one step."""
    generator = np.random.default_rng(0)
    image = generator.normal(size=(8, 6, 6, 3)).astype(np.float32)
    network = ResNet(3, blocks=(3,), widths=(4,), preactivation=True, connect=connect)
    variables = compiled(network.init)(jax.random.key(0), image)
    labels = generator.normal(size=(8, 3)).astype(np.float32)

    def loss(params):
        apply = network.apply(variables | {"params": params}, image, True, mutable=["batch_stats"])
        return jnp.square(apply[0][0] - labels).mean()

    gradient, params = compiled(jax.grad(loss)), variables["params"]
    first = gradient(params)
    second = gradient(jax.tree.map(lambda leaf, g: leaf - 0.1 * g, params, first))
    for name, leaf in first["stage1"].items():
        learns = (np.asarray(leaf) != 0) | (np.asarray(second["stage1"][name]) != 0)
        assert learns.all(), name


def test_adding_patterns_are_all_tested():
    assert {connect.partition(":")[0] for connect in LEARNED} | {"add", "chain"} == set(ADDING)

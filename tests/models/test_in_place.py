"""The in-place block against the concatenating one's automatic gradients, in double precision."""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from densejax.models import convolution, in_place
from densejax.models.dense_block import IMPLEMENTATIONS, DenseBlock
from densejax.models.densenet import DenseNet
from tests import small
from tests.models.oracle import random_variables

tiny = functools.partial(
    DenseNet, num_classes=3, blocks=(2, 1), growth_rate=(2, 3), stem_width=4, dtype=jnp.float64
)
BATCH = 8
# Compiles in half the time; the programs are run once.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def double():
    # Counts of pixels are float32: implicit promotion is strict in the tests of float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def on_a_cpu():
    """Traces for the CPU alone, as a training step does: three of four plans would not be run."""
    with convolution.tracing_for("cpu"):
        yield


@pytest.fixture
def pieces(monkeypatch):
    """Every example is a piece of its own on a CPU."""
    plan = dataclasses.replace(convolution.PLANS["cpu"], piece_bytes=1, core_bytes=None)
    monkeypatch.setitem(convolution.PLANS, "cpu", plan)


def float64(tree):
    return jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def example(model, size=8, seed=0):
    """Variables, images and keys for a model; nothing is at its initial value."""
    images = draws(BATCH, size, size, 2, seed=seed)
    with jax.enable_x64(False):
        narrow = model.clone(dtype=jnp.float32)
        variables = random_variables(narrow, images.astype(np.float32), seed=seed)
    keys = np.random.default_rng(seed).integers(0, 2**32, (BATCH, 2), np.uint32)
    return float64(variables), images, keys


def loss_of(model, train, params, image, stats, keys):
    """A sum that is not symmetric in anything, and (logits, new statistics)."""
    (logits, _), updates = model.apply(
        {"params": params, "batch_stats": stats}, image, train, keys, mutable=["batch_stats"]
    )
    weights = np.arange(1, logits.shape[-1] + 1).astype(logits.dtype)
    return (jnp.square(logits) * weights).sum(), (logits, updates["batch_stats"])


def pull(model, train):
    """(variables, images, keys) -> ((loss, (logits, statistics)), gradients)."""
    value = jax.value_and_grad(functools.partial(loss_of, model, train), (0, 1), has_aux=True)
    return lambda variables, images, keys: value(
        variables["params"], images, variables["batch_stats"], keys
    )


def assert_close(first, second, tolerance=1e-11, least=1e-2):
    """Entries differ by at most `tolerance` times the largest of their array, or times `least`."""
    first, second = small.named(first), small.named(second)
    assert first.keys() == second.keys()
    for name, leaf in second.items():
        scale = max(np.abs(leaf).max(), least)
        difference = np.abs(first[name].astype(np.float64) - leaf).max()
        assert difference <= tolerance * scale, f"{name}: {difference} of {scale}"


RANDOM = {"dropout_rate": 0.3, "survival": 0.5, "convolution_bias": True}
NETWORKS = {
    "bottleneck": RANDOM,
    "plain": RANDOM | {"bottleneck": False},
    "imagenet": {"stem": "imagenet"},
}


@functools.cache
def by_concatenation(name, train):
    """What the concatenating block and automatic differentiation give."""
    model = tiny(**NETWORKS[name], block="concat")
    variables, images, keys = example(model, 16 if model.stem == "imagenet" else 8)
    expected = compiled(pull(model, train))(variables, images, keys)
    return variables, images, keys, jax.device_get(expected)


@pytest.mark.parametrize(
    "name, train, recompute, piece_bytes, like",
    [
        ("bottleneck", True, "none", 1, "cpu"),
        ("bottleneck", True, "layer", np.inf, "tpu"),
        ("bottleneck", False, "none", 1, "cpu"),
        ("plain", True, "layer", 1, "tpu"),
        ("imagenet", True, "norm", np.inf, "gpu"),
        ("plain", True, "none", 1, "cpu"),
        pytest.param("bottleneck", True, "block", np.inf, "cpu", marks=pytest.mark.slow),
        pytest.param("plain", True, "block", np.inf, "cpu", marks=pytest.mark.slow),
        pytest.param("plain", False, "none", np.inf, "tpu", marks=pytest.mark.slow),
        pytest.param("imagenet", False, "none", np.inf, "cpu", marks=pytest.mark.slow),
    ],
)
def test_results_statistics_and_gradients_are_those_of_concatenation(
    double, monkeypatch, name, train, recompute, piece_bytes, like
):
    variables, images, keys, expected = by_concatenation(name, train)
    kinds = {
        "cpu": {"products": True, "shared_code": True},
        "tpu": {"new_gradients": True, "batch_multiple": len(images)},
        "gpu": {"new_gradients": True, "channels_first": True},
    }
    plan = convolution.Plan(piece_bytes, **kinds[like])
    monkeypatch.setitem(convolution.PLANS, "cpu", plan)
    model = tiny(**NETWORKS[name], block="in_place", recompute=recompute)
    assert_close(compiled(pull(model, train))(variables, images, keys), expected)
    (loss, (logits, stats)), (gradients, dx) = expected
    assert np.abs(logits).max() > 0.1 and np.abs(dx).max() > 1e-3
    moved = jax.tree.map(lambda old, new: np.abs(new - old).min(), variables["batch_stats"], stats)
    assert (min(jax.tree.leaves(moved)) > 1e-7) == train


def program(model):
    variables, images, keys = example(model)
    return str(jax.make_jaxpr(pull(model, True))(variables, images, keys))


def test_every_option_changes_the_program_or_the_result(double, monkeypatch):
    """The grid above would pass if its options did nothing."""
    base = tiny(blocks=(1,), growth_rate=2, block="in_place", **RANDOM)
    texts = [program(base), program(base.clone(block="concat"))]
    changes = [{"dropout_rate": 0.0}, {"survival": 1.0}, {"convolution_bias": False}]
    changes += [{"bottleneck": False}, {"recompute": "layer"}, {"recompute": "block"}]
    texts += [program(base.clone(**change)) for change in changes]
    assert len(set(texts)) == len(texts)
    plans = (
        (1, True),
        (1, True, False, 0, False, None, True),
        (1, False),
        (np.inf, False, False, 0, True),
    )
    plans += ((np.inf, False, True), (np.inf, False, False, 1))
    for plan in (*plans, (np.inf, False)):
        monkeypatch.setitem(convolution.PLANS, "cpu", convolution.Plan(*plan))
        texts.append(program(base))
    pieces, *_, whole = texts[-6:]
    assert pieces.count("scan[") > whole.count("scan[")
    assert len(set(texts)) == len(texts) - (texts[0] == texts[-1])


@pytest.mark.parametrize("shared, kernels", [(True, 1), (False, 4)])
def test_layers_share_the_machine_code_that_writes_new_maps(monkeypatch, shared, kernels):
    """XLA:CPU compiles equal computations once, so their texts are compared without names."""
    monkeypatch.setitem(convolution.PLANS, "cpu", convolution.Plan(1, True, shared_code=shared))
    model = tiny(blocks=(4,), growth_rate=2, block="in_place", dtype=jnp.float32)
    images = draws(BATCH, 8, 8, 2).astype(np.float32)
    variables = random_variables(model, images)
    arguments = variables["params"], images, variables["batch_stats"], None
    program = jax.jit(functools.partial(loss_of, model, True)).lower(*arguments).compile()
    writes = set()
    for computation in re.findall(
        r"^%.*? \{\n(.*?)^\}", program.as_text(), re.DOTALL | re.MULTILINE
    ):
        if re.search(r"ROOT .* = f32\[8,8,8,12\]\S* dynamic-update-slice", computation):
            numbers = collections.defaultdict(itertools.count().__next__)
            plain = re.sub(r", metadata=\{.*?\}", "", computation)
            writes.add(re.sub(r"%[\w.-]+", lambda m, seen=numbers: str(seen[m[0]]), plain))
    assert len(writes) == kernels


def kept_bytes(model):
    """Bytes that automatic differentiation keeps from the forward pass; nothing is compiled."""
    variables, images, keys = example(model.clone(dtype=jnp.float32))
    loss = lambda image: loss_of(  # noqa: E731
        model, True, variables["params"], image, variables["batch_stats"], keys
    )
    saved = jax.eval_shape(lambda image: jax.vjp(loss, image, has_aux=True)[1], images)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))


@pytest.mark.parametrize(
    "block, levels",
    [("concat", ["none", "norm", "layer", "block"]), ("in_place", ["none", "layer", "block"])],
)
def test_every_level_of_recomputation_keeps_less(double, block, levels):
    sizes = [
        kept_bytes(tiny(blocks=(4,), growth_rate=2, block=block, recompute=level))
        for level in levels
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def temporary_bytes(block, depth):
    """Temporary memory of a compiled gradient, of a block of so many layers."""
    fields = {"bottleneck": False, "block": block, "dtype": jnp.float32, "stem_width": 2}
    model = tiny(blocks=(depth,), growth_rate=2, **fields)
    images = jax.ShapeDtypeStruct((64, 8, 8, 2), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    lowered = compiled(pull(model, True)).lower(variables, images, None)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("caches, size", [(2**20, 200), (2**22, 800)])
def test_pieces_follow_from_the_caches_where_nothing_is_trained(double, monkeypatch, caches, size):
    monkeypatch.setattr(in_place, "cache_bytes", lambda: caches)
    monkeypatch.setitem(convolution.PLANS, "cpu", convolution.Plan(100, True))
    found, original = {}, in_place._piece_size
    model = tiny()
    variables, images, keys = example(model)
    for train in (False, True):

        def recorded(plan, features, train=train):
            found.setdefault(train, set()).add(plan.most_bytes())
            return original(plan, features)

        monkeypatch.setattr(in_place, "_piece_size", recorded)
        jax.eval_shape(pull(model, train), variables, images, keys)
    assert found == {False: {size}, True: {100}}


@pytest.mark.parametrize(
    "piece_bytes, depth",  # a few layers need less memory than halves of the batch
    [(1, 2), pytest.param(1e9, 8, marks=pytest.mark.slow)],
    ids=["examples", "halves"],
)
def test_memory_grows_linearly_with_depth(monkeypatch, piece_bytes, depth):
    """Twice the layers take twice the memory that is added; concatenated, four times."""
    monkeypatch.setitem(convolution.PLANS, "cpu", convolution.Plan(piece_bytes, True))
    growth = {}
    for block in IMPLEMENTATIONS:
        first, second, third = (temporary_bytes(block, n * depth) for n in (1, 2, 4))
        growth[block] = (third - second) / (second - first)
    assert growth["concat"] > 2.8  # below four, as the first layers are few
    assert growth["in_place"] < 2.2


# Many devices. Losses of replicas are summed; a batch is split in order.


def on_one_device(model, parts):
    """Losses, results and gradients of parts of the batch, each by itself; gradients summed."""
    value = pull(model, True)

    def run(variables, images, keys):
        split = lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:])  # noqa: E731
        (loss, (logits, stats)), (dparams, dx) = jax.vmap(value, (None, 0, 0))(
            variables, split(images), split(keys)
        )
        dparams = jax.tree.map(lambda leaf: leaf.sum(0), dparams)
        stats = jax.tree.map(lambda leaf: leaf.mean(0), stats)
        whole = (leaf.reshape(BATCH, *leaf.shape[2:]) for leaf in (logits, dx))
        return loss.sum(), stats, dparams, *whole

    return compiled(run)


def of_replica(model, axes, given):
    """As `on_one_device`, of one replica of many; `given`: how parameters come."""

    def run(variables, images, keys):
        params = variables["params"]
        if given == "varying":
            params = lax.pcast(params, axes, to="varying")
        variables = variables | {"params": params}
        (loss, (logits, stats)), (dparams, dx) = pull(model, True)(variables, images, keys)
        if given != "replicated":  # gradients of replicated parameters are summed already
            dparams = lax.psum(dparams, axes)
        # Statistics of a group are equal within it.
        over = "group" if model.batch_norm_axis == "member" else axes
        return lax.psum(loss, axes), lax.pmean(stats, over), dparams, logits, dx

    return run


@functools.cache
def one_device(parts):
    model = tiny(blocks=(1, 1), block="concat", **RANDOM)
    inputs = example(model)
    return inputs, jax.device_get(on_one_device(model, parts)(*inputs))


# Where batch statistics are taken, over which axes, and the parts of the batch on one device.
NORMS = {"global": (("group", "member"), 1), "group": ("member", 2), "replica": (None, 4)}
FAST = [("global", "varying"), ("group", "replicated"), ("replica", "pmap")]
SLOW = [("global", "replicated"), ("global", "pmap"), ("group", "varying")]
SLOW += [("global", "vmap"), ("replica", "varying"), ("replica", "replicated"), ("replica", "vmap")]


@pytest.mark.parametrize(
    "norm, mode", FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_four_devices_compute_what_one_does(double, pieces, norm, mode):
    """One device takes parts of the batch with concatenating blocks: other code throughout."""
    axes, (axis, parts) = ("group", "member"), NORMS[norm]
    if mode in ("pmap", "vmap"):
        axes, axis = "data", axis and "data"
    model = tiny(blocks=(1, 1), block="in_place", batch_norm_axis=axis, **RANDOM)
    (variables, images, keys), expected = one_device(parts)
    if mode in ("pmap", "vmap"):
        over, given = (jax.pmap, "varying") if mode == "pmap" else (jax.vmap, "mapped")
        step = jax.jit(of_replica(model, axes, given))
        split = lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:])  # noqa: E731
        out_axes = (None, None, None, 0, 0)
        mapped = over(step, axis_name="data", in_axes=(None, 0, 0), out_axes=out_axes)
        *shared, logits, dx = mapped(variables, split(images), split(keys))
        result = (*shared, *(leaf.reshape(BATCH, *leaf.shape[2:]) for leaf in (logits, dx)))
    else:
        mesh = jax.make_mesh((2, 2), axes, axis_types=2 * (AxisType.Auto,))
        whole, split = PartitionSpec(), PartitionSpec(axes)
        mapped = jax.shard_map(
            of_replica(model, axes, mode),
            mesh=mesh,
            in_specs=(whole, split, split),
            out_specs=(whole, whole, whole, split, split),
        )
        result = compiled(mapped)(variables, images, keys)
    assert_close(result, expected)


def test_devices_differ_where_their_norms_do(double):
    """The three references above are not one."""
    losses = [float(one_device(parts)[1][0]) for parts in (1, 2, 4)]
    assert len(np.unique(np.round(losses, 3))) == 3


@pytest.mark.slow
def test_a_second_call_and_one_under_vmap_repeat_the_first(double, pieces):
    model = tiny(blocks=(1, 1), block="in_place", **RANDOM)
    inputs = [example(model, seed=seed) for seed in (0, 1)]
    step = compiled(pull(model, True))
    alone = [step(*one) for one in inputs]
    small.assert_same_bits(step(*inputs[0]), alone[0])
    both = jax.vmap(step)(*jax.tree.map(lambda *leaves: np.stack(leaves), *inputs))
    for index, expected in enumerate(alone):
        assert_close(jax.tree.map(lambda leaf, i=index: leaf[i], both), expected)


# Precision.


def block(dtype):
    """A block, alone."""
    return DenseBlock(2, 3, bottleneck_width=2, convolution_bias=True, dtype=dtype)


def block_pull(module):
    """((features, new statistics), gradients of variables and of x) of a block in training."""

    def loss_of(params, x, stats, weights):
        variables, mutable = {"params": params, "batch_stats": stats}, ["batch_stats"]
        (features, known), updates = module.apply(variables, x, True, None, True, mutable=mutable)
        # As the norm that follows reads them: gradients flow through the statistics, too.
        batch = known.batch
        normal = (features.astype(batch.mean.dtype) - batch.mean) / jnp.sqrt(batch.variance + 1e-5)
        return (normal * weights).sum(), (features, updates["batch_stats"])

    return compiled(jax.grad(loss_of, (0, 1), has_aux=True))


def block_inputs(dtype, mean=0.0):
    """Parameters, x, running statistics and weights of the loss."""
    module = block(jnp.float32)
    x = np.asarray(mean + draws(BATCH, 4, 4, 5), dtype)
    variables = random_variables(module, x.astype(np.float32))
    # So does a bottleneck's output, whose standard deviation is 0.3 and more.
    variables["params"]["layer1"]["conv1"]["bias"] += np.float32(0.3 * mean)
    return variables["params"], x, variables["batch_stats"], draws(BATCH, 4, 4, 11, seed=1)


def batch_variances(old, new):
    """The batch's, from running statistics before and after."""
    pairs = [(f"layer{index}", norm) for index in (1, 2) for norm in ("norm1", "norm2")]
    return [
        (np.float64(new[layer][norm]["var"]) - 0.9 * np.float64(old[layer][norm]["var"])) / 0.1
        for layer, norm in pairs
    ]


def test_a_large_mean_leaves_variances_and_gradients_right():
    # At 1e4 rounding turns a ReLU over, which moves the gradients of concatenation as much.
    pulls = block_pull(block(jnp.float32)), block_pull(block(jnp.float64))
    for mean, tolerance in ((1e3, 1e-2), (1e4, 0.5)):
        params, x, stats, weights = block_inputs(np.float32, mean)
        result = pulls[0](params, x, stats, weights.astype(np.float32))
        gradients, (_, updated) = jax.device_get(result)
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            exact = pulls[1](float64(params), x.astype(np.float64), float64(stats), weights)
            exact_gradients, (_, exact_updated) = jax.device_get(exact)
        variances = batch_variances(stats, updated)
        np.testing.assert_allclose(variances[0], x.astype(np.float64).var((0, 1, 2)), rtol=1e-3)
        right = batch_variances(float64(stats), exact_updated)
        # Later ones inherit what rounding the first mean, to 5e-4, moves.
        for ours, exact, rtol in zip(variances, right, (1e-3, 1e-2, 1e-2, 1e-2), strict=True):
            assert (ours > 0).all()
            np.testing.assert_allclose(ours, exact, rtol=rtol)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
        assert_close(gradients, exact_gradients, tolerance, least=5.0)


def test_bfloat16_takes_statistics_in_float32():
    params, x, stats, weights = block_inputs(jnp.bfloat16, mean=3.0)
    weights = weights.astype(np.float32)
    narrow, (features, updated) = jax.device_get(
        block_pull(block(jnp.bfloat16))(params, x, stats, weights)
    )
    assert features.dtype == narrow[1].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((narrow[0], updated))} == {np.dtype("float32")}
    # Of the features as they are stored; bfloat16 itself would be 1e-2 off.
    exact = features.astype(np.float64)
    for leaf, value in (("mean", exact.mean((0, 1, 2))), ("var", exact.var((0, 1, 2)))):
        ours = (updated["layer2"]["norm1"][leaf] - 0.9 * stats["layer2"]["norm1"][leaf]) / 0.1
        np.testing.assert_allclose(ours, value[:8], rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_to_float32_as_that_of_concatenation():
    small_model = functools.partial(tiny, blocks=(1, 1))
    wide_model = small_model(dtype=jnp.float32)
    variables, images, _ = example(wide_model)
    variables, images = jax.tree.map(lambda leaf: leaf.astype(np.float32), (variables, images))
    models = [
        wide_model,
        *(small_model(dtype=jnp.bfloat16, block=name) for name in IMPLEMENTATIONS),
    ]
    results = [compiled(pull(model, True))(variables, images, None) for model in models]
    (_, (logits, stats)), (gradients, _) = results[1]
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((stats, gradients))} == {jnp.dtype("float32")}

    def error(result):
        leaves = zip(*map(jax.tree.leaves, (result, results[0])), strict=True)
        pairs = [(np.ravel(ours), np.ravel(exact)) for ours, exact in leaves]
        ours, exact = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        return np.linalg.norm(ours - exact) / np.linalg.norm(exact)

    in_place, concat = map(error, results[1:])
    assert 0 < in_place < 1.5 * concat and in_place < 0.1


# Training.


def curve(block):
    """The losses of 20 steps on digits."""
    config = small.tiny(
        model__block=block,
        model__growth_rate=8,
        model__dropout_rate=0.0,
        train__label_smoothing=0.0,
        train__epochs=4,
        log__every_steps=1,
    )
    experiment = small.build(config, 1)
    step, state, losses = small.stepper(experiment), experiment.init(), []
    for index in range(20):
        state, sums = step(state, experiment.data.train.batch(index))
        losses.append(float(sums["loss"]) / float(sums["count"]))
    return np.asarray(losses)


@pytest.mark.slow
def test_twenty_steps_follow_the_same_curve():
    """Rounding of float32 grows from 1e-7 to 1e-4; a wrong gradient is off by the second step."""
    ours, theirs = curve("in_place"), curve("concat")
    np.testing.assert_allclose(ours[:5], theirs[:5], rtol=2e-5)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert ours[-5:].mean() < ours[0] - 0.1

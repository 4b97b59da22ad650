"""BatchNorm against flax's, in training and after, and with precomputed statistics."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from densejax.models.normalization import (
    BatchNorm,
    PrecomputedStatistics,
    Statistics,
    mean_over,
    normalise,
    normalise_relu,
    statistics,
    update_running,
)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


X = 2 + 3 * draws(3, 4, 5, 6)
VARIABLES = {
    "params": {"scale": 1 + draws(6, seed=1), "bias": draws(6, seed=2)},
    "batch_stats": {"mean": draws(6, seed=3), "var": np.exp(draws(6, seed=4))},
}
WEIGHTS = draws(*X.shape, seed=5)


def run(norm, variables, x, *more):
    """The result, the variables that changed, and gradients of the variables and of x."""

    def loss_of(params, x):
        tree = variables | {"params": params}
        y, updates = norm.apply(tree, x, *more, mutable=["batch_stats"])
        return (y * WEIGHTS.astype(y.dtype)).sum(), (y, updates)

    gradient = jax.jit(jax.grad(loss_of, (0, 1), has_aux=True))
    gradients, (y, updates) = gradient(variables["params"], x)
    return y, updates, gradients


def assert_close(first, second, tolerance=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), first, second)


@pytest.mark.parametrize("relu", [False, True], ids=["norm", "relu"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_norm_is_flaxs(double, train, relu):
    norm = BatchNorm(train, None, 1e-3, jnp.float64)
    y, updates, gradients = run(norm, VARIABLES, X, None, relu)
    keywords = dict(momentum=0.9, epsilon=1e-3, dtype=jnp.float64, use_fast_variance=False)
    flaxs = nn.BatchNorm(use_running_average=not train, **keywords)

    def then_relu(tree, x, mutable):
        y, changed = flaxs.apply(tree, x, mutable=mutable)
        return nn.relu(y) if relu else y, changed

    with jax.numpy_dtype_promotion("standard"):  # flax promotes float64
        expected = run(types.SimpleNamespace(apply=then_relu), VARIABLES, X)
    assert (0.2 < (y == 0).mean() < 0.8) == relu
    assert_close((y, updates, gradients), (expected[0], expected[1] or updates, expected[2]))
    changed = np.abs(updates["batch_stats"]["mean"] - VARIABLES["batch_stats"]["mean"]).max()
    assert changed > 0.1 if train else changed == 0


@pytest.mark.parametrize(
    "axis, varying", [(None, False), ("member", True), (("group", "member"), False)], ids=str
)
def test_gradients_over_devices_are_those_of_plain_operations(double, axis, varying):
    everyone = ("group", "member")
    mesh = jax.make_mesh((2, 2), everyone, (AxisType.Auto, AxisType.Auto))
    split = PartitionSpec(everyone)

    def plain(x, params):
        mean = mean_over(x.mean((0, 1, 2)), axis)
        variance = mean_over(jnp.square(x - mean).mean((0, 1, 2)), axis)
        y = (x - mean) / jnp.sqrt(variance + 1e-3)
        return jnp.maximum(y * params["scale"] + params["bias"], 0)

    def ours(x, params):
        return normalise_relu(x, statistics(x, axis), params, 1e-3)

    def gradients(x, params, weights):
        def loss_of(function, x, params):
            return (function(x, params) * weights).sum()

        def gradient(function):
            of = jax.lax.pcast(params, everyone, to="varying") if varying else params
            dx, dparams = jax.grad(functools.partial(loss_of, function), (0, 1))(x, of)
            return dx, jax.lax.psum(dparams, everyone) if varying else dparams

        return gradient(ours), gradient(plain)

    specs = (split, PartitionSpec(), split)
    out = ((split, PartitionSpec()),) * 2
    mapped = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=out))
    x, weights = draws(8, 3, 2, 6, seed=1) * 3 + 2, draws(8, 3, 2, 6, seed=2)
    first, second = mapped(x, VARIABLES["params"], weights)
    assert_close(first, second, 1e-11)


def test_given_statistics_have_gradients_of_their_own(double):
    def loss_of(function, stats, params, x):
        return (function(x, stats, params) * WEIGHTS).sum()

    def automatic(x, stats, params):
        return nn.relu(normalise(x, stats, params, 1e-3))

    def ours(x, stats, params):
        return normalise_relu(x, stats, params, 1e-3)

    stats = Statistics(draws(6, seed=6), np.exp(draws(6, seed=7)))
    arguments = stats, VARIABLES["params"], X
    first, second = (
        jax.jit(jax.grad(functools.partial(loss_of, function), (0, 1, 2)))(*arguments)
        for function in (ours, automatic)
    )
    assert_close(first, second)


def test_variables_are_flaxs_and_initialisation_keeps_them():
    ours, flaxs = (
        norm.init_with_output(jax.random.key(0), X.astype(np.float32))
        for norm in (
            BatchNorm(True, "no such axis", 1e-5, jnp.float32),
            nn.BatchNorm(use_running_average=False, use_fast_variance=False),
        )
    )
    assert_close(ours[1], flaxs[1], 0)
    assert_close(ours[0], flaxs[0], 1e-5)


def test_precomputed_statistics_are_used_and_stored(double):
    batch = Statistics(draws(6, seed=6), np.exp(draws(6, seed=7)))
    running = Statistics(draws(6, seed=8), np.exp(draws(6, seed=9)))
    norm = BatchNorm(True, None, 1e-3, jnp.float64)
    y, updates, _ = run(norm, VARIABLES, X, PrecomputedStatistics(batch, running))
    scale = VARIABLES["params"]["scale"] / np.sqrt(batch.variance + 1e-3)
    assert_close(y, (X - batch.mean) * scale + VARIABLES["params"]["bias"])
    old = VARIABLES["batch_stats"]
    expected = {
        "mean": 0.9 * old["mean"] + 0.1 * running.mean,
        "var": 0.9 * old["var"] + 0.1 * running.variance,
    }
    assert_close(updates, {"batch_stats": expected})


def test_gradients_flow_through_precomputed_statistics(double):
    norm = BatchNorm(True, None, 1e-3, jnp.float64)

    def loss_of(x, known):
        stats = statistics(x)
        precomputed = PrecomputedStatistics(stats, stats) if known else None
        y, _ = norm.apply(VARIABLES, x, precomputed, mutable=["batch_stats"])
        return (y * WEIGHTS).sum()

    given, own = (jax.jit(jax.grad(lambda x, k=known: loss_of(x, k)))(X) for known in (True, False))
    assert_close(given, own)


def test_running_statistics_take_no_gradient(double):
    running = VARIABLES["batch_stats"]
    loss_of = lambda x: sum(leaf.sum() for leaf in update_running(running, statistics(x)).values())  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss_of)(X), np.zeros_like(X))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_statistics_are_float32_and_survive_a_large_mean(dtype):
    x = np.asarray(1e4 + 100 * draws(64, 4, 4, 3), dtype)
    mean, variance = jax.jit(statistics)(x)
    assert mean.dtype == variance.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var((0, 1, 2)), rtol=1e-3)

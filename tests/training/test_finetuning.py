"""What learns and what stays, against steps that are composed of the network's parts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from sklearn.utils.class_weight import compute_class_weight

from densejax import models
from densejax.config import UserError
from densejax.models.dense_block import DenseBlock
from densejax.models.densenet import Transition
from densejax.models.layers import Head, Layers
from densejax.models.normalization import BatchNorm
from densejax.training import experiment
from densejax.training.step import head_step
from tests import small
from tests.test_train import Plain

PLAIN = {  # nothing is drawn, so that images and losses are known
    "augmentation__shift": 0,
    "augmentation__flip": False,
    "model__dropout_rate": 0.0,
    "train__label_smoothing": 0.0,
    "optimizer__schedule": "constant",
    "optimizer__drop_at": (0.5, 0.75),
}
FIRST = ("stem", "block1")
LATER = ("transition1", "block2", "norm", "head")


def start(built):
    """A state whose running statistics are not those of a start, and -0.0 among its parameters."""
    state = jax.device_get(built.start())
    random = np.random.default_rng(0)
    state.batch_stats.update(
        jax.tree.map(
            lambda leaf: random.uniform(0.5, 1.5, leaf.shape).astype("f"), state.batch_stats
        )
    )
    norm = state.params["block1"]["layer1"]["norm1"]
    norm["bias"] = np.full_like(norm["bias"], -0.0)
    return state


def inputs(built, step):
    """The network's input and the labels of a whole training batch."""
    batch = jax.device_get(built.data.train.batch(step))
    return built.task.preparation.evaluation(batch["image"]), batch["label"]


def after(built, params, statistics, features):
    """(logits, new statistics) of the parts that follow the first block, each called by itself."""
    layers, new = Layers(train=True), {}

    def apply(name, module, *arguments):
        variables = {"params": params[name], "batch_stats": statistics[name]}
        result, updates = module.apply(variables, *arguments, mutable=["batch_stats"])
        new.update({name: updates["batch_stats"]})
        return result

    width = params["transition1"]["conv"]["kernel"].shape[-1]
    x = apply("transition1", Transition(width, layers, False), features)
    x = apply("block2", DenseBlock(1, 4, block="concat"), x, True)
    x = jax.nn.relu(apply("norm", BatchNorm(True, None, 1e-5, jnp.float32), x))
    logits, _ = Head(10).apply({"params": params["head"]}, x)
    return logits, new


@pytest.mark.parametrize(
    ("mode", "parts", "balanced"),
    [("shard_map", 2, True), pytest.param("pmap", 1, False, marks=pytest.mark.slow)],
)
def test_frozen_parts_stay_and_the_others_take_the_steps_of_an_optimizer_of_their_own(
    mode, parts, balanced
):
    config = small.tiny(**PLAIN, train__frozen=FIRST, train__average_decay=0.9)
    config.optimizer.clip_norm = 0.05  # of what learns
    config.parallel.mode, config.train.accumulate_steps = mode, parts
    config.train.class_weights = "balanced" if balanced else "none"
    built = small.build(config)
    state, take_step = start(built), small.stepper(built)
    network = models.create(built.config.model, 10).clone(block="concat")
    labels = np.asarray(built.data.train.labels)
    weights = np.ones(10, "f")
    if balanced:
        weights = compute_class_weight("balanced", classes=np.arange(10), y=labels).astype("f")
    params = {name: state.params[name] for name in LATER}
    statistics = {name: state.batch_stats.get(name, {}) for name in LATER}
    sgd = optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9, nesterov=True)
    optimizer = optax.chain(optax.clip_by_global_norm(0.05), *sgd)
    optimizer_state = optimizer.init(params)

    @jax.jit
    def gradient(params, statistics, features, labels):
        def loss(params):
            logits, new = after(built, params, statistics, features)
            of_each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return (of_each * jnp.asarray(weights)[labels]).mean(), new

        return jax.value_and_grad(loss, has_aux=True)(params)

    new, total, evaluate = state, 0.0, jax.jit(network.apply)
    for step in range(2):
        images, labels = inputs(built, step)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        features = evaluate(variables, images)[1]["block1"]  # as evaluation has them
        gradients = []
        for part in range(parts):
            (loss, moved), found = gradient(
                params, statistics, features[part::parts], labels[part::parts]
            )
            statistics = statistics | jax.device_get(moved)
            gradients.append(found)
            total += float(loss) * 256 / parts
        mean = jax.tree.map(lambda *leaves: sum(leaves) / parts, *gradients)
        updates, optimizer_state = optimizer.update(mean, optimizer_state, params)
        rate = (0.5, 1.0)[step]  # warm-up
        params = jax.tree.map(lambda p, u, rate=rate: p + rate * u, params, updates)
        new, _ = take_step(new, built.data.train.batch(step))
    new = jax.device_get(new)
    for name in FIRST:
        small.assert_same_bits(new.params[name], state.params[name])
        assert small.distance(new.average["params"][name], state.params[name]) == 0
    small.assert_same_bits(new.batch_stats["block1"], state.batch_stats["block1"])
    assert small.distance({name: new.params[name] for name in LATER}, params) < 1e-5
    for name in LATER[:-1]:
        assert small.distance(new.batch_stats[name], statistics[name]) < 1e-5
    assert float(new.metrics["loss"]) == pytest.approx(total, rel=1e-5)
    kept = [name for name in small.named(new.opt_state) if any(part in name for part in FIRST)]
    assert kept == []  # no momentum of what is frozen takes memory


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_a_frozen_batch_norm_computes_as_in_evaluation_and_keeps_scale_and_bias(mode):
    config = small.tiny(**PLAIN, train__frozen=("batch_norm",), parallel__mode=mode)
    built = small.build(config)
    state = start(built)
    images, labels = inputs(built, 0)
    network = models.create(config.model, 10).clone(block="concat")

    def loss(params):
        logits, _ = network.apply({"params": params, "batch_stats": state.batch_stats}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
    new, sums = small.stepper(built)(state, built.data.train.batch(0))
    assert float(sums["loss"]) / 256 == pytest.approx(float(value), rel=1e-5)
    small.assert_same_bits(new.batch_stats, state.batch_stats)
    rate = float(built.task.learning_rate(0)) * 1.9  # Nesterov's first step

    def expected(path, old, slope):
        is_norm = any("norm" in key.key for key in path)
        return old if is_norm else old - rate * (slope + 1e-4 * old)

    expected = jax.tree_util.tree_map_with_path(expected, state.params, jax.device_get(gradient))
    assert small.distance(new.params, expected) < 1e-5
    old = {name: leaf for name, leaf in small.named(state.params).items() if "norm" in name}
    small.assert_same_bits({name: small.named(new.params)[name] for name in old}, old)


def test_a_frozen_batch_norm_leaves_dropout_on():
    config = small.tiny(**PLAIN | {"model__dropout_rate": 0.5}, train__frozen=("batch_norm",))
    network, image = experiment.build(config).task.model, jnp.ones((2, 8, 8, 1))

    def results(keys):
        variables = network.init(jax.random.key(0), image)
        features = [network.apply(variables, image, train, keys)[1] for train in (True, False)]
        return [found["block1"] for found in features]

    options = {"xla_backend_optimization_level": 0}
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), 2))
    trained, evaluated = jax.jit(results, compiler_options=options)(keys)
    assert np.abs(trained - evaluated).max() > 1e-3


@pytest.mark.parametrize("mode", ["shard_map", pytest.param("pmap", marks=pytest.mark.slow)])
def test_the_classifier_learns_first_from_features_as_evaluation_has_them(mode):
    config = small.tiny(
        **PLAIN | {"model__dropout_rate": 0.2}, train__head_epochs=1, parallel__mode=mode
    )
    built = small.build(config)
    state = start(built)
    images, labels = inputs(built, 0)
    network = models.create(config.model, 10)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits, features = jax.device_get(jax.jit(network.apply)(variables, images))
    # The gradient of softmax regression.
    error = np.asarray(jax.nn.softmax(logits)) - np.eye(10, dtype="f")[labels]
    gradient = {"kernel": features["pooled"].T @ error / 256, "bias": error.mean(0)}
    take_step = built.map(head_step)
    new = jax.device_get(take_step(jax.device_put(state), built.data.train.batch(0))[0])
    rate = float(built.task.learning_rate(0)) * 1.9
    for name, old in state.params["head"]["classifier"].items():
        expected = old - rate * (gradient[name] + 1e-4 * old)
        found = new.params["head"]["classifier"][name]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    parts = set(state.params) - {"head"}
    for part in parts:
        small.assert_same_bits(new.params[part], state.params[part])
    small.assert_same_bits(new.batch_stats, state.batch_stats)
    others = [array for name, array in small.named(new.opt_state).items() if "block" in name]
    assert len(others) > 0 and not any(array.any() for array in others)


def test_a_part_that_is_not_there_is_named():
    parts = ".* it has block1, block2, head, norm, stem, transition1, batch_norm"
    with pytest.raises(UserError, match=r"train.frozen = \('block',\): the network has no part"):
        experiment.build(small.tiny(train__frozen=("block",)))
    with pytest.raises(UserError, match=f"no part 'block1/layer1' {parts}$"):
        experiment.build(small.tiny(train__frozen=("stem", "block1/layer1")))
    with pytest.raises(UserError, match=f"no part 'batch' {parts}$"):
        experiment.build(small.tiny(train__frozen=("batch",)))
    config = small.tiny(train__frozen=("batch_norm",))
    config.model = models.fields("rdnet_cifar", growth_rates=(8,), downsampling=())
    with pytest.raises(UserError, match="no part 'batch_norm' .* it has head, stage1_layer1, "):
        experiment.build(config)
    config.train.frozen = ("stage1",)  # its layers
    assert experiment.build(config).task.model.frozen == ("stage1",)


def test_a_family_that_cannot_freeze_is_refused(monkeypatch):
    monkeypatch.setitem(models.FAMILIES, "plain", Plain)
    config = small.tiny(train__head_epochs=1)
    config.model = ConfigDict({"family": "plain", "width": 4})
    with pytest.raises(UserError, match="train.head_epochs = 1: .* no part 'head' .* has none$"):
        experiment.build(config)
    config.train.head_epochs, config.train.frozen = 0, ("Conv_0",)
    with pytest.raises(UserError, match="the network has no part 'Conv_0' .* it has none$"):
        experiment.build(config)

"""Evaluation sees every image once, on any number of devices; the state is what a restore wants."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from ml_collections import ConfigDict

from densejax import data, models
from densejax.config import UserError
from densejax.data import builders
from densejax.inference import classifier
from densejax.training import experiment as experiments
from densejax.training import result
from densejax.training.step import head_step, train_step
from tests import small


@functools.cache
def built(devices, batch_size=28):
    return small.build(small.tiny(evaluate__batch_size=batch_size), devices)


def random_state(experiment):
    """A state of random numbers, so that no two logits are equal and no feature is dead."""
    random = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jax.device_put(
            np.abs(random.normal(0.2, 0.2, leaf.shape)).astype(leaf.dtype), leaf.sharding
        ),
        experiment.abstract_state,
    )


def plain_evaluation(experiment, state):
    """Means by NumPy over the predictions of the model, all images in one batch."""
    directory = experiment.config.data.directory
    images, labels = builders.read("digits", "test", directory)
    prepared = (images.astype(np.float32) - np.float32(4.8781)) / np.float32(6.0140)
    model = models.create(experiment.config.model, 10)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    size = experiment.config.evaluate.crop_size or 8
    edges = sorted(
        {(y, x) for y in (0, 8 - size) for x in (0, 8 - size)} | {((8 - size) // 2,) * 2}
    )
    crops = [prepared[:, y : y + size, x : x + size] for y, x in edges]
    crops += [crop[:, :, ::-1] for crop in crops] if size < 8 else []
    apply = jax.jit(model.apply)
    logits = [apply(jax.device_get(variables), crop)[0] for crop in crops]
    logits = np.mean(logits, 0, dtype=np.float64)
    log_p = logits - scipy.special.logsumexp(logits, -1, keepdims=True)
    order = np.argsort(-logits, axis=-1)
    return {
        "loss": -log_p[np.arange(len(labels)), labels].mean(),
        "accuracy": (order[:, 0] == labels).mean(),
        "top5_accuracy": (order[:, :5] == labels[:, None]).any(-1).mean(),
    }


def test_evaluation_is_the_plain_mean_over_every_image():
    expected = plain_evaluation(built(1, 256), random_state(built(1, 256)))
    for experiment in (built(1, 256), built(4)):
        assert experiment.data.evaluation["test"].size == 360  # no multiple of either batch size
        measured = experiment.evaluate(random_state(experiment), "test")
        assert measured == pytest.approx(expected, rel=1e-6)


def test_ten_crop_evaluation_takes_the_mean_of_ten_logits():
    experiment = small.build(small.tiny(evaluate__crop_size=5))
    state = random_state(experiment)
    measured = experiment.evaluate(state, "test")
    assert measured == pytest.approx(plain_evaluation(experiment, state), rel=1e-6)


def test_a_network_that_has_diverged_gets_no_credit():
    experiment = built(4)
    state = random_state(experiment)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), state.params)
    with pytest.raises(UserError, match="test_loss = nan"):
        experiment.evaluate(state.replace(params=params), "test")


def test_an_image_that_evaluation_loses_is_an_error(monkeypatch):
    experiment = small.build(small.tiny())
    test = experiment.data.evaluation["test"]
    first = next(test.evaluation())
    monkeypatch.setattr(test, "evaluation", lambda: (batch for batch in [first]))
    with pytest.raises(RuntimeError, match="256 images were evaluated, there are 360"):
        experiment.evaluate(random_state(experiment), "test")


def test_the_abstract_state_is_that_of_the_first_state():
    experiment = built(4)
    state = experiment.init()
    facts = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state)
    assert facts == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), experiment.abstract_state
    )
    assert int(state.step) == 0 and all(
        leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)
    )
    small.assert_same_bits(state, experiment.init())


def test_steps_and_learning_rate_follow_the_configuration():
    experiment = built(4)
    assert experiment.steps == 2 * (1437 // 256)
    rates = [float(experiment.task.learning_rate(step)) for step in range(10)]
    # Two steps of warm-up, drops after 5 and round(7.5) = 8 steps.
    np.testing.assert_allclose(rates, [0.05, *[0.1] * 4, *[0.01] * 3, *[0.001] * 2], rtol=1e-6)


def test_max_steps_is_the_length_of_training_and_of_the_schedule():
    config = small.tiny(train__max_steps=7, optimizer__schedule="linear")
    config.optimizer.warmup_epochs = 0.0
    cut = experiments.build(config)
    assert cut.steps == 7
    rates = [float(cut.task.learning_rate(step)) for step in range(8)]
    np.testing.assert_allclose(rates, [0.1 * (7 - step) / 7 for step in range(8)], atol=1e-8)
    assert experiments.build(small.tiny(train__max_steps=11)).steps == 10  # epochs end before
    with pytest.raises(UserError, match="warmup_epochs = 0.5: .* 0.4 epochs .*max_steps"):
        experiments.build(small.tiny(train__max_steps=2))


def test_augmented_images_are_those_that_the_first_step_takes():
    experiment = built(4)
    key = jax.random.key_data(jax.random.key(np.uint32(0)))
    shown = experiment.augmented(key, experiment.data.train.batch(0), 5)
    # Digits have levels of 0 to 16; each is the stored image, moved by at most a pixel.
    stored = np.asarray(experiment.data.train.batch(0)["image"])[:5]
    either = np.concatenate([stored, stored[:, :, ::-1]]).astype(float)  # mirrored or not
    padded = np.pad(either, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=4.8781) * (255 / 16)
    moves = [
        [
            min(np.abs(padded[m, y : y + 8, x : x + 8] - shown[n]).max() for m in (n, n + 5)) <= 1.1
            for y, x in np.ndindex(3, 3)
        ]
        for n in range(5)
    ]
    assert shown.shape == (5, 8, 8, 1) and np.any(moves, axis=1).all()
    assert not np.array(moves)[:, 4].all()  # some did move


def test_the_computation_takes_the_type_that_is_asked_for():
    built = experiments.build(small.tiny(train__dtype="bfloat16"))
    info, model = built.info, built.task.model
    assert model.dtype == jnp.bfloat16 and info.num_classes == 10
    assert model.batch_norm_axis == "data"
    model = experiments.build(small.tiny(parallel__batch_norm="replica")).task.model
    assert model.batch_norm_axis is None


@pytest.mark.parametrize("key", ["train.batch_size", "evaluate.batch_size"])
def test_batches_must_divide_over_the_devices(key):
    with pytest.raises(UserError, match=f"{key} = 30: .* 4 devices"):
        _ = experiments.build(small.tiny(**{key.replace(".", "__"): 30})).mesh


def test_double_precision_that_jax_does_not_give_is_refused():
    with pytest.raises(UserError, match="train.dtype"):
        experiments.build(small.tiny(train__dtype="float64"))


def test_statistics_that_nobody_knows_are_asked_for(monkeypatch):
    facts = dataclasses.replace(builders.SETS["digits"], mean=(), std=())
    monkeypatch.setitem(builders.SETS, "digits", facts)
    with pytest.raises(UserError, match="data.normalization = 'statistics': none are known"):
        data.preparation(small.tiny())
    scaled = data.preparation(small.tiny(data__normalization="scale"))
    assert (scaled.mean, scaled.std) == ((0.0,), (255.0,))


@pytest.mark.parametrize(
    ("dtype", "precision", "written"),
    [
        ("float32", "float32", "HIGHEST"),
        ("float32", "tensorfloat32", "HIGH"),
        ("bfloat16", "float32", "DEFAULT"),
    ],
)
def test_every_product_has_the_precision_that_is_asked_for(monkeypatch, dtype, precision, written):
    monkeypatch.setattr(experiments, "_in_float32", lambda task: task)  # as on a TPU
    fields = {"train__dtype": dtype, "train__matmul_precision": precision}
    with jax.numpy_dtype_promotion("standard"):
        experiment = small.build(small.tiny(**fields), 1)
        batch = experiments.abstract_batch(experiment.mesh, (8, 8, 1), 32)
        traced = experiment.map(train_step).trace(experiment.abstract_state, batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    lines = [x for x in text.splitlines() if "dot_general" in x or "stablehlo.convolution" in x]
    found = {name for x in lines for name in re.findall(r"\b(DEFAULT|HIGHEST|HIGH)\b", x)}
    unsaid = [x for x in lines if "precision" not in x]  # StableHLO leaves the default out
    assert (found or {"DEFAULT"}) == {written} and len(lines) > 10
    assert not (unsaid and written != "DEFAULT")


def test_a_cpu_that_is_asked_for_bfloat16_computes_in_float32(tmp_path, capsys):
    config = small.tiny(train__dtype="bfloat16", train__epochs=1, train__head_epochs=1)
    with jax.numpy_dtype_promotion("standard"):  # the parts are asked for in bfloat16
        built = small.build(config, 1)
        batch = experiments.abstract_batch(built.mesh, (8, 8, 1), 32)
        for step in (train_step, head_step):
            text = built.map(step).trace(built.abstract_state, batch).lower().as_text()
            assert "bf16" not in text
        assert built.task.model.dtype == jnp.bfloat16
        result.summarise(built, tmp_path, 0)
        run = small.saved(tmp_path / "run", config, (1, built.init(), {}))
        assert classifier.load(run).model.dtype == jnp.float32
    assert "float32 (a CPU is slower in bfloat16)" in capsys.readouterr().out


class Plain(nn.Module):
    """A network as a newcomer writes it: flax's BatchNorm, no field for its axis, no check."""

    num_classes: int

    @nn.compact
    def __call__(self, image, train=False, keys=None):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(image))
        return nn.Dense(self.num_classes)(nn.relu(x).mean((1, 2))), {"final": x}


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_a_newcomer_s_batch_norm_takes_each_device_s_statistics(monkeypatch, mode):
    monkeypatch.setitem(models.FAMILIES, "plain", Plain)
    fields = {"augmentation__shift": 0, "augmentation__flip": False, "train__batch_size": 8}
    config = small.tiny(parallel__mode=mode, **fields)
    config.model = ConfigDict({"family": "plain"})
    built = small.build(config, 4)
    state, batch = built.init(), built.data.train.batch(0)
    new, _ = built.map(train_step)(state, batch)
    images = built.task.preparation.evaluation(jax.device_get(batch["image"]))
    kernel, bias = state.params["Conv_0"]["kernel"], state.params["Conv_0"]["bias"]
    convolved = jax.lax.conv_general_dilated(
        images, jax.device_get(kernel), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    shares = np.split(np.asarray(convolved + jax.device_get(bias), np.float64), 4)
    variance = np.mean([share.var((0, 1, 2)) for share in shares], 0)
    found = new.batch_stats["BatchNorm_0"]["var"]  # flax's momentum is 0.99, its start 1
    np.testing.assert_allclose(found, 0.99 + 0.01 * variance, rtol=1e-6)
    assert np.abs(np.concatenate(shares).var((0, 1, 2)) / variance - 1).max() > 1e-3

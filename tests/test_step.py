"""The step against a second, plain implementation, and as a function of seed and step alone."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from densejax import metrics
from densejax.data.augment import example_keys
from densejax.step import train_step
from tests import runs


@functools.cache
def experiment(batch_norm="global", devices=4, seed=0):
    # Plain descent at rate 1: the change of the parameters is minus the gradient.
    return runs.build(
        runs.tiny(
            seed=seed,
            parallel__batch_norm=batch_norm,
            train__epochs=3,
            optimizer__learning_rate=1.0,
            optimizer__momentum=0.0,
            optimizer__nesterov=False,
            optimizer__weight_decay=0.0,
            optimizer__warmup_epochs=0.0,
        ),
        devices,
    )


@functools.cache
def mapped(*which):
    return experiment(*which).map(train_step)


@functools.cache
def after(steps, *which):
    """(state, metric sums) after some steps."""
    if not steps:
        return experiment(*which).init(), None
    state, _ = after(steps - 1, *which)
    return mapped(*which)(state, experiment(*which).data.train.batch(steps - 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_hand(task, parts, state, images, labels):
    """The mean over equal parts of the batch of (loss, gradient, new statistics)."""
    task = task.task
    model = task.model.clone(batch_norm_axis=None)
    step_key = jax.random.fold_in(jax.random.key(task.seed), state.step)
    keys = example_keys(step_key, jnp.arange(len(labels), dtype=jnp.int32))
    images = task.preparation.training(images, keys)
    size = len(labels) // parts

    def loss_of(params, at):
        (logits, _), updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images[at : at + size],
            train=True,
            keys=jax.random.key_data(keys)[at : at + size],
            mutable=["batch_stats"],
        )
        log_p = jax.nn.log_softmax(logits)
        hit = jnp.take_along_axis(log_p, labels[at : at + size, None], 1)[:, 0]
        smooth = task.label_smoothing
        loss = -((1 - smooth) * hit + smooth * log_p.mean(-1)).mean()
        return loss, updates["batch_stats"]

    value = jax.value_and_grad(loss_of, has_aux=True)
    results = [value(state.params, part * size) for part in range(parts)]
    return jax.tree.map(lambda *leaves: sum(leaves) / parts, *results)


@pytest.mark.parametrize(("batch_norm", "parts"), [("global", 1), ("replica", 4)])
def test_a_step_on_four_devices_is_the_gradient_of_the_mean_loss(batch_norm, parts):
    state, _ = after(2, batch_norm)
    new, sums = after(3, batch_norm)
    batch = jax.device_get(experiment(batch_norm).data.train.batch(2))
    task = types.SimpleNamespace(task=experiment(batch_norm).task)
    (loss, stats), gradient = by_hand(
        task, parts, jax.device_get(state), batch["image"], batch["label"]
    )
    moved = jax.tree.map(jnp.subtract, jax.device_get(state.params), jax.device_get(new.params))
    assert runs.distance(moved, gradient) < 2e-5  # of parameters around 1, as float32
    assert runs.distance(new.batch_stats, stats) < 1e-6
    earlier = float(after(2, batch_norm)[1]["loss"])
    assert float(sums["loss"]) - earlier == pytest.approx(256 * float(loss), rel=1e-5)


def test_a_step_repeats_bitwise_and_does_not_change_its_arguments():
    state, _ = after(1)
    before = jax.device_get(state)
    batch = experiment().data.train.batch(1)
    first, second = (mapped()(state, batch) for _ in range(2))
    runs.assert_same_bits(first, second)
    runs.assert_same_bits(before, state)


def test_the_seed_decides_parameters_order_and_draws():
    assert runs.distance(after(0, "global", 4, 1)[0].params, after(0)[0].params) > 0.1
    batches = [experiment("global", 4, seed).data.train.batch(0)["label"] for seed in (0, 1)]
    assert (np.asarray(batches[0]) != np.asarray(batches[1])).any()
    state, batch = after(0)[0], experiment().data.train.batch(0)  # the same for both
    losses = [float(mapped(*which)(state, batch)[1]["loss"]) for which in ((), ("global", 4, 1))]
    assert losses[0] != losses[1]


def test_the_step_number_decides_the_draws():
    state, batch = after(0)[0], experiment().data.train.batch(0)
    later = state.replace(step=state.step + 1)
    assert float(mapped()(state, batch)[1]["loss"]) != float(mapped()(later, batch)[1]["loss"])


def test_training_metrics_start_anew_after_every_record():
    counts = [int(after(steps)[1]["count"]) for steps in range(1, 8)]
    assert counts == [256, 512, 768, 256, 512, 768, 256]  # log.every_steps = 3
    assert [int(after(steps)[0].metrics["count"]) for steps in range(1, 8)] == counts


def test_metrics_of_a_step_are_those_of_all_devices():
    assert experiment().task.log_every == 3
    means = metrics.means(after(3)[1])
    assert 0 <= means["accuracy"] <= means["top5_accuracy"] <= 1
    assert 0 < means["loss"] < 10


def test_dropout_and_augmentation_are_on():
    task = experiment().task
    assert task.model.dropout_rate == 0.2
    assert task.preparation.flip and task.preparation.shift == 1 and task.label_smoothing == 0.1

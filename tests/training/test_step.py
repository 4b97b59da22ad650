"""The step against a second, plain implementation, and as a function of seed and step alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import small
from tests.programs import shared_programs  # noqa: F401


@functools.cache
def experiment(batch_norm="global", seed=0, accumulate_steps=1):
    changes = {"parallel__batch_norm_group_size": 2} if batch_norm == "groups" else {}
    changes |= {"train__accumulate_steps": accumulate_steps}
    return small.build(small.tiny(seed=seed, parallel__batch_norm=batch_norm, **changes))


@functools.cache
def mapped(*which):
    return small.stepper(experiment(*which))


@functools.cache
def after(steps, *which):
    """(state, metric sums) after some steps."""
    if not steps:
        return experiment(*which).init(), None
    state, _ = after(steps - 1, *which)
    return mapped(*which)(state, experiment(*which).data.train.batch(steps - 1))


def by_hand(task, parts, state, batch, every=False, gradient=True):
    """((loss, (new statistics, images by their rank)), gradient) of each part of the batch.

    A part is a stretch of the batch or, with `every`, every parts-th image of it. Leaves have the
    parts as their first axis. `gradient` may be left out.
    """
    model = task.model.clone(batch_norm_axis=None)

    def loss_of(params, part):
        (logits, _), updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            part["image"],
            train=True,
            keys=part["key"],
            mutable=["batch_stats"],
        )
        log_p = jax.nn.log_softmax(logits)
        hit = jnp.take_along_axis(log_p, part["label"][:, None], 1)[:, 0]
        smooth = task.loss.keywords["smoothing"]
        loss = -((1 - smooth) * hit + smooth * log_p.mean(-1)).mean()
        order = jnp.argsort(-logits, axis=-1) == part["label"][:, None]
        first, five = (order[:, :n].sum(dtype=jnp.float32) for n in (1, 5))
        correct = {"correct": first, "correct_top5": five}
        return loss, (updates["batch_stats"], correct)

    def cut(leaf):
        if every:
            return leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)
        return leaf.reshape(parts, -1, *leaf.shape[1:])

    @jax.jit
    def results(batch):
        step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        keys = jax.vmap(lambda place: jax.random.fold_in(step_key, place))(jnp.arange(256))
        images, labels = task.preparation.training(batch, keys)
        batch = {"image": images, "label": labels, "key": jax.random.key_data(keys)}
        value = jax.value_and_grad(loss_of, has_aux=True) if gradient else loss_of
        return jax.lax.map(lambda part: value(state.params, part), jax.tree.map(cut, batch))

    return results(batch)


@pytest.mark.parametrize(
    ("batch_norm", "parts"),
    [("global", 1), pytest.param("replica", 4, marks=pytest.mark.slow), ("groups", 2)],
)
def test_a_step_on_four_devices_is_that_of_the_mean_loss(batch_norm, parts):
    (state, sums), (new, new_sums) = jax.device_get((after(1, batch_norm), after(2, batch_norm)))
    batch = jax.device_get(experiment(batch_norm).data.train.batch(1))
    results = by_hand(experiment(batch_norm).task, parts, state, batch)
    (loss, (stats, _)), gradient = jax.tree.map(lambda leaf: leaf.mean(0), results)
    # Nesterov momentum 0.9, coupled decay 1e-4 of every parameter, and warm-up's second step.
    trace = lambda state: optax.tree_utils.tree_get(state.opt_state, "trace")  # noqa: E731
    decayed = jax.tree.map(lambda g, p: g + 1e-4 * p, gradient, state.params)
    expected = jax.tree.map(lambda d, t: d + 0.9 * t, decayed, trace(state))
    assert small.distance(trace(new), expected) < 1e-5
    moved = jax.tree.map(lambda p, d, t: p - 0.1 * (d + 0.9 * t), state.params, decayed, expected)
    assert small.distance(new.params, moved) < 1e-6
    assert small.distance(new.batch_stats, stats) < 1e-6
    assert new_sums["loss"] - sums["loss"] == pytest.approx(256 * float(loss), rel=1e-5)
    for name, of_parts in results[0][1][1].items():
        assert 0 < new_sums[name] - sums[name] == of_parts.sum() < 256


def test_micro_batches_are_every_nth_image_one_after_another():
    which = ("global", 0, 4)
    (state, sums), (new, new_sums) = jax.device_get((after(1, *which), after(2, *which)))
    batch = jax.device_get(experiment(*which).data.train.batch(1))
    (losses, (stats, _)), gradient = by_hand(experiment(*which).task, 4, state, batch, every=True)
    decayed = jax.tree.map(lambda g, p: g.mean(0) + 1e-4 * p, gradient, state.params)
    trace = lambda state: optax.tree_utils.tree_get(state.opt_state, "trace")  # noqa: E731
    expected = jax.tree.map(lambda d, t: d + 0.9 * t, decayed, trace(state))
    assert small.distance(trace(new), expected) < 1e-5
    assert new_sums["loss"] - sums["loss"] == pytest.approx(256 * float(losses.mean()), rel=1e-5)
    assert int(new_sums["count"] - sums["count"]) == 256

    def in_turn(old, updated):  # each moves the running statistics by a tenth
        result = old
        for one in updated:
            result = 0.9 * result + (one - 0.9 * old)
        return result

    assert small.distance(new.batch_stats, jax.tree.map(in_turn, state.batch_stats, stats)) < 1e-5


def test_a_step_repeats_bitwise():
    state, batch = after(1)[0], experiment().data.train.batch(1)
    small.assert_same_bits(*(mapped()(state, batch) for _ in range(2)))


def test_the_seed_decides_parameters_order_and_draws():
    assert small.distance(after(0, "global", 1)[0].params, after(0)[0].params) > 0.1
    batches = [experiment("global", seed).data.train.batch(0)["label"] for seed in (0, 1)]
    assert (np.asarray(batches[0]) != np.asarray(batches[1])).any()
    state, batch = after(0)[0], experiment().data.train.batch(0)  # the same but for the key
    keys = state.key, after(0, "global", 1)[0].key
    losses = [float(mapped()(state.replace(key=key), batch)[1]["loss"]) for key in keys]
    assert losses[0] != losses[1]


def test_the_step_number_decides_the_draws():
    state, batch = after(0)[0], experiment().data.train.batch(0)
    later = state.replace(step=state.step + 1)
    assert float(mapped()(state, batch)[1]["loss"]) != float(mapped()(later, batch)[1]["loss"])


def test_training_metrics_start_anew_after_every_record():
    counts = [int(after(steps)[1]["count"]) for steps in range(1, 8)]
    assert counts == [256, 512, 768, 256, 512, 768, 256]  # log.every_steps = 3
    assert [int(after(steps)[0].metrics["count"]) for steps in range(1, 8)] == counts


def test_a_step_that_is_not_finite_changes_nothing_but_the_step():
    state, batch = after(1)[0], experiment().data.train.batch(1)

    def filled(value):
        return state.replace(params=jax.tree.map(lambda p: jnp.full_like(p, value), state.params))

    for huge in (filled(3e38), filled(jnp.nan), state.replace(skipped=state.skipped + 2)):
        new, sums = mapped()(huge, batch)
        skips = huge.skipped is state.skipped
        if skips:
            for part in ("params", "batch_stats", "opt_state", "metrics"):
                small.assert_same_bits(getattr(new, part), getattr(huge, part))
        assert int(new.step) == int(state.step) + 1
        assert new.skipped.tolist() == ([1, 1] if skips else [2, 0])
        assert sums["skipped"].tolist() == new.skipped.tolist()
        done = 1 if skips else 1 - 2  # the schedule does not count what was skipped
        assert float(sums["learning_rate"]) == pytest.approx(
            float(experiment().task.learning_rate(done))
        )


@pytest.mark.parametrize("missing", ["dropout", "shift", "flip"])
def test_dropout_and_augmentation_are_on(missing):
    """The plain implementation, which a step equals, would lose less or more without one."""
    task, (state, _) = experiment().task, jax.device_get(after(0))
    if missing == "dropout":
        changes = {"model": task.model.clone(dropout_rate=0.0)}
    else:
        changes = {"preparation": dataclasses.replace(task.preparation, **{missing: 0})}
    batch = jax.device_get(experiment().data.train.batch(0))
    without = dataclasses.replace(task, **changes)
    losses, _ = by_hand(without, 1, state, batch, gradient=False)
    assert abs(float(after(1)[1]["loss"]) / 256 - float(losses[0])) > 1e-4

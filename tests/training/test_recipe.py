"""Everything of a modern recipe at once: on any devices, resumed bit for bit, lowered for a TPU."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import densejax
from densejax.data.augment import example_keys
from densejax.inference import classifier
from densejax.training import experiment, parallel
from densejax.training.step import train_step
from densejax.weights import store
from tests import small
from tests.test_train import logged, stop_by_a_signal

EVERYTHING = {
    "augmentation__alternate_flip": True,
    "augmentation__policy": "randaugment",
    "augmentation__cutout": 2,
    "augmentation__erasing": 0.5,
    "augmentation__mixup": 0.8,
    "augmentation__cutmix": 1.0,
    "train__accumulate_steps": 2,
    "train__average_decay": 0.9,
    "optimizer__name": "adamw",
    "optimizer__learning_rate": 0.01,
    "evaluate__mirror": True,
    "evaluate__shift": 1,
}


@pytest.mark.parametrize("groups", [{}, {"parallel__batch_norm": "groups"}])
def test_the_global_batch_is_reversed_on_any_devices(groups):
    mesh = parallel.mesh(2 if groups else 0)
    axis = parallel.axis(mesh)

    def step(state, batch):
        wanted = 15 - jax.lax.axis_index(axis) * 4 - jnp.arange(4, dtype=jnp.int32)
        return jax.lax.psum((parallel.reverse(batch, axis) == wanted).sum(), axis)

    batch = jax.device_put(np.arange(16, dtype=np.int32), parallel.split(mesh))
    for mode in ("shard_map",) if groups else ("shard_map", "pmap"):
        assert int(parallel.map_step(step, mesh, mode)(np.int32(0), batch)) == 16


def prepared(devices, mode):
    """What the network gets of a batch, images and probabilities of classes, whole."""
    config = small.tiny(**EVERYTHING, parallel__mode=mode)
    built = small.build(config, devices)
    axis = built.task.axis

    def step(task, key, batch):
        size, device = len(batch["label"]), jax.lax.axis_index(axis)
        positions = device * size + jnp.arange(size, dtype=jnp.int32)
        keys = example_keys(jax.random.wrap_key_data(key), positions)
        partners = functools.partial(parallel.reverse, axis=axis)
        results = task.preparation.training(batch, keys, partners)
        is_here = jnp.arange(devices) == device  # every sum has one term that is not zero
        results = [
            jnp.where(is_here.reshape(-1, *(1,) * part.ndim), part[None], 0) for part in results
        ]
        return jax.lax.psum(results, axis)

    key = jax.random.key_data(jax.random.key(3))
    found = built.map(step)(key, built.data.train.batch(7))
    return [np.asarray(part).reshape(256, *part.shape[2:]) for part in found]


def test_images_and_targets_are_the_same_on_any_devices():
    images, targets = prepared(1, "shard_map")
    for mode in ("shard_map", "pmap"):
        others, other_targets = prepared(4, mode)
        np.testing.assert_array_equal(images, others)
        np.testing.assert_array_equal(targets, other_targets)
    assert images.shape == (256, 8, 8, 1) and targets.shape == (256, 10)
    mixed = (targets > 0).sum(1) == 2  # partners of one class make one-hot targets
    assert 0.8 < mixed.mean() <= 1 and len(np.unique(images, axis=0)) == 256


@pytest.mark.slow
def test_a_step_is_the_same_on_any_devices():
    states = []
    with jax.numpy_dtype_promotion("standard"):  # optax's AdamW itself promotes
        for devices, mode in ((1, "shard_map"), (4, "shard_map"), (4, "pmap")):
            built = small.build(small.tiny(**EVERYTHING, parallel__mode=mode), devices)
            step, state = small.stepper(built), built.start()
            state, sums = step(state, built.data.train.batch(0))
            states.append(jax.device_get(state))
    for state in states[1:]:
        assert small.distance(state.metrics, states[0].metrics) < 1e-5
        assert small.distance(state.batch_stats, states[0].batch_stats) < 1e-5
        means = [optax.tree_utils.tree_get(one.opt_state, "mu") for one in (state, states[0])]
        assert small.distance(*means) < 1e-5  # AdamW's mean of gradients


def newest(config, path):
    with contextlib.closing(experiment.open_checkpoints(config, path)) as checkpoints:
        return experiment.select(experiment.build(config), checkpoints)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_a_run_with_everything_resumes_bit_for_bit(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(parallel, "start", lambda: None)
    config = small.tiny(**EVERYTHING, parallel__mode=mode)
    with jax.numpy_dtype_promotion("standard"):
        assert densejax.train(config, str(tmp_path / "whole"))["steps"] == 10
        assert densejax.train(config, str(tmp_path / "parts"), [stop_by_a_signal]) is None
        assert densejax.train(config, str(tmp_path / "parts"))["steps"] == 10
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    whole, parts = (newest(config, tmp_path / name) for name in ("whole", "parts"))
    small.assert_same_bits(whole, parts)
    small.assert_same_bits(whole.average, classifier.load(tmp_path / "whole").variables)
    small.assert_same_bits(whole.average, store.load(tmp_path / "whole")[1])
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())["test_examples"] == 360


@pytest.mark.slow
def test_a_step_with_everything_is_lowered_for_a_tpu():
    built = experiment.build(small.tiny(**EVERYTHING), jax.devices()[:2])
    batch = experiment.abstract_batch(built.mesh, built.task.image_shape, 256)
    batch["mirrored"] = batch["label"].update(dtype=jnp.bool_)
    with jax.numpy_dtype_promotion("standard"):
        traced = built.map(train_step).trace(built.abstract_state, batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "collective_permute" in text and "all_reduce" in text

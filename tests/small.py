"""The tiny run that the tests of whole runs share: digits, two dense layers, ten steps."""

import contextlib
import functools
import os

import jax
import numpy as np

from densejax import config as schema
from densejax import models
from densejax.runs import checkpoint, files
from densejax.training import experiment, loop, parallel
from densejax.training.step import train_step
from tests.session import ENVIRONMENT as ENVIRONMENT  # of a test's subprocess
from tests.session import FOLDER as SESSION


def tiny(**changes):
    """A configuration of two epochs of five steps; `changes` by dotted key, `__` for the dot."""
    config = schema.default()
    config.name = "tiny"
    config.model = models.fields(
        "densenet_bc_40_12", depth=None, blocks=(1, 1), growth_rate=4, dropout_rate=0.2
    )
    config.data.name = "digits"
    config.data.directory = str(SESSION / "data")
    config.augmentation.shift = 1
    config.train.epochs = 2
    config.train.batch_size = 256
    config.train.label_smoothing = 0.1
    config.optimizer.warmup_epochs = 0.5
    config.evaluate.batch_size = 256  # of 360 test images: the second batch is padded
    config.log.every_steps = 3
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def card(folder, **changes):
    """Writes a card whose configuration is `tiny(**changes)`; returns its path."""
    path = folder / "card.py"
    path.write_text(
        f"from tests import small\n\n\ndef get_config():\n    return small.tiny(**{changes!r})\n"
    )
    return path


def stepper(experiment):
    """The compiled step of the training loop, on a copy of the state: the loop donates it."""
    step, whole = experiment.map(train_step, donate=True), parallel.replicated(experiment.mesh)

    def step_on_copy(state, batch):
        return step(jax.device_put(jax.device_get(state), whole), batch)

    return step_on_copy


def build(config, devices=4):
    """The experiment on the first `devices` devices, with its data."""
    built = experiment.build(config, jax.devices()[:devices])
    _ = built.data
    return built


def saved(path, config, *checkpoints):
    """Makes a run's directory of (step, state, metrics); returns it."""
    path.mkdir()
    files.write_json(path / "config.json", config.to_dict())
    with contextlib.closing(experiment.open_checkpoints(config, path)) as store:
        for one in checkpoints:
            store.save(*one)
    return path


@functools.cache
def trained():
    """The directory of a tiny run of one epoch, made once by each process; read it only."""
    path = SESSION / f"trained-{os.getpid()}"
    if loop.run(tiny(train__epochs=1), str(path), "train"):
        raise RuntimeError("the run failed")
    return path


@functools.cache
def _abstract_state():
    return experiment.build(tiny()).abstract_state


def restored(path):
    """The arrays by name of the newest checkpoint of a tiny run."""
    checkpoints = checkpoint.Checkpoints(path / "checkpoints")
    try:
        return named(checkpoints.restore_latest(_abstract_state()))
    finally:
        checkpoints.close()


def named(tree):
    """Leaves of a tree as NumPy arrays by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(first, second):
    """Both trees have the same names and the same bytes."""
    first, second = named(first), named(second)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name].tobytes() != second[name].tobytes()] == []


def distance(first, second):
    """The largest difference of two trees, as a share of the largest entry of its array."""
    first, second = named(first), named(second)
    assert first.keys() == second.keys()
    return max(
        np.abs(first[name] - second[name]).max() / max(np.abs(second[name]).max(), 1e-30)
        for name in first
    )

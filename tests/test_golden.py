"""Three training steps, pinned: numbers move only when somebody means to move them."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from densejax import config as schema
from densejax import models, optimizer, parallel, step
from densejax.data.augment import Preparation
from densejax.data.memory import MemorySet

FILE = pathlib.Path(__file__).parent / "golden.json"


def three_steps() -> list[dict[str, float]]:
    """What each of three steps on digits has seen, and how far the state has moved."""
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[..., None], digits.target.astype(np.int32)
    mesh = parallel.mesh()
    batches = MemorySet(images, labels, 64, 0, parallel.replicated(mesh), parallel.split(mesh))
    fields = models.fields("densenet_bc_40_12", depth=16, growth_rate=4, dropout_rate=0.2)
    rate = optimizer.schedule(schema.default().optimizer, 30, 10, 64)
    task = step.Task(
        model=models.create(fields, 10, batch_norm_axis=parallel.AXIS),
        optimizer=optimizer.create(schema.default().optimizer, rate),
        learning_rate=rate,
        preparation=Preparation((4.9,), (6.0,), shift=1, flip=True),
        image_shape=(8, 8, 1),
        label_smoothing=0.1,
    )
    take_step = parallel.map_step(functools.partial(step.train_step, task), mesh, "shard_map")
    state = jax.jit(functools.partial(step.init_state, task))(np.uint32(0))
    state = jax.device_put(state, parallel.replicated(mesh))
    start, records = jax.device_get(state), []
    for number in range(3):
        state, sums = take_step(state, batches.batch(number))
        moved = jax.tree.map(lambda new, old: np.abs(new - old).sum(), jax.device_get(state), start)
        records.append(
            {
                "loss": float(sums["loss"]),
                "correct": float(sums["correct"]),
                "params_moved": float(sum(jax.tree.leaves(moved.params))),
                "batch_stats_moved": float(sum(jax.tree.leaves(moved.batch_stats))),
            }
        )
    return records


def test_three_steps_are_as_they_were():
    for now, then in zip(three_steps(), json.loads(FILE.read_text()), strict=True):
        for name, value in then.items():
            assert now[name] == pytest.approx(value, rel=1e-4), (
                f"{name} has moved. If the change is meant to move numbers, say why in "
                f"CHANGELOG.md and run: .venv/bin/python -m tests.test_golden"
            )


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (the session's devices)

    FILE.write_text(json.dumps(three_steps(), indent=2) + "\n")

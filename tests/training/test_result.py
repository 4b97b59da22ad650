"""What a run says before its first step."""

import os

import pytest

from densejax.training import result
from tests import small


@pytest.mark.parametrize(
    ("cores", "devices", "changes", "is_said"),
    [
        (2, 1, {}, True),
        (1, 1, {}, False),
        (2, 2, {}, False),
        (3, 1, {}, False),  # 64 images to train
        (3, 1, {"train__batch_size": 96}, False),  # 64 images to evaluate
        (3, 1, {"train__batch_size": 96, "evaluate__batch_size": 99}, True),
        (2, 1, {"train__accumulate_steps": 64}, False),
        (2, 1, {"parallel__batch_norm": "replica"}, False),
    ],
)
def test_cores_that_are_no_devices_are_named(monkeypatch, cores, devices, changes, is_said):
    config = small.tiny(**{"train__batch_size": 64, "evaluate__batch_size": 64} | changes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    said = result.unused_cores(devices, config)
    assert bool(said) == is_said
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert said == result.unused_cores(devices, config)
    assert all(line.startswith(f"JAX_NUM_CPU_DEVICES={cores} ") for line in said)

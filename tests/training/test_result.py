"""What a run says before its first step."""

import os

import pytest

from densejax.training import result


@pytest.mark.parametrize(
    ("cores", "devices", "batch_size", "is_said"),
    [(2, 1, 64, True), (1, 1, 64, False), (2, 2, 64, False), (3, 1, 64, False)],
)
def test_cores_that_are_no_devices_are_named(monkeypatch, cores, devices, batch_size, is_said):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    said = result.unused_cores(devices, batch_size)
    assert bool(said) == is_said
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert said == result.unused_cores(devices, batch_size)
    assert all(line.startswith(f"JAX_NUM_CPU_DEVICES={cores} ") for line in said)

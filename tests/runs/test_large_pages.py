"""When training starts itself again. tests/training/test_loop.py does it with a real process."""

import importlib.util
import os
import sys

import pytest

from densejax.runs import large_pages


@pytest.mark.parametrize(
    "environment, plugin, starts_again",
    [
        ({}, None, True),
        ({"JAX_PLATFORMS": "cpu"}, "jax_plugins", True),
        ({}, "jax_plugins", False),
        ({}, "libtpu", False),
        ({"JAX_PLATFORMS": "cuda,cpu"}, None, False),
        ({"GLIBC_TUNABLES": ""}, None, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=3"}, None, False),
    ],
)
def test_a_process_starts_again_on_a_cpu_alone(monkeypatch, environment, plugin, starts_again):
    started = []
    monkeypatch.setattr(os, "environ", {"HOME": "/home"} | environment)
    monkeypatch.setattr(os, "execve", lambda *words: started.append(words))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == plugin or None)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "densejax.main", "--config=a b.py"])
    monkeypatch.setattr(sys, "platform", "linux")
    large_pages.use()
    words = [sys.executable, "-m", "densejax.main", "--config=a b.py"]
    expected = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert started == [(sys.executable, words, expected)] * starts_again
    assert not large_pages.are_used()
    monkeypatch.setattr(os, "environ", expected)
    large_pages.use()
    assert large_pages.are_used() and len(started) == starts_again

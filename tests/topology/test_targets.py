"""Devices as they are described, and topologies by name."""

import importlib.util

import jax
import pytest

from densejax.config import UserError
from densejax.topology import targets


def test_targets_are_described():
    assert {"v5e", "v5p", "v6e", "h100"} <= set(targets.targets())
    assert targets.target("v5e").memory_bytes_per_second == 819e9
    assert "gpu_device_info" in targets.target("h100").compiler["target_config"]
    for target in targets.targets().values():
        assert target.source.startswith("https://")
        assert target.latency_source.startswith("https://")
    with pytest.raises(UserError, match="target = 'v9': allowed are h100, v5e, v5p, v6e"):
        targets.target("v9")
    with pytest.raises(UserError, match="topology 'h100:16': at most 8 devices; links between"):
        targets.topology("h100:16")


def test_forced_devices():
    assert len(jax.devices()) == 4  # it has started: what runs alone or first would start with 3
    target, devices, shape = targets.topology("cpu:3")
    assert (target, devices, shape) == (None, jax.devices()[:3], (3,))
    with pytest.raises(UserError, match="topology 'cpu:9': JAX has started with 4 devices"):
        targets.topology("cpu:9")


@pytest.mark.parametrize("text", ["", "v5e", "v5e:", "v5e:4x", "v9:2x2", "cpu:2x2", "h100:0"])
def test_an_unknown_topology_names_the_known(text):
    with pytest.raises(UserError, match=f"topology '{text}': .* cpu:1, h100:1, v5e:2x2, v5p:2x2x1"):
        targets.topology(text)


@pytest.mark.parametrize("text", ["v5e:2x2", "h100:8"])
def test_a_missing_compiler_names_its_extra(text):
    target = targets.target(text.partition(":")[0])
    extra = target.compiler["platform"]
    if importlib.util.find_spec(targets.COMPILERS[extra]):
        pytest.skip(f"the extra {extra!r} is installed")
    with pytest.raises(UserError, match=rf"its compiler is missing; .* 'densejax-lab\[{extra}\]'"):
        targets.topology(text)

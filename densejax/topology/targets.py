"""Devices to compile for: what their makers publish. They need not be there.

A file of `densejax/targets` describes each of them.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re

import jax
from etils import epath
from jax.experimental import topologies

from densejax.config import UserError

COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}  # package of the compiler, by extra


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, by what its maker publishes.

    Attributes:
      device: its name.
      bfloat16_flops_per_second: of matrix products, without sparsity.
      memory_bytes_per_second: to and from the main memory.
      memory_bytes: size of the main memory.
      interconnect_bytes_per_second: over all its links, both directions together.
      source: where these are published.
      smallest: shape of the smallest slice that the compiler knows, such as "2x2".
      largest: how many devices the links join; 0: a slice may have any shape.
      ring_size: how many devices along an axis of a slice close a ring; fewer form a line.
      both_ways: whether a ring sends in both directions at once.
      collective_seconds: what every collective takes, even if it sends little.
      hop_seconds: what each hop to a neighbour adds.
      latency_source: where these two come from; they are assumed, not published.
      compiler: arguments of `jax.experimental.topologies.get_topology_desc`; "{shape}" stands for
        the slice's shape, and "target_config" is the text of an XLA GpuTargetConfig.
    """

    device: str
    bfloat16_flops_per_second: float
    memory_bytes_per_second: float
    memory_bytes: float
    interconnect_bytes_per_second: float
    source: str
    smallest: str
    largest: int
    ring_size: int
    both_ways: bool
    collective_seconds: float
    hop_seconds: float
    latency_source: str
    compiler: dict[str, str]

    def devices(self, shape: str = "") -> list[jax.Device]:
        """The devices of a slice, "16x16", or of a box, "8", to compile for.

        Call this before JAX has started; devices that are there are not used.

        Raises:
          UserError: the compiler is not installed, or knows no such slice.
        """
        shape = shape or self.smallest
        jax.config.update("jax_platforms", "cpu")  # use no real device of this kind
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # and ask for no real TPU machine
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU gets locked
        compiler = {key: text.replace("{shape}", shape) for key, text in self.compiler.items()}
        extra = compiler["platform"]
        try:
            return list(topologies.get_topology_desc(**compiler).devices)
        except Exception as error:  # each plugin has errors of its own
            if importlib.util.find_spec(COMPILERS[extra]) is None:
                raise UserError(
                    f"{self.device}: its compiler is missing; pip install 'densejax-lab[{extra}]'"
                ) from error
            why = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
            raise UserError(
                f"{self.device}: its compiler knows no slice {shape} ({why}); the smallest is "
                f"{self.smallest}"
            ) from error


@functools.cache
def targets() -> dict[str, Target]:
    """All described devices, by the name of their file."""
    folder, found = epath.resource_path("densejax") / "targets", {}
    for path in sorted(folder.glob("*.json")):
        described = json.loads(path.read_text())
        if config := described["compiler"].get("target_config"):
            described["compiler"]["target_config"] = (folder / config).read_text()
        found[path.stem] = Target(**described)
    return found


def target(name: str) -> Target:
    """One device by name (raises UserError)."""
    if name not in targets():
        raise UserError(f"target = {name!r}: allowed are {', '.join(targets())}")
    return targets()[name]


def topology(text: str) -> tuple[Target | None, list[jax.Device], tuple[int, ...]]:
    """(target, devices, their shape) of "v5e:16x16"; "cpu:8" simulates devices and has no target.

    Raises:
      UserError: the topology is unknown, or its compiler is not installed.
    """
    name, _, shape = text.partition(":")
    wanted = r"[1-9]\d*" if name == "cpu" else r"[1-9]\d*(x[1-9]\d*)*"
    if name not in ("cpu", *targets()) or not re.fullmatch(wanted, shape):
        known = ", ".join(f"{name}:{each.smallest}" for name, each in targets().items())
        raise UserError(f"topology {text!r}: give a device and a shape of cpu:1, {known} or larger")
    sides = tuple(map(int, shape.split("x")))
    if name != "cpu":
        found = target(name)
        if found.largest and math.prod(sides) > found.largest:
            raise UserError(
                f"topology {text!r}: at most {found.largest} devices; links between boxes are not "
                f"described"
            )
        return found, found.devices(shape), sides
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has already started
        jax.config.update("jax_num_cpu_devices", sides[0])
    if (count := len(jax.devices())) < sides[0]:
        raise UserError(f"topology {text!r}: JAX has started with {count} devices")
    return None, jax.devices()[: sides[0]], sides

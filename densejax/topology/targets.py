"""Devices that need not be there: what their makers publish, and their compilers' topologies.

Each is described by `densejax/targets/*.json`; another one is another file.
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

COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}  # extra: the package that compiles


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, as its maker publishes it.

    Attributes:
      device: its name.
      bfloat16_flops_per_second: of matrix products, without sparsity.
      memory_bytes_per_second: to and from the main memory.
      memory_bytes: size of the main memory.
      interconnect_bytes_per_second: over all its links, both directions together.
      source: where that is published.
      smallest: shape of the smallest slice that there is to compile for, such as "2x2".
      largest: number of devices that its links join; 0: a slice may have any shape.
      ring_size: devices along an axis of a slice that close a ring; fewer are a line.
      both_ways: whether a ring's messages go round both ways at once.
      collective_seconds: what every collective takes however little it sends.
      hop_seconds: what each of its hops to a neighbour adds.
      latency_source: where these two are from: they are assumed, not published.
      compiler: arguments of `jax.experimental.topologies.get_topology_desc`, "{shape}" where a
        slice's shape comes; "target_config" is the text of an XLA GpuTargetConfig.
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

        They need not be there, and what is there is left alone: call it before JAX has started.

        Raises:
          UserError: the compiler is not installed, or knows no such slice.
        """
        shape = shape or self.smallest
        jax.config.update("jax_platforms", "cpu")  # a target's own devices are not wanted
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor is the machine that a TPU stands in
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here locks a TPU
        compiler = {key: text.replace("{shape}", shape) for key, text in self.compiler.items()}
        extra = compiler["platform"]
        try:
            return list(topologies.get_topology_desc(**compiler).devices)
        except Exception as error:  # as many kinds as there are plugins
            if importlib.util.find_spec(COMPILERS[extra]) is None:
                raise UserError(
                    f"{self.device}: its compiler is missing; pip install 'densejax[{extra}]'"
                ) from error
            why = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
            raise UserError(f"{self.device}: no {shape}, such as {self.smallest}: {why}") from error


@functools.cache
def targets() -> dict[str, Target]:
    """All devices that are described, by the name of their file."""
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
    """(target, devices, their shape) of "v5e:16x16"; "cpu:8" are forced devices and no target.

    Raises:
      UserError: no such topology, or its compiler is not installed.
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
                f"topology {text!r}: {found.largest} devices are joined by the links that are "
                f"described; what lies between such boxes is not"
            )
        return found, found.devices(shape), sides
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started, with the devices that it has
        jax.config.update("jax_num_cpu_devices", sides[0])
    if (count := len(jax.devices())) < sides[0]:
        raise UserError(f"topology {text!r}: JAX has started with {count} devices")
    return None, jax.devices()[: sides[0]], sides

"""The fastest that a training step can be on a device: its FLOPs, or the bytes that must move.

Devices are described by `densejax/targets/*.json`; another one is another file.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import topologies

from densejax.analysis import counts
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
      ring_size: devices along an axis of a slice that close a ring; fewer are a line.
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
    ring_size: int
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


def communication(target: Target, shape: Sequence[int], size: float, count: int) -> float:
    """Seconds that the all-reduces of a step take at least, one after another.

    Ring all-reduce: of N devices each sends 2 (N - 1) / N of the bytes, over all of its links at
    once (half of them where an axis is too short to close a ring), and 2 (d - 1) hops along each
    axis of d devices pass before the last has its result.

    Args:
      target: the device.
      shape: of the slice, such as (16, 16).
      size: bytes of one device that are reduced, in all.
      count: all-reduces.
    """
    devices = math.prod(shape)
    if devices == 1:
        return 0.0
    sends = target.interconnect_bytes_per_second / (2 if min(shape) >= target.ring_size else 4)
    hops = sum(2 * (side - 1) for side in shape)
    latency = target.collective_seconds + hops * target.hop_seconds
    return 2 * (devices - 1) / devices * size / sends + count * latency


@dataclasses.dataclass(frozen=True)
class Work:
    """What a training step cannot do without: bytes through the main memory, and FLOPs."""

    bytes: float
    flops: float

    def bound(self, target: Target) -> tuple[float, str]:
        """(seconds of one step at least, whether "bytes" or "flops" take them)."""
        seconds = {
            "bytes": self.bytes / target.memory_bytes_per_second,
            "flops": self.flops / target.bfloat16_flops_per_second,
        }
        limit = max(seconds, key=seconds.get)
        return seconds[limit], limit


def training(
    model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, dtype: str = "bfloat16"
) -> Work:
    """The work of one training step, by this model.

    Every input of a convolution passes the main memory once forward and five times backward: the
    gradient of the weights reads it, ReLU's mask and the gradient of BatchNorm's scale read it, and
    its own gradient is read, added to and written, and read once more to take away what BatchNorm's
    mean and variance owe. Batch statistics cost nothing: they are taken when a feature map is made,
    once for all layers that read it. Whatever else is fused. Parameters, their gradients and the
    momentum pass six times, in float32. FLOPs are six per multiply-add: two forward, four backward.
    What stays in a TPU's own 128 MiB does not pass the main memory: small batches can do with less.

    Args:
      model: from densejax.models.create.
      image_shape: height, width, channels.
      batch_size: images of one device.
      dtype: of the feature maps.
    """
    parameters, multiply_adds = counts.of_network(model, image_shape)
    features = counts.convolution_inputs(model, image_shape) * jnp.dtype(dtype).itemsize
    return Work(6 * (batch_size * features + 4 * parameters), 6.0 * batch_size * multiply_adds)

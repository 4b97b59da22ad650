"""The fastest that a training step can be on a device: its FLOPs, or the bytes that must move.

Devices are described by `densejax/targets/*.json`; another one is another file.
"""

import dataclasses
import functools
import json

import flax.linen as nn
import jax.numpy as jnp
from etils import epath

from densejax.analysis import counts
from densejax.config import UserError


@dataclasses.dataclass(frozen=True)
class Target:
    """A device, as its maker publishes it.

    Attributes:
      device: its name.
      bfloat16_flops_per_second: of matrix products, without sparsity.
      memory_bytes_per_second: to and from the main memory.
      memory_bytes: size of the main memory.
      interconnect_bytes_per_second: to its neighbours, both directions together.
      source: where that is published.
      compiler: arguments of `jax.experimental.topologies.get_topology_desc`; "target_config" is
        the text of an XLA GpuTargetConfig.
    """

    device: str
    bfloat16_flops_per_second: float
    memory_bytes_per_second: float
    memory_bytes: float
    interconnect_bytes_per_second: float
    source: str
    compiler: dict[str, str]


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

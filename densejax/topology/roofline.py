"""The fastest that a training step can be on a device: its FLOPs, or the bytes that must move."""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from densejax.models import counts
from densejax.topology.targets import Target


def communication(target: Target, shape: Sequence[int], size: float, count: int) -> float:
    """Seconds that the all-reduces of a step take at least, one after another.

    Ring all-reduce: of N devices each sends 2 (N - 1) / N of the bytes over the links of all axes
    at once, of which a line (an axis too short to close a ring) has half. Before the last device
    has its result, 2 (d - 1) hops pass along each axis of d devices, d where a closed ring is used
    both ways (https://jax-ml.github.io/scaling-book/sharding).

    Args:
      target: the device.
      shape: of the slice, such as (16, 16).
      size: bytes of one device that are reduced, in all.
      count: all-reduces.
    """
    devices = math.prod(shape)
    if devices == 1:
        return 0.0
    rings = [side >= target.ring_size for side in shape if side > 1]
    share = sum(1.0 if ring else 0.5 for ring in rings) / len(shape)
    sends = target.interconnect_bytes_per_second / 2 * share
    hops = sum(
        side if target.both_ways and side >= target.ring_size else 2 * (side - 1) for side in shape
    )
    latency = target.collective_seconds + hops * target.hop_seconds
    return 2 * (devices - 1) / devices * size / sends + count * latency


def weak_scaling(
    target: Target, shape: Sequence[int], seconds: float, size: float, count: int
) -> dict[str, float]:
    """What `communication` adds to a step of so many seconds, and t / (t + c) of the two."""
    waits = communication(target, shape, size, count)
    return {"communication_seconds": waits, "efficiency": seconds / (seconds + waits)}


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

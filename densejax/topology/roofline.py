"""The least time that a step takes on a device: by its FLOPs, its bytes or its all-reduces."""

import dataclasses
import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from densejax.models import counts
from densejax.topology.targets import Target


def communication(target: Target, shape: Sequence[int], size: float, count: int) -> float:
    """Seconds that the all-reduces of a step take at least, one after another.

    In a ring all-reduce each of N devices sends 2 (N - 1) / N of the bytes, over the links of all
    axes at once. A line, which is an axis too short to close a ring, has half of an axis' links.
    Before the last device has its result, the data make 2 (d - 1) hops along each axis of d
    devices, or d hops where a closed ring is used in both directions
    (https://jax-ml.github.io/scaling-book/sharding).

    Args:
      target: the device.
      shape: of the slice, such as (16, 16).
      size: bytes of one device that are reduced, in all.
      count: number of all-reduces.
    """
    devices = math.prod(shape)
    if devices == 1:
        return 0.0
    rings = [side >= target.ring_size for side in shape if side > 1]
    share = sum(1.0 if ring else 0.5 for ring in rings) / len(shape)
    sent_per_second = target.interconnect_bytes_per_second / 2 * share
    hops = sum(
        side if target.both_ways and side >= target.ring_size else 2 * (side - 1) for side in shape
    )
    latency = target.collective_seconds + hops * target.hop_seconds
    return 2 * (devices - 1) / devices * size / sent_per_second + count * latency


def weak_scaling(
    target: Target, shape: Sequence[int], seconds: float, size: float, count: int
) -> dict[str, float]:
    """What `communication` adds to a step of t seconds, c, and the efficiency t / (t + c)."""
    added = communication(target, shape, size, count)
    return {"communication_seconds": added, "efficiency": seconds / (seconds + added)}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step takes at least: bytes through the main memory, and FLOPs."""

    bytes: float
    flops: float

    def bound(self, target: Target) -> tuple[float, str]:
        """(seconds that a step takes at least, "bytes" or "flops": which of them limits it)."""
        seconds = {
            "bytes": self.bytes / target.memory_bytes_per_second,
            "flops": self.flops / target.bfloat16_flops_per_second,
        }
        limit = max(seconds, key=seconds.get)
        return seconds[limit], limit


def training(
    model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, dtype: str = "bfloat16"
) -> Cost:
    """The least cost of one training step.

    Every input of a convolution passes the main memory once forward and five times backward: it is
    read for the gradient of the weights; it is read for ReLU's mask and the gradient of BatchNorm's
    scale; its own gradient is read, added to and written, and read again to subtract the part of
    BatchNorm's mean and variance. Batch statistics are free: they are taken when a feature map is
    made, once for all layers that read it. Everything else is fused. Parameters, their gradients
    and the momentum pass six times, in float32. A multiply-add costs six FLOPs: two forward and
    four backward. Small batches can need less, where values stay in a TPU's own 128 MiB.

    Args:
      model: from densejax.models.create.
      image_shape: height, width, channels.
      batch_size: images of one device.
      dtype: of the feature maps.
    """
    parameters, multiply_adds = counts.of_network(model, image_shape)
    features = counts.convolution_inputs(model, image_shape) * jnp.dtype(dtype).itemsize
    return Cost(6 * (batch_size * features + 4 * parameters), 6.0 * batch_size * multiply_adds)

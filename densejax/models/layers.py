"""What every network shares: bound convolutions and norms, dropout, stems and the head."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax.config import UserError

# He et al. 2015 with fan-out, std = sqrt(2 / (k * k * c_out)): as in the DenseNet authors' code.
fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): the classifier's weights in the authors' code.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class Layers:
    """What a network builds from, with precision, BatchNorm's meaning and dropout bound once.

    Attributes:
      conv: `conv(features, (height, width), name=...)`, padded as PyTorch pads ("same" for odd
        kernels, and at stride 2 the same on both sides).
      norm: `norm(name=...)`, BatchNorm with statistics in float32.
      dropout: `dropout(x, name=...)`, one independent draw per element.
      survive: `survive(x, probability, name=...)`, stochastic depth: one draw per example.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    dropout: Callable[..., jax.Array]
    survive: Callable[..., jax.Array]


def bind(
    *,
    train: bool,
    dtype: Any,
    batch_norm_axis: str | None,
    epsilon: float = 1e-5,
    convolution_bias: bool = False,
    dropout_rate: float = 0.0,
    keys: jax.Array | None = None,
) -> Layers:
    """Binds the policy of one forward pass.

    Args:
      train: batch statistics and dropout if true, running statistics if false.
      dtype: precision of the computation; parameters and statistics stay float32.
      batch_norm_axis: mapped axis over which BatchNorm averages its statistics; None: this
        replica's examples only.
      epsilon: added to BatchNorm's variance.
      convolution_bias: whether convolutions add a bias.
      dropout_rate: fraction of elements that are dropped when `train`.
      keys: uint32 [batch, 2], one random key per example; needed for dropout and stochastic depth.
    """
    norm = functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        axis_name=batch_norm_axis if train else None,
        momentum=0.9,  # 0.1 in PyTorch's sense
        epsilon=epsilon,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large
        dtype=dtype,
    )
    conv = functools.partial(
        convolution, dtype=dtype, use_bias=convolution_bias, kernel_init=fan_out_normal
    )
    rate = dropout_rate if train else 0.0
    return Layers(
        conv,
        norm,
        lambda x, name: Dropout(rate, name=name)(x, keys),
        lambda x, probability, name: StochasticDepth(probability, name=name)(x, train, keys),
    )


def convolution(features: int, kernel_size: tuple[int, int], strides: int = 1, **rest) -> nn.Module:
    """A convolution with PyTorch's padding: flax's "SAME" shifts the image by one at stride 2."""
    if kernel_size == (1, 1) and strides == 1:
        return Pointwise(features, **rest)
    padding = tuple((size // 2, size // 2) for size in kernel_size)
    return nn.Conv(features, kernel_size, strides=strides, padding=padding, **rest)


class Pointwise(nn.Module):
    """A 1x1 convolution written as the matrix product it is, with nn.Conv's parameters.

    XLA fuses what comes before and after into a product, which it does not for a convolution.
    """

    features: int
    use_bias: bool
    dtype: Any
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [batch, height, width, channels] to [batch, height, width, features]."""
        shape = (1, 1, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        y = x.astype(self.dtype).reshape(-1, shape[2]) @ kernel[0, 0]
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            y += self.param("bias", zeros, (self.features,)).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


def hash_bits(keys: jax.Array, salt: int, size: int) -> jax.Array:
    """Random bits from a counter: uint32 [batch, size] from keys uint32 [batch, 2].

    MurmurHash3's finaliser (Appleby), applied to the element's number with each word of its
    example's key. A mask depends on the example's key and place alone, never on how the batch is
    laid out over devices, and it compiles in a blink where a threefry draw takes seconds.
    """

    def mix(bits):
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        return bits ^ (bits >> 16)

    first, second = (mix(keys[:, i : i + 1] ^ jnp.uint32(salt)) for i in range(2))
    counter = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    return mix(mix(counter[None] ^ first) + second)


class Dropout(nn.Module):
    """Element-wise dropout (Srivastava et al. 2014) with one key per example."""

    rate: float

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        """Drops elements of x [batch, ...] with keys uint32 [batch, 2]; scales up what is left."""
        if self.rate == 0.0:
            return x
        if keys is None:
            raise ValueError("dropout in training needs `keys`, one for each example")
        salt = zlib.crc32("/".join(self.path).encode())  # a stream of its own for every layer
        bits = hash_bits(keys, salt, x[0].size).reshape(x.shape)
        keep = bits >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(keep, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros_like(x))


class StochasticDepth(nn.Module):
    """Drops whole branches at random (Huang et al., arXiv:1603.09382), each example by itself.

    As in the paper a branch that survives is not scaled in training, and every branch is scaled by
    its probability of survival afterwards. The paper draws once for a mini-batch.
    """

    probability: float

    def __call__(self, x: jax.Array, train: bool, keys: jax.Array | None) -> jax.Array:
        """Drops examples of x [batch, ...] with keys uint32 [batch, 2], or scales x."""
        if self.probability == 1.0:
            return x
        if not train:
            return x * jnp.asarray(self.probability, x.dtype)
        salt = zlib.crc32("/".join(self.path).encode())
        bits = hash_bits(keys, salt, 1).reshape(-1, *(1,) * (x.ndim - 1))
        keep = bits >= jnp.uint32(round((1 - self.probability) * 2**32))
        return jnp.where(keep, x, jnp.zeros_like(x))


def average_pool(x: jax.Array) -> jax.Array:
    """2x2 average pooling, stride 2, of x [batch, height, width, channels]; odd edges drop out."""
    batch, height, width, channels = x.shape
    if min(height, width) < 2:
        raise UserError(
            f"feature maps of {height}x{width} cannot be halved: the network has too many blocks "
            f"for these images; set data.image_size to enlarge them"
        )
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    # A reshaped mean: its gradient is a broadcast, where a window's would be a scatter.
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class CifarStem(nn.Module):
    """One 3x3 convolution, stride 1: no norm, no pooling (as the authors' CIFAR networks)."""

    width: int
    layers: Layers

    @nn.compact
    def __call__(self, image):
        """Maps image [batch, height, width, channels] to features of the same height and width."""
        return self.layers.conv(self.width, (3, 3), name="conv")(image)


class ImageNetStem(nn.Module):
    """7x7 convolution, stride 2; BatchNorm, ReLU; 3x3 max-pooling, stride 2 (paper, Table 1)."""

    width: int
    layers: Layers

    @nn.compact
    def __call__(self, image):
        """Maps image [batch, height, width, channels] to a quarter of its height and width."""
        x = self.layers.conv(self.width, (7, 7), 2, name="conv")(image)
        x = nn.relu(self.layers.norm(name="norm")(x))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


STEMS = {"cifar": CifarStem, "imagenet": ImageNetStem}


class Head(nn.Module):
    """Global average pooling and the linear classifier; logits are float32, None of 0 classes."""

    num_classes: int

    @nn.compact
    def __call__(self, features):
        """Maps features [batch, height, width, channels] to (logits, pooled features)."""
        wide = jnp.float64 if features.dtype == jnp.float64 else jnp.float32
        pooled = features.mean((1, 2), dtype=wide)
        if self.num_classes == 0:
            return None, pooled
        classifier = nn.Dense(self.num_classes, kernel_init=fan_in_uniform, name="classifier")
        return classifier(pooled), pooled

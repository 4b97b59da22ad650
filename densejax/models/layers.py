"""What every network shares: how its layers are built, stems, the head, and checks of fields."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax.config import UserError
from densejax.models.convolution import Convolution
from densejax.models.normalization import BatchNorm, at_least_float32
from densejax.models.pooling import max_pool
from densejax.models.regularization import Dropout, StochasticDepth, raw_keys

# He et al. 2015 with fan-out, std = sqrt(2 / (k * k * c_out)): as in the DenseNet authors' code.
fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)): the classifier's weights in the authors' code.
fan_in_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class Layers:
    """Builds the layers of a network for one forward pass, all with the same settings.

    Attributes:
      train: use batch statistics, dropout and stochastic depth; false: use running statistics.
      dtype: precision of the computation; parameters and statistics stay float32.
      batch_norm_axis: mapped axis (or axes) over which BatchNorm averages its statistics; None:
        this replica's examples only.
      batch_norm_epsilon: added to BatchNorm's variance.
      convolution_bias: whether convolutions add a bias.
      kernel_init: initial values of convolutions' kernels.
      dropout_rate: fraction of elements that are dropped when `train`.
      keys: uint32 [batch, 2], one random key per example; needed for dropout and stochastic depth.
      frozen: parts of the network that run as in evaluation; "batch_norm": every BatchNorm does.
    """

    train: bool
    dtype: Any = jnp.float32
    batch_norm_axis: Any = None
    batch_norm_epsilon: float = 1e-5
    convolution_bias: bool = False
    kernel_init: nn.initializers.Initializer = fan_out_normal
    dropout_rate: float = 0.0
    keys: jax.Array | None = None
    frozen: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module, train: bool, keys: jax.Array | None, images: jax.Array):
        """Takes the settings from the fields of a module that have the same names."""
        names = {field.name for field in dataclasses.fields(cls)} - {"train", "keys"}
        settings = {name: getattr(module, name) for name in names if hasattr(module, name)}
        return cls(train=train, keys=raw_keys(keys, images), **settings)

    def part(self, name: str) -> "Layers":
        """The same settings for a part of the network, which may be frozen."""
        is_frozen = any(belongs(name, part) for part in self.frozen)
        return dataclasses.replace(self, train=self.train and not is_frozen)

    def conv(
        self,
        features: int,
        size: tuple[int, int],
        strides: int = 1,
        name: str | None = None,
        groups: int = 1,
    ) -> Convolution:
        """A convolution with a kernel of `size` (height, width), in `groups` of channels."""
        settings = (self.convolution_bias, self.dtype, self.kernel_init, groups)
        return Convolution(features, size, strides, *settings, name=name)

    def norm(self, **fields) -> BatchNorm:
        """BatchNorm with statistics in float32."""
        train = self.train and "batch_norm" not in self.frozen
        settings = (train, self.batch_norm_axis, self.batch_norm_epsilon, self.dtype)
        return BatchNorm(*settings, **fields)

    def normalised(
        self, conv: Convolution, norm: BatchNorm, x: jax.Array, relu: bool = False
    ) -> jax.Array:
        """norm(conv(x)), then ReLU if asked; running statistics are folded into the convolution."""
        if norm.train or norm.is_initializing():
            return norm(conv(x), relu=relu)
        y = conv(x, norm.affine())
        return nn.relu(y) if relu else y

    def dropout(self, x: jax.Array, name: str) -> jax.Array:
        """Dropout in training, one independent draw per element."""
        return Dropout(self.dropout_rate if self.train else 0.0, name=name)(x, self.keys)

    def stochastic_depth(self, x: jax.Array, probability: float, name: str) -> jax.Array:
        """Stochastic depth, one draw per example."""
        return StochasticDepth(probability, name=name)(x, self.train, self.keys)

    def drop_path(self, x: jax.Array, rate: float, name: str) -> jax.Array:
        """Stochastic depth as timm has it: in training, a branch that is kept is scaled up."""
        kept = 1.0 - rate if self.train else 1.0
        x = x / jnp.asarray(kept, x.dtype) if kept < 1.0 else x
        return StochasticDepth(kept, name=name)(x, self.train, self.keys)


def belongs(path: str, part: str) -> bool:
    """Whether a module or variable is in a part: "stage1" has "stage1_block2/conv1/kernel"."""
    return re.match(f"{re.escape(part)}(/|_|$)", path) is not None


def survival_probabilities(last: float, number: int) -> tuple[float, ...]:
    """p_l = 1 - l / L (1 - p_L) for l = 1 to L = `number`: stochastic depth's linear rule."""
    return tuple(1 - index / number * (1 - last) for index in range(1, number + 1))


def require(module: nn.Module, field: str, holds: bool, what: str, owner: str = "model") -> None:
    """Raises UserError about a module's field unless a condition holds; `what` says the rule."""
    if not holds:
        raise UserError(f"{owner}.{field} = {getattr(module, field)!r}: {what}")


def require_choices(module: nn.Module, owner: str = "model", **allowed: Iterable[str]) -> None:
    """Raises UserError unless each named field of a module has one of the allowed values."""
    for field, names in allowed.items():
        what = f"allowed are {', '.join(names)}"
        require(module, field, getattr(module, field) in names, what, owner)


def require_positive(network: nn.Module, field: str, number: int) -> None:
    """Raises UserError unless a field of a network has `number` positive integers."""
    value = getattr(network, field)
    holds = len(value) == number and all(isinstance(n, int) and n > 0 for n in value)
    require(network, field, holds, f"give {number} positive integers")


def require_rising(network: nn.Module, field: str, first: int, last: int) -> None:
    """Raises UserError unless a field has numbers from `first` to `last`, in rising order."""
    value = getattr(network, field)
    holds = list(value) == sorted(set(value)) and set(value) <= set(range(first, last + 1))
    require(network, field, holds, f"give numbers from {first} to {last}, in rising order")


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
        conv = self.layers.conv(self.width, (7, 7), 2, name="conv")
        x = self.layers.normalised(conv, self.layers.norm(name="norm"), image, relu=True)
        return max_pool(x, ((1, 1), (1, 1)))


class SqueezeExcite(nn.Module):
    """Effective squeeze-excitation: a gate for each channel (Lee and Park, arXiv:1911.06667)."""

    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiplies x [batch, height, width, channels] by gates computed from its mean."""
        mean = at_least_float32(x).mean((1, 2), keepdims=True)
        biased = dataclasses.replace(self.layers, convolution_bias=True)
        return x * nn.hard_sigmoid(biased.conv(x.shape[-1], (1, 1), name="conv")(mean))


STEMS = {"cifar": CifarStem, "imagenet": ImageNetStem}


class Head(nn.Module):
    """Global average pooling and the linear classifier; logits are float32, or None for 0 classes.

    With a `norm_epsilon`, a LayerNorm stands between the two; with `layers`, also dropout.
    """

    num_classes: int
    norm_epsilon: float | None = None

    @nn.compact
    def __call__(self, features, layers: Layers | None = None):
        """Maps features [batch, height, width, channels] to (logits, pooled features)."""
        dtype = jnp.float64 if features.dtype == jnp.float64 else jnp.float32
        pooled = features.mean((1, 2), dtype=dtype)
        if self.num_classes == 0:
            return None, pooled
        x = pooled
        if self.norm_epsilon is not None:
            x = nn.LayerNorm(epsilon=self.norm_epsilon, use_fast_variance=False, name="norm")(x)
        x = layers.dropout(x, name="dropout") if layers else x
        classifier = nn.Dense(self.num_classes, kernel_init=fan_in_uniform, name="classifier")
        return classifier(x), pooled

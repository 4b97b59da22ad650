"""RDNet, the modern DenseNet (Kim et al., "DenseNets Reloaded", ECCV 2024, arXiv:2403.19588).

A layer is ConvNeXt's: a depthwise convolution, LayerNorm, and two 1x1 convolutions with GELU
between them. It reads the concatenation of all before it in its stage, as in a DenseNet. There is
no BatchNorm. Every convolution has a bias; biases start at 0, while timm draws them at random.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax.models import connections, layers
from densejax.models.connections import Graph, Reader
from densejax.models.layers import Layers
from densejax.models.normalization import per_channel
from densejax.models.pooling import require_patch

# He et al. 2015 with fan-in, as in the authors' code.
fan_in_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def multiple_of_8(width: float) -> int:
    """The largest multiple of 8 that is at most `width`."""
    return int(width / 8) * 8


def layer_norm(builder: Layers, name: str) -> nn.LayerNorm:
    """LayerNorm over channels (Ba et al., arXiv:1607.06450), its statistics in float32."""
    fields = {"epsilon": 1e-6, "dtype": builder.dtype, "use_fast_variance": False}
    return nn.LayerNorm(**fields, name=name)


class Patches(nn.Module):
    """A convolution of patches without overlap, and LayerNorm; in a transition, LayerNorm first."""

    width: int
    stride: int
    norm_first: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [batch, height, width, channels] to `width` feature maps."""
        require_patch(x, self.stride)
        size = (self.stride, self.stride)
        conv = self.layers.conv(self.width, size, self.stride, name="conv")
        norm = layer_norm(self.layers, name="norm")
        return conv(norm(x)) if self.norm_first else norm(conv(x))


class Layer(nn.Module):
    """Depthwise convolution, LayerNorm, 1x1, GELU, 1x1, and a learned scale of each channel."""

    growth_rate: int
    kernel_size: int
    expansion: float
    squeeze_excite: bool
    layer_scale: float
    drop_path: float
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [batch, height, width, channels] to `growth_rate` feature maps."""
        conv, channels, size = self.layers.conv, x.shape[-1], (self.kernel_size,) * 2
        y = conv(channels, size, name="depthwise", groups=channels)(x)
        y = layer_norm(self.layers, name="norm")(y)
        y = conv(multiple_of_8(self.expansion * channels), (1, 1), name="expand")(y)
        y = conv(self.growth_rate, (1, 1), name="reduce")(nn.gelu(y, approximate=False))
        if self.squeeze_excite:
            y = layers.SqueezeExcite(self.layers, name="squeeze_excite")(y)
        initial = nn.initializers.constant(self.layer_scale)
        scale = self.param(
            "layer_scale", initial, (self.growth_rate,)
        )  # gamma in the authors' code
        y = y * per_channel(scale).astype(y.dtype)
        return self.layers.drop_path(y, self.drop_path, name="drop_path")


class RDNet(nn.Module):
    """A network of dense stages, described by its fields; the defaults are RDNet-T's.

    Attributes:
      num_classes: length of the logits; 0: no classifier, the logits are None.
      stem_width: channels of the stem.
      stem_stride: height and width of the patches that the stem reads, without overlap.
      growth_rates: k of each stage, feature maps that a layer adds.
      stage_depth: layers of each stage.
      downsampling: stages, counted from 1, before which a transition halves the image.
      kernel_size: height and width of the kernels of the depthwise convolutions.
      expansion: width between a layer's 1x1 convolutions in input widths (not in growth rates).
      compression: theta in DenseNet's paper, the share of channels that a transition keeps.
      squeeze_excite_from: the first stage whose layers end with squeeze-excitation.
      layer_scale: initial scale of a layer's output. A short run, of a few hundred steps, learns
        faster from 1.
      drop_path: rate at which the last layer's output is dropped in training, each example by
        itself; rates rise linearly from 0 over all layers. What is kept is divided by 1 - rate, as
        timm has it: stochastic depth without a scale afterwards.
      head_norm_epsilon: what the norm in front of the classifier adds to the variance (timm: 1e-6,
        the authors: 1e-5; all other norms have 1e-6).
      dtype: precision of the computation.
      frozen: parts that run as in evaluation while the others train, such as "stem".
    """

    num_classes: int
    stem_width: int = 64
    stem_stride: int = 4
    growth_rates: tuple[int, ...] = (64, 104, 128, 128, 128, 128, 224)
    stage_depth: int = 3
    downsampling: tuple[int, ...] = (2, 3, 7)
    kernel_size: int = 7
    expansion: float = 4.0
    compression: float = 0.5
    squeeze_excite_from: int = 3
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    head_norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32
    frozen: tuple[str, ...] = ()

    def widths(self) -> tuple[int, ...]:
        """Channels that enter each stage: the stem's, then those of each transition."""
        widths = [self.stem_width]
        for growth_rate in self.growth_rates[:-1]:
            width = widths[-1] + self.stage_depth * growth_rate
            widths.append(multiple_of_8(self.compression * width))
        return tuple(widths)

    def graphs(self) -> dict[str, Graph]:
        """What the layers of each stage read, by the stage's name."""
        return {
            f"stage{stage}": connections.graph("dense", self.stage_depth, growth_rate)
            for stage, growth_rate in enumerate(self.growth_rates, 1)
        }

    def readers(self) -> dict[str, list[Reader]]:
        """What reads the outputs of each stage, by the stage's name."""
        return connections.readers(
            self.graphs(),
            lambda stage, n: (f"{stage}_layer{n}", f"{stage}_layer{n}/expand"),
            "head" if self.num_classes else "",
        )

    def check(self) -> None:
        """Raises UserError for fields that describe no network."""
        stages = len(self.growth_rates)
        layers.require_positive(self, "growth_rates", stages or 1)
        for field in ("stem_width", "stem_stride", "stage_depth", "squeeze_excite_from"):
            layers.require(self, field, getattr(self, field) >= 1, "must be at least 1")
        is_power = self.stem_stride & (self.stem_stride - 1) == 0
        layers.require(self, "stem_stride", is_power, "must be a power of two")
        layers.require_rising(self, "downsampling", 2, stages)
        odd = self.kernel_size >= 1 and self.kernel_size % 2 == 1
        layers.require(self, "kernel_size", odd, "must be odd")
        layers.require(self, "compression", 0 < self.compression <= 1, "must be in (0, 1]")
        layers.require(self, "drop_path", 0 <= self.drop_path < 1, "must be in [0, 1)")
        for field in ("layer_scale", "head_norm_epsilon"):
            layers.require(self, field, getattr(self, field) > 0, "must be above 0")
        kept = min(self.widths()) >= 1
        layers.require(self, "compression", kept, "leaves a transition fewer than 8 channels")
        wide = self.expansion * min(self.widths()) >= 8
        layers.require(self, "expansion", wide, "leaves a layer fewer than 8 channels within")

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Classifies images, as densejax.models says; the keys are for drop path.

        Features: "stem", "stage1", "stage2", ..., the last of them again ("final") and pooling
        ("pooled").
        """
        builder = Layers.of(self, train, keys, image)
        builder = dataclasses.replace(builder, convolution_bias=True, kernel_init=fan_in_normal)
        settings = (self.stem_width, self.stem_stride, False, builder.part("stem"))
        x = Patches(*settings, name="stem")(image)
        features = {"stem": x}
        number = len(self.growth_rates) * self.stage_depth
        rates = iter(self.drop_path * index / max(number - 1, 1) for index in range(number))
        stages = zip(self.widths(), self.growth_rates, strict=True)
        for stage, (width, growth_rate) in enumerate(stages, 1):
            if stage > 1:
                stride = 2 if stage in self.downsampling else 1
                name = f"transition{stage - 1}"
                x = Patches(width, stride, True, builder.part(name), name=name)(x)
            settings = (growth_rate, self.kernel_size, self.expansion)
            settings += (stage >= self.squeeze_excite_from, self.layer_scale)
            for index in range(1, self.stage_depth + 1):
                name = f"stage{stage}_layer{index}"
                layer = Layer(*settings, next(rates), builder.part(name), name=name)
                x = jnp.concatenate([x, layer(x)], axis=-1)
            features[f"stage{stage}"] = x
        features["final"] = x
        head = layers.Head(self.num_classes, self.head_norm_epsilon, name="head")
        logits, features["pooled"] = head(x)
        return logits, features

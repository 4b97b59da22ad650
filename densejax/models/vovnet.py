"""VoVNet: each module aggregates all its layers once, at its end (Lee et al., arXiv:1904.09730).

VoVNetV2 adds squeeze-excitation (Lee and Park, arXiv:1911.06667).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax.models import connections, layers
from densejax.models.connections import Graph, Reader
from densejax.models.layers import Layers
from densejax.models.pooling import max_pool


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU; a separable convolution is a depthwise one and a 1x1."""

    width: int
    size: int  # of the kernel
    layers: Layers
    stride: int = 1
    separable: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [batch, height, width, channels] to `width` feature maps."""
        size, channels = (self.size, self.size), x.shape[-1]
        if self.separable:
            conv = self.layers.conv(channels, size, self.stride, name="depthwise", groups=channels)
            x, conv = conv(x), self.layers.conv(self.width, (1, 1), name="pointwise")
        else:
            conv = self.layers.conv(self.width, size, self.stride, name="conv")
        return self.layers.normalised(conv, self.layers.norm(name="norm"), x, relu=True)


class OneShotAggregation(nn.Module):
    """OSA: a chain of 3x3 layers, then a 1x1 that reads its input and all layers, concatenated."""

    depth: int
    width: int  # of each 3x3 layer
    output_width: int
    identity: bool  # whether the input is added to the output
    layers: Layers
    separable: bool = False
    squeeze_excite: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [batch, height, width, channels] to `output_width` feature maps."""
        outputs, y = [x], x
        if self.separable and x.shape[-1] != self.width:
            y = ConvNorm(self.width, 1, self.layers, name="reduction")(x)
        for index in range(1, self.depth + 1):
            fields = {"separable": self.separable, "name": f"layer{index}"}
            y = ConvNorm(self.width, 3, self.layers, **fields)(y)
            outputs.append(y)
        aggregated = jnp.concatenate(outputs, axis=-1)
        y = ConvNorm(self.output_width, 1, self.layers, name="aggregation")(aggregated)
        if self.squeeze_excite:
            y = layers.SqueezeExcite(self.layers, name="squeeze_excite")(y)
        return x + y if self.identity else y


def ceil_max_pool(x: jax.Array) -> jax.Array:
    """3x3 max-pooling, stride 2, of x [batch, height, width, channels], as PyTorch's ceil_mode.

    Windows start at the first pixel, and the last one may reach over the edge.
    """
    return max_pool(x, tuple((0, max(1 - size % 2, 3 - size)) for size in x.shape[1:3]))


class VoVNet(nn.Module):
    """A network of one-shot aggregation modules, described by its fields.

    Attributes:
      num_classes: length of the logits; 0: no classifier, the logits are None.
      modules: one-shot-aggregation modules of each stage. Every stage but the first halves the
        image by max-pooling.
      widths: channels of each stage's 3x3 layers.
      output_widths: channels of each stage's 1x1 layers.
      module_depth: 3x3 layers of a module.
      identity: a module adds its input where a stage repeats it (as the authors' code).
      stem_widths: channels of the stem's three 3x3 layers, of strides 2, 1 and 2.
      separable: 3x3 layers but the first are a depthwise 3x3 and a 1x1; a module whose input has
        another width than they begins with a 1x1 layer, which is not aggregated.
      squeeze_excite: the V2 of VoVNetV2: a gate for each channel, at the end of every stage.
      batch_norm_epsilon: what BatchNorm adds to the variance.
      dtype: precision of the computation.
      batch_norm_axis: mapped axis that BatchNorm's batch statistics are averaged over.
      frozen: parts that run as in evaluation while the others train, such as "stem1"; "batch_norm":
        every BatchNorm.
    """

    num_classes: int
    modules: tuple[int, ...] = (1, 1, 2, 2)
    widths: tuple[int, ...] = (128, 160, 192, 224)
    output_widths: tuple[int, ...] = (256, 512, 768, 1024)
    module_depth: int = 5
    identity: bool = True
    stem_widths: tuple[int, ...] = (64, 64, 128)
    separable: bool = False
    squeeze_excite: bool = False
    batch_norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    batch_norm_axis: str | None = None
    frozen: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError for fields that describe no network."""
        stages = len(self.modules) or 4
        numbers = {"modules": stages, "widths": stages, "output_widths": stages, "stem_widths": 3}
        for field, number in numbers.items():
            layers.require_positive(self, field, number)
        layers.require(self, "module_depth", self.module_depth >= 1, "must be at least 1")

    def graphs(self) -> dict[str, Graph]:
        """What the layers of each module read, by the module's name."""
        return {
            f"stage{stage}_module{module}": connections.graph("one_shot", self.module_depth, width)
            for stage, (number, width) in enumerate(zip(self.modules, self.widths, strict=True), 1)
            for module in range(1, number + 1)
        }

    def readers(self) -> dict[str, list[Reader]]:
        """What reads several outputs of each module, by the module's name."""
        found = {}
        for name, graph in self.graphs().items():
            path = f"{name}/aggregation"
            found[name] = [Reader("aggregation", graph.emits, path, f"{path}/conv")]
        return found

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Classifies images, as densejax.models says.

        Features: "stem", "stage1" (OSA2 in the paper), "stage2", ..., the last of them again
        ("final") and pooling ("pooled"). Nothing is drawn from the keys.
        """
        builder = Layers.of(self, train, keys, image)
        x = image
        for index, (width, stride) in enumerate(zip(self.stem_widths, (2, 1, 2), strict=True), 1):
            separable = self.separable and index > 1
            name = f"stem{index}"
            x = ConvNorm(width, 3, builder.part(name), stride, separable, name=name)(x)
        features = {"stem": x}
        stages = zip(self.modules, self.widths, self.output_widths, strict=True)
        for stage, (number, width, output_width) in enumerate(stages, 1):
            x = x if stage == 1 else ceil_max_pool(x)
            for index in range(1, number + 1):
                fields = (self.module_depth, width, output_width, self.identity and index > 1)
                squeeze_excite = self.squeeze_excite and index == number
                name = f"stage{stage}_module{index}"
                fields += (builder.part(name), self.separable, squeeze_excite)
                x = OneShotAggregation(*fields, name=name)(x)
            features[f"stage{stage}"] = x
        features["final"] = x
        logits, features["pooled"] = layers.Head(self.num_classes, name="head")(x)
        return logits, features

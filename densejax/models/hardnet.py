"""HarDNet: harmonic dense connections, joined by a 1x1 (Chao et al., ICCV 2019, arXiv:1909.00948).

A block's layers read what a pattern of densejax.models.connections says. Unlike in DenseNet, a
layer's norm and activation follow its convolution. Two things differ from the authors' code: the
dropout inside HarDNet-85 is left out, and kernels are initialised as in the other networks here.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax.models import connections, layers
from densejax.models.connections import Graph, Reader
from densejax.models.layers import Layers
from densejax.models.pooling import max_pool, require_patch


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, ReLU6; a depthwise convolution has no ReLU6."""

    width: int
    size: int  # of the kernel
    layers: Layers
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [batch, height, width, channels] to `width` feature maps."""
        settings = {"groups": self.width if self.depthwise else 1, "name": "conv"}
        conv = self.layers.conv(self.width, (self.size, self.size), self.stride, **settings)
        norm = self.layers.norm(name="norm")
        y = self.layers.normalised(conv, norm, x, relu=not self.depthwise)
        return y if self.depthwise else jnp.minimum(y, 6)


class Block(nn.Module):
    """Layers that are joined by a pattern; each is a 3x3, or a 1x1 and a depthwise 3x3."""

    connect: connections.Connect
    depth: int
    growth_rate: int
    separable: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [batch, height, width, channels] to the concatenation of what it emits."""
        graph, outputs = connections.graph(self.connect, self.depth, self.growth_rate), [x]
        for number, (reads, width) in enumerate(zip(graph.reads, graph.widths, strict=True), 1):
            y = jnp.concatenate([outputs[source] for source in reads], axis=-1)
            name = f"layer{number}"
            if self.separable:
                y = ConvNorm(width, 1, self.layers, name=f"{name}_pointwise")(y)
                fields = {"depthwise": True, "name": f"{name}_depthwise"}
                y = ConvNorm(width, 3, self.layers, **fields)(y)
            else:
                y = ConvNorm(width, 3, self.layers, name=name)(y)
            outputs.append(y)
        return jnp.concatenate([outputs[source] for source in graph.emits], axis=-1)


class HarDNet(nn.Module):
    """A network of harmonic dense blocks, described by its fields; the defaults are HarDNet-68's.

    Attributes:
      num_classes: length of the logits; 0: no classifier, the logits are None.
      stem_widths: channels of the stem's two layers, a 3x3 of stride 2 and a 3x3 (separable: 1x1).
      blocks: layers of each block.
      growth_rates: k of each block.
      output_widths: channels of the 1x1 layer after each block.
      downsampling: blocks, counted from 1, after whose 1x1 the image is halved.
      connect: what each layer reads and each block emits: a name in
        densejax.models.connections.CONCATENATING with its options, or a graph for all blocks.
      separable: the DS of HarDNet-68DS: a 3x3 layer is a 1x1 and a depthwise 3x3, and the image is
        halved by a depthwise 3x3 of stride 2 instead of max-pooling.
      dropout_rate: the rate of dropout in front of the classifier.
      batch_norm_epsilon: what BatchNorm adds to the variance.
      dtype: precision of the computation.
      batch_norm_axis: mapped axis that BatchNorm's batch statistics are averaged over.
      frozen: parts that run as in evaluation while the others train, such as "stem1"; "batch_norm":
        every BatchNorm.
    """

    num_classes: int
    stem_widths: tuple[int, ...] = (32, 64)
    blocks: tuple[int, ...] = (8, 16, 16, 16, 4)
    growth_rates: tuple[int, ...] = (14, 16, 20, 40, 160)
    output_widths: tuple[int, ...] = (128, 256, 320, 640, 1024)
    downsampling: tuple[int, ...] = (1, 3, 4)
    connect: connections.Connect = "hardnet:multiplier=1.7"
    separable: bool = False
    dropout_rate: float = 0.0
    batch_norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    batch_norm_axis: str | None = None
    frozen: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError for fields that describe no network."""
        number = len(self.blocks) or 5
        numbers = {"blocks": number, "growth_rates": number, "output_widths": number}
        for field, length in {**numbers, "stem_widths": 2}.items():
            layers.require_positive(self, field, length)
        layers.require_rising(self, "downsampling", 1, number)
        layers.require(self, "dropout_rate", 0 <= self.dropout_rate < 1, "must be in [0, 1)")
        self.graphs()

    def graphs(self) -> dict[str, Graph]:
        """What the layers of each block read, by the block's name (raises UserError)."""
        sizes = zip(self.blocks, self.growth_rates, strict=True)
        return {
            f"block{number}": connections.graph(self.connect, *size)
            for number, size in enumerate(sizes, 1)
        }

    def readers(self) -> dict[str, list[Reader]]:
        """What reads the outputs of each block, by the block's name."""
        end = "_pointwise" if self.separable else ""
        return connections.readers(
            self.graphs(),
            lambda block, n: (f"{block}/layer{n}{end}", f"{block}/layer{n}{end}/conv"),
            before_classifier=None,
        )

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Classifies images, as densejax.models says; the keys are for dropout.

        Features: "stem"; "block1", "block2", ..., each after its 1x1; "final", the last block's,
        halved if `downsampling` has that block; and pooling ("pooled").
        """
        builder = Layers.of(self, train, keys, image)

        def halved(x, number):
            if self.separable:
                name = f"downsampling{number}"
                fields = {"depthwise": True, "name": name}
                return ConvNorm(x.shape[-1], 3, builder.part(name), 2, **fields)(x)
            if not number:  # the stem's windows are 3x3
                return max_pool(x, ((1, 1), (1, 1)))
            require_patch(x, 2)
            return nn.max_pool(x, (2, 2), (2, 2))

        first, second = self.stem_widths
        x = ConvNorm(first, 3, builder.part("stem1"), 2, name="stem1")(image)
        size = 1 if self.separable else 3
        x = ConvNorm(second, size, builder.part("stem2"), name="stem2")(x)
        x = halved(x, 0)
        features = {"stem": x}
        blocks = zip(self.blocks, self.growth_rates, self.output_widths, strict=True)
        for number, (depth, growth_rate, width) in enumerate(blocks, 1):
            name = f"block{number}"
            fields = (self.connect, depth, growth_rate, self.separable, builder.part(name))
            x = Block(*fields, name=name)(x)
            name = f"transition{number}"
            x = ConvNorm(width, 1, builder.part(name), name=name)(x)
            features[f"block{number}"] = x
            x = halved(x, number) if number in self.downsampling else x
        features["final"] = x
        head = layers.Head(self.num_classes, name="head")
        logits, features["pooled"] = head(x, builder.part("head"))
        return logits, features

"""DenseNet, -B, -C and -BC: x_l = H_l([x_0, ..., x_{l-1}]) (Huang et al., arXiv:1608.06993)."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax.config import UserError
from densejax.models import connections, dense_block, layers
from densejax.models.connections import Connect, Graph, Reader
from densejax.models.dense_block import IMPLEMENTATIONS, DenseBlock
from densejax.models.layers import Layers
from densejax.models.normalization import PrecomputedStatistics
from densejax.models.pooling import average_pool

RECOMPUTE = dense_block.RECOMPUTE | {
    "block": "all but each block's input, through the transition or norm that follows it"
}
# Fields that every block has, with the network's values.
OF_BLOCKS = ("bottleneck", "bottleneck_width", "dropout_rate", "convolution_bias")
OF_BLOCKS += ("batch_norm_epsilon", "block", "dtype", "batch_norm_axis", "frozen")


class Transition(nn.Module):
    """BN-ReLU-1x1 and 2x2 average pooling between two blocks."""

    width: int
    layers: Layers
    pool_first: bool  # the same result with a quarter of the multiply-adds

    @nn.compact
    def __call__(
        self, features: jax.Array, statistics: PrecomputedStatistics | None = None
    ) -> jax.Array:
        """Maps features to `width` feature maps of half the height and width."""
        x = self.layers.norm(name="norm")(features, statistics, relu=True)
        conv = self.layers.conv(self.width, (1, 1), name="conv")
        dropout = functools.partial(self.layers.dropout, name="dropout")
        if self.pool_first and not (self.layers.train and self.layers.dropout_rate):
            return conv(average_pool(x))
        return average_pool(dropout(conv(x)))


class DenseNet(nn.Module):
    """A densely connected network, described by its fields.

    Attributes:
      num_classes: length of the logits; 0: no classifier, the logits are None.
      depth: L in the paper: layers of a three-block network, 3n + 4 (6n + 4 with bottleneck).
      blocks: instead of `depth`: the number of dense layers in each block. Give exactly one of
        the two; to use `blocks`, set `depth` to None.
      growth_rate: k in the paper: feature maps that a layer adds; or one number for each block.
        With connect = "hardnet", layers that read several outputs add more.
      bottleneck: the B of DenseNet-BC: a 1x1 convolution before each 3x3.
      bottleneck_width: output width of that 1x1 in growth rates (4 in the paper).
      compression: theta in the paper, the share of channels that a transition keeps; the C of
        DenseNet-BC where below 1.
      stem: "cifar" (3x3) or "imagenet" (7x7 stride 2, norm, ReLU, max-pooling).
      stem_width: channels of the stem. None: 2k for the ImageNet stem and for DenseNet-BC,
        otherwise 16, as the paper's text says. (Only with 16, L=100 and k=24 give the paper's 27.2M
        parameters.)
      dropout_rate: the rate of dropout after every convolution but the first.
      survival: p_L of stochastic depth: layer l of all L dense layers keeps its new feature maps
        with p_l = 1 - l / L (1 - p_L), each example by itself; scaled by p_l when not training.
      convolution_bias: convolutions add a bias (d2l's form; the paper's do not).
      batch_norm_epsilon: what BatchNorm adds to the variance.
      connect: what each layer reads and each block emits: a name in
        densejax.models.connections.CONCATENATING with its options ("window:size=3"), or a graph as
        connections.graph takes it, one for all blocks or one for each. With "one_shot" the
        transition is the 1x1 convolution that aggregates all layers, as VoVNet does.
      block: how dense blocks are computed, a name in IMPLEMENTATIONS.
      recompute: what the backward pass computes again to save memory, a name in RECOMPUTE.
      dtype: precision of the computation.
      batch_norm_axis: mapped axis that BatchNorm's batch statistics are averaged over.
      frozen: parts that run as in evaluation while the others train, such as "stem"; "batch_norm":
        every BatchNorm.
    """

    num_classes: int
    depth: int | None = None
    blocks: tuple[int, ...] | None = None
    growth_rate: int | tuple[int, ...] = 12
    bottleneck: bool = True
    bottleneck_width: int = 4
    compression: float = 0.5
    stem: str = "cifar"
    stem_width: int | None = None
    dropout_rate: float = 0.0
    survival: float = 1.0
    convolution_bias: bool = False
    batch_norm_epsilon: float = 1e-5
    connect: Connect = "dense"
    block: str = "in_place"
    recompute: str = "none"
    dtype: Any = jnp.float32
    batch_norm_axis: str | None = None
    frozen: tuple[str, ...] = ()

    def block_depths(self) -> tuple[int, ...]:
        """Layers of each block, from `blocks` or from `depth` (raises UserError)."""
        if (self.depth is None) == (self.blocks is None):
            raise UserError(
                f"model.depth = {self.depth} and model.blocks = {self.blocks}: give exactly one"
            )
        if self.blocks is not None:
            positive = min(self.blocks, default=0) >= 1
            layers.require(self, "blocks", positive, "give positive numbers of layers")
            return tuple(self.blocks)
        unit = 6 if self.bottleneck else 3
        layers_per_block, left = divmod(self.depth - 4, unit)
        lower = max(self.depth - 4 - left, unit) + 4
        wanted = (
            f"with model.bottleneck = {self.bottleneck} it must be {unit}n + 4, n >= 1; "
            f"the nearest are {lower} and {lower + unit}"
        )
        layers.require(self, "depth", not left and layers_per_block >= 1, wanted)
        return (layers_per_block,) * 3

    def growth_rates(self) -> tuple[int, ...]:
        """The growth rate of each block (raises UserError)."""
        number = len(self.block_depths())
        rates = self.growth_rate
        rates = (rates,) * number if isinstance(rates, int) else tuple(rates)
        wanted = f"give one positive integer, or one for each of the {number} blocks"
        layers.require(self, "growth_rate", len(rates) == number and min(rates) >= 1, wanted)
        return rates

    def widths(self) -> tuple[int, ...]:
        """Channels that enter each block: the stem's, then those of each transition."""
        growth_rates, graphs = self.growth_rates(), self.graphs()
        doubled = self.stem == "imagenet" or (self.bottleneck and self.compression < 1)
        default = 2 * growth_rates[0] if doubled else 16
        widths = [default if self.stem_width is None else self.stem_width]
        for graph in list(graphs.values())[:-1]:
            outputs = (widths[-1], *graph.widths)
            emitted = sum(outputs[number] for number in graph.emits)
            widths.append(math.floor(self.compression * emitted))
        return tuple(widths)

    def graphs(self) -> dict[str, Graph]:
        """What the layers of each block read, by the block's name (raises UserError)."""
        each = zip(self.connects(), self.block_depths(), self.growth_rates(), strict=True)
        return {f"block{number}": connections.graph(*one) for number, one in enumerate(each, 1)}

    def readers(self) -> dict[str, list[Reader]]:
        """What reads the outputs of each block, by the block's name."""
        return connections.readers(
            self.graphs(),
            lambda block, n: (f"{block}/layer{n}/norm1", f"{block}/layer{n}/conv1"),
            "norm" if self.num_classes else "",
        )

    def connects(self) -> tuple[Connect, ...]:
        """The field `connect` of each block (raises UserError)."""
        depths = self.block_depths()
        one_for_each = isinstance(self.connect, tuple) and all(
            isinstance(read, tuple) and all(isinstance(part, tuple) for part in read)
            for read in self.connect
        )
        if not one_for_each:
            return (self.connect,) * len(depths)
        wanted = f"give one graph, or one for each of the {len(depths)} blocks"
        layers.require(self, "connect", len(self.connect) == len(depths), wanted)
        return self.connect

    def check(self) -> None:
        """Raises UserError for fields that describe no network."""
        layers.require_choices(self, stem=layers.STEMS, block=IMPLEMENTATIONS, recompute=RECOMPUTE)
        for field, holds, allowed in (
            ("compression", 0 < self.compression <= 1, "in (0, 1]"),
            ("dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)"),
            ("survival", 0 < self.survival <= 1, "in (0, 1]"),
            ("bottleneck_width", self.bottleneck_width >= 1, "at least 1"),
            ("stem_width", self.stem_width is None or self.stem_width >= 1, "at least 1"),
        ):
            layers.require(self, field, holds, f"must be {allowed}")
        unset = self.bottleneck_width == DenseNet.bottleneck_width
        reads = "only model.bottleneck = True reads it"
        layers.require(self, "bottleneck_width", self.bottleneck or unset, reads)
        leaves = "leaves a transition without a channel"
        layers.require(self, "compression", min(self.widths()) >= 1, leaves)

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Classifies images, as densejax.models says; the keys are for dropout.

        Features: "stem", "block1", "transition1", "block2", ..., the last norm and ReLU ("final")
        and pooling ("pooled").
        """
        builder = Layers.of(self, train, keys, image)
        features = {}
        stem = layers.STEMS[self.stem](self.widths()[0], builder.part("stem"), name="stem")
        features["stem"] = x = stem(image)
        for index in range(len(self.block_depths())):
            stage = functools.partial(_stage, builder, index)
            stage = nn.remat(stage) if self.recompute == "block" else stage
            results, x = stage(self, x)
            features |= results
        logits, features["pooled"] = layers.Head(self.num_classes, name="head")(x)
        return logits, features


def _stage(builder: Layers, index: int, network: DenseNet, x: jax.Array):
    """(features by name, the next stage's input): a block, and what follows it.

    `recompute = "block"` computes both again, since the gradient of what follows reads the
    block's features.
    """
    depths, before = network.block_depths(), sum(network.block_depths()[:index])
    survivals = layers.survival_probabilities(network.survival, sum(depths))
    name = f"block{index + 1}"
    part = builder.part(name)
    block = DenseBlock(
        depths[index],
        network.growth_rates()[index],
        connect=network.connects()[index],
        survival=survivals[before : before + depths[index]],
        recompute="none" if network.recompute == "block" else network.recompute,
        name=name,
        **{field: getattr(network, field) for field in OF_BLOCKS},
    )
    features, statistics = block(x, part.train, part.keys, return_statistics=True)
    if index + 1 == len(depths):
        norm = builder.part("norm").norm(name="norm")
        name, x = "final", norm(features, statistics, relu=True)
    else:
        name, width = f"transition{index + 1}", network.widths()[index + 1]
        pool_first = network.block == "in_place"
        x = Transition(width, builder.part(name), pool_first, name=name)(features, statistics)
    return {f"block{index + 1}": features, name: x}, x

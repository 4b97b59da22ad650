"""Residual networks, x_l = H_l(x_{l-1}) + x_{l-1}, and plain ones, x_l = H_l(x_{l-1}).

He et al., arXiv:1512.03385 and (pre-activation) 1603.05027; stochastic depth: Huang, 1603.09382.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from densejax.models import connections, layers
from densejax.models.connections import Graph, Stage
from densejax.models.convolution import subsampled
from densejax.models.layers import Layers


def _convolutions(block: str, width: int, stride: int, stride_on: str) -> tuple[tuple, ...]:
    """(channels, kernel size, stride) of each convolution of a block."""
    if block == "basic":
        return (width, 3, stride), (width, 3, 1)
    first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
    return (width, 1, first), (width, 3, second), (4 * width, 1, 1)


class Block(nn.Module):
    """H_l: conv-BN with ReLU between (BN-ReLU-conv with pre-activation), and its shortcut."""

    convolutions: tuple[tuple[int, int, int], ...]  # (channels, kernel size, stride) of each
    survival: float  # p_l of stochastic depth
    preactivation: bool
    shortcut: str | None  # None: it has none
    zero_init: bool
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [batch, height, width, channels] to the last width, at the product of strides."""
        conv, norm = self.layers.conv, self.layers.norm
        width, stride = self.convolutions[-1][0], math.prod(s for *_, s in self.convolutions)
        changes = stride > 1 or width != x.shape[-1]
        y = x
        for index, (channels, size, step) in enumerate(self.convolutions, 1):
            last = index == len(self.convolutions)
            if self.preactivation:
                y = norm(name=f"norm{index}")(y, relu=True)
                if index == 1 and changes and self.shortcut == "projection":
                    x = y  # as the authors' code: a projection reads the first norm and ReLU
            convolve = conv(channels, (size, size), step, name=f"conv{index}")
            if self.preactivation:
                y = convolve(y)
            else:
                scale = nn.initializers.constant(0.0 if last and self.zero_init else 1.0)
                after = norm(name=f"norm{index}", scale_init=scale)
                y = self.layers.normalised(convolve, after, y, relu=not last)
        y = self.layers.stochastic_depth(y, self.survival, name="survival")
        if self.shortcut:
            if changes and self.shortcut != "projection":
                new = width - x.shape[-1]
                before = new // 2 if self.shortcut == "identity_middle" else 0
                padding = ((0, 0), (0, 0), (0, 0), (before, new - before))
                x = jnp.pad(subsampled(x, stride), padding)
            elif changes:
                project = conv(width, (1, 1), stride, name="projection")
                after = None if self.preactivation else norm(name="projection_norm")
                x = self.layers.normalised(project, after, x) if after else project(x)
            y = x + y
        return y if self.preactivation else nn.relu(y)


class ResNet(nn.Module):
    """A residual or plain network, described by its fields.

    Attributes:
      num_classes: length of the logits; 0: no classifier, the logits are None.
      blocks: blocks of each stage, n in the paper. Every stage but the first halves the image.
      widths: channels of the 3x3 convolutions of each stage; the first is the stem's too.
      block: "basic" (3x3, 3x3) or "bottleneck" (1x1, 3x3, and 1x1 to four times the width).
      stride_on: what halves the image in a bottleneck: "3x3" (torchvision) or "1x1" (the papers).
      preactivation: BN-ReLU before each convolution, not after, and once after the last block.
      stem: "cifar" (3x3) or "imagenet" (7x7 stride 2, norm, ReLU, max-pooling). Without
        pre-activation a norm and a ReLU follow the CIFAR stem.
      shortcut: where shapes change: "projection" (option B, a 1x1 convolution) or "identity"
        (option A, every stride-th pixel; new channels are zero and come last) or
        "identity_middle" (half of the new channels come first, as in pytorch_resnet_cifar10).
      connect: how the blocks of a stage are joined: a name in densejax.models.connections.ADDING
        with its options ("hyper:streams=2"). All but "add" and "chain" need `preactivation`. A
        block that changes the size or width of features keeps the shortcut of a residual network,
        and the pattern joins the blocks after it; in a "chain" there is none.
      zero_init: the scale of each block's last BatchNorm starts at 0. So at the start, a block
        gives what its shortcut gives.
      survival: p_L of stochastic depth: block l of L is kept with p_l = 1 - l / L (1 - p_L), each
        example by itself, and scaled by p_l when not training.
      convolution_bias: convolutions add a bias (Keras Applications' form; the papers' do not).
      batch_norm_epsilon: what BatchNorm adds to the variance.
      dtype: precision of the computation.
      batch_norm_axis: mapped axis that BatchNorm's batch statistics are averaged over.
      frozen: parts that run as in evaluation while the others train, such as "stem"; "batch_norm":
        every BatchNorm.
    """

    num_classes: int
    blocks: tuple[int, ...] = (3, 3, 3)
    widths: tuple[int, ...] = (16, 32, 64)
    block: str = "basic"
    stride_on: str = "3x3"
    preactivation: bool = False
    stem: str = "cifar"
    shortcut: str = "projection"
    connect: str = "add"
    zero_init: bool = False
    survival: float = 1.0
    convolution_bias: bool = False
    batch_norm_epsilon: float = 1e-5
    dtype: Any = jnp.float32
    batch_norm_axis: str | None = None
    frozen: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError for fields that describe no network."""
        layers.require_choices(
            self,
            block=("basic", "bottleneck"),
            stride_on=("3x3", "1x1"),
            stem=layers.STEMS,
            shortcut=("projection", "identity", "identity_middle"),
        )
        connections.pattern(self.connect, connections.ADDING)
        learned = self.connect not in ("add", "chain")
        needs = "needs model.preactivation = True"
        layers.require(self, "connect", self.preactivation or not learned, needs)
        for field in ("blocks", "widths"):
            layers.require_positive(self, field, len(self.blocks) or 3)
        joins = self.block == "basic" or max(self.blocks) > 1
        layers.require(self, "connect", joins or not learned, "has no effect: it joins no blocks")
        widens = self.shortcut == "projection" or sorted(self.widths) == list(self.widths)
        layers.require(self, "widths", widens, "must not fall with identity shortcuts")
        layers.require(self, "survival", 0 < self.survival <= 1, "must be in (0, 1]")
        for field, ignoring, is_ignored in (
            ("stride_on", "block = 'basic'", self.block == "basic"),
            ("shortcut", "connect = 'chain'", self.connect == "chain"),
            ("survival", "connect = 'chain'", self.connect == "chain"),
            ("zero_init", "connect = 'chain'", self.connect == "chain"),
            ("zero_init", "preactivation = True", self.preactivation),
        ):
            unset = getattr(self, field) == getattr(ResNet, field)
            layers.require(self, field, unset or not is_ignored, f"model.{ignoring} ignores it")

    def graphs(self) -> dict[str, Graph]:
        """What the blocks of each stage read, by the stage's name.

        A block that changes the size or width of features has a graph of its own, by the block's
        name.
        """
        graphs, alone = {}, ((0,), (1,)) if self.connect == "chain" else ((0,), (0, 1))
        width = self.widths[0]
        for stage, (depth, planes) in enumerate(zip(self.blocks, self.widths, strict=True), 1):
            last = _convolutions(self.block, planes, 1, self.stride_on)[-1][0]
            if stage > 1 or last != width:
                graphs[f"stage{stage}_block1"] = connections.graph(alone, 1, last)
                depth -= 1
            if depth:
                graph = connections.adding_graph(self.connect, depth)
                graphs[f"stage{stage}"] = dataclasses.replace(graph, widths=(last,) * depth)
            width = last
        return graphs

    @nn.compact
    def __call__(
        self, image: jax.Array, train: bool = False, keys: jax.Array | None = None
    ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
        """Classifies images, as densejax.models says; the keys are for stochastic depth.

        Features: "stem", "stage1", "stage2", ..., the last norm and ReLU ("final"; the last
        stage's without pre-activation) and pooling ("pooled").
        """
        builder = Layers.of(self, train, keys, image)
        shortcut = None if self.connect == "chain" else self.shortcut
        x = layers.STEMS[self.stem](self.widths[0], builder.part("stem"), name="stem")(image)
        if self.stem == "cifar" and not self.preactivation:
            x = builder.part("stem_norm").norm(name="stem_norm")(x, relu=True)
        features = {"stem": x}
        survivals = iter(layers.survival_probabilities(self.survival, sum(self.blocks)))
        for stage, (depth, width) in enumerate(zip(self.blocks, self.widths, strict=True), 1):
            joined = []  # by the pattern; the other blocks join themselves
            for index in range(1, depth + 1):
                stride = 2 if stage > 1 and index == 1 else 1
                convolutions = _convolutions(self.block, width, stride, self.stride_on)
                changes = index == 1 and (stride > 1 or convolutions[-1][0] != x.shape[-1])
                alone = changes or not self.preactivation
                name = f"stage{stage}_block{index}"
                block = Block(
                    convolutions,
                    next(survivals),
                    self.preactivation,
                    shortcut if alone else None,
                    self.zero_init,
                    builder.part(name),
                    name=name,
                )
                if alone:
                    x = block(x)
                else:
                    joined.append(block)
            if joined:
                name = f"stage{stage}"
                x = Stage(self.connect, builder.part(name), name=name)(x, joined)
            features[f"stage{stage}"] = x
        if self.preactivation:
            x = builder.part("norm").norm(name="norm")(x, relu=True)
        features["final"] = x
        logits, features["pooled"] = layers.Head(self.num_classes, name="head")(x)
        return logits, features

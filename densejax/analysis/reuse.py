"""Which earlier layers each layer of a network reads, told by its weights.

The heat map of Huang et al. 2017, Figure 5: for a target layer and a source, the mean of |weight|
over all weights of the target's first convolution that read the source's feature maps. The mean,
unlike the sum, does not grow with the number of the source's feature maps.
"""

import dataclasses
import runpy
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from densejax.config import UserError
from densejax.models.connections import Stage, coefficients
from densejax.models.densenet import DenseNet
from densejax.models.layers import Layers
from densejax.models.resnet import ResNet
from densejax.models.vovnet import VoVNet


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """What the layers of one block read.

    Attributes:
      block: the name of the block, stage or module.
      sources: "input" and the block's layers.
      targets: the layers that read several sources; the last one comes after the block.
      weights: float [sources, targets]: the mean of |weight|, or for outputs that are added the
        root mean square of their coefficients; NaN where a target does not read a source.
    """

    block: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    weights: np.ndarray


def mean_weights(kernel: Any, widths: Sequence[int]) -> list[float]:
    """Mean of |weight| for each source.

    Args:
      kernel: [..., channels in, channels out]; it reads the sources, one after the other.
      widths: number of feature maps of each source.
    """
    by_channel = np.abs(kernel).reshape(-1, *np.shape(kernel)[-2:]).mean((0, 2))
    if len(by_channel) != sum(widths):
        raise ValueError(f"a kernel of {len(by_channel)} channels does not read {sum(widths)}")
    return [part.mean() for part in np.split(by_channel, np.cumsum(widths)[:-1])]


def heat_maps(model: nn.Module, params: Any, batch_stats: Any = None) -> list[HeatMap]:
    """One heat map for each block whose layers read several sources, or whose end does.

    Where a layer reads only the layer before it, as with one-shot aggregation, the single target is
    what follows the block: a 1x1 convolution, or the classifier.

    Args:
      model: a network with `graphs`.
      params: its parameters.
      batch_stats: its running statistics; the pattern "dsnet" alone needs them.

    Raises:
      UserError: a network whose layers read only one source.
    """
    if isinstance(model, ResNet):
        maps = _stages(model, {"params": params, "batch_stats": batch_stats or {}})
    else:
        maps = _concatenated(model, params) if hasattr(model, "graphs") else ()
    if not (maps := list(maps)):
        raise UserError(
            f"{type(model).__name__}: its layers read only one source, or sums without weights; "
            f"take a DenseNet, or a ResNet with a learned pattern in model.connect"
        )
    return maps


def _concatenated(model: nn.Module, params: Any) -> Iterator[HeatMap]:
    readers = {"DenseNet": _densenet_kernels, "VoVNet": _vovnet_kernels}[type(model).__name__]
    widths_of = output_widths(model, params)
    for name, graph in model.graphs().items():
        kernels, end = readers(model, params, name)
        reads, widths = {}, widths_of[name]
        if any(len(read) > 1 for read in graph.reads):
            pairs = zip(graph.reads, kernels, strict=True)
            reads = {f"layer{n}": pair for n, pair in enumerate(pairs, 1)}
        for target, kernel in end.items():
            reads[target] = graph.emits, kernel
        weights = np.full((len(widths), len(reads)), np.nan)
        for column, (read, kernel) in enumerate(reads.values()):
            weights[list(read), column] = mean_weights(kernel, [widths[n] for n in read])
        if any(len(read) > 1 for read, _ in reads.values()):
            yield HeatMap(name, _sources(len(widths) - 1), tuple(reads), weights)


def output_widths(model: DenseNet | VoVNet, params: Any) -> dict[str, tuple[int, ...]]:
    """The feature maps of each output of each block, by the block's name, from its input on."""
    graphs = model.graphs()
    if isinstance(model, DenseNet):
        inputs = model.widths()
    else:
        totals = [np.shape(params[name]["aggregation"]["conv"]["kernel"])[-2] for name in graphs]
        inputs = [total - sum(g.widths) for total, g in zip(totals, graphs.values(), strict=True)]
    pairs = zip(graphs.items(), inputs, strict=True)
    return {name: (width, *graph.widths) for (name, graph), width in pairs}


def _sources(depth: int) -> tuple[str, ...]:
    return ("input", *(f"layer{number}" for number in range(1, depth + 1)))


def _densenet_kernels(model: DenseNet, params: Any, block: str):
    """Of a block: the kernel of each layer, and that of what follows it, by name."""
    kernels = [params[block][f"layer{n + 1}"]["conv1"]["kernel"] for n in range(len(params[block]))]
    transition = block.replace("block", "transition")
    if transition in params:
        return kernels, {transition: params[transition]["conv"]["kernel"]}
    if model.num_classes:
        return kernels, {"classifier": params["head"]["classifier"]["kernel"]}
    return kernels, {}


def _vovnet_kernels(model: VoVNet, params: Any, block: str):
    """The same of an OSA module, whose layers read one source each."""
    return (), {"aggregation": params[block]["aggregation"]["conv"]["kernel"]}


def _stages(model: ResNet, variables: Any) -> Iterator[HeatMap]:
    """The coefficients that the learned weights of each stage amount to."""
    stages = {f"stage{n}": width for n, width in enumerate(model.widths, 1)}
    for name, graph in model.graphs().items():
        weights = {kind: tree[name] for kind, tree in variables.items() if name in tree}
        if name in stages and weights:
            channels = stages[name] * (4 if model.block == "bottleneck" else 1)
            stage = Stage(model.connect, Layers(train=False))
            found = coefficients(stage, weights, len(graph.reads), channels)
            sizes = np.sqrt(np.square(found).sum((1, 3)) / channels).T
            reads = np.zeros(sizes.shape, bool)
            for target, read in enumerate((*graph.reads, graph.emits)):
                reads[list(read), target] = True
            sources = _sources(len(graph.reads))
            yield HeatMap(name, sources, (*sources[1:], "end"), np.where(reads, sizes, np.nan))


if __name__ == "__main__":  # the name of the command in earlier versions
    runpy.run_module("densejax.reuse", run_name="__main__")

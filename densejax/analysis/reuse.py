"""Which earlier layers each layer of a network reads, told by its weights.

The heat map of Huang et al. 2017, Figure 5: for a target layer and a source, the mean of |weight|
over all weights of the target's first convolution that read the source's feature maps. The mean,
unlike the sum, does not grow with the number of the source's feature maps.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from densejax.config import UserError
from densejax.models.connections import Reader, Stage, coefficients
from densejax.models.layers import Layers
from densejax.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """What the layers of one block read.

    Attributes:
      block: the name of the block, stage or module.
      sources: "input" and the block's layers.
      targets: the layers that read several sources; the last one comes after the block.
      weights: float [sources, targets]; NaN where a target does not read a source.
      measure: what the weights are: the mean of |weight|, or for outputs that are added the root
        mean square of their coefficients.
    """

    block: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    weights: np.ndarray
    measure: str = "mean |weight|"


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
      model: a network that has `graphs`, and `readers` if it concatenates.
      params: its parameters.
      batch_stats: its running statistics; the pattern "dsnet" alone needs them.

    Raises:
      UserError: a network whose layers read only one source.
    """
    if isinstance(model, ResNet):
        maps = _stages(model, {"params": params, "batch_stats": batch_stats or {}})
    else:
        maps = _concatenated(model, params) if hasattr(model, "readers") else ()
    if not (maps := list(maps)):
        raise UserError(
            f"{type(model).__name__}: its layers read only one source, or sums without weights; "
            f"take a DenseNet, or a ResNet with a learned pattern in model.connect"
        )
    return maps


def _concatenated(model: nn.Module, params: Any) -> Iterator[HeatMap]:
    widths_of = output_widths(model, params)
    for name, readers in several_sources(model).items():
        widths = widths_of[name]
        weights = np.full((len(widths), len(readers)), np.nan)
        for column, reader in enumerate(readers):
            read = list(reader.reads)
            found = mean_weights(_kernel(params, reader), [widths[n] for n in read])
            weights[read, column] = found
        targets = tuple(reader.name for reader in readers)
        yield HeatMap(name, _sources(len(widths) - 1), targets, weights)


def several_sources(model: nn.Module) -> dict[str, list[Reader]]:
    """What a heat map shows of each block: its layers, if one reads several outputs, and its end.

    Blocks of which nothing reads several outputs are left out.
    """
    found = {}
    for block, readers in model.readers().items():
        layers = [reader for reader in readers if reader.name.startswith("layer")]
        if all(len(reader.reads) == 1 for reader in layers):
            readers = readers[len(layers) :]
        if any(len(reader.reads) > 1 for reader in readers):
            found[block] = readers
    return found


def output_widths(model: nn.Module, params: Any) -> dict[str, tuple[int, ...]]:
    """The feature maps of each output of each block, by the block's name, from its input on."""
    found, readers = {}, model.readers()
    for name, graph in model.graphs().items():
        widths = (0, *graph.widths)
        reader = next(reader for reader in readers[name] if 0 in reader.reads)
        total = np.shape(_kernel(params, reader))[-2]
        found[name] = (total - sum(widths[n] for n in reader.reads), *graph.widths)
    return found


def _kernel(params: Any, reader: Reader) -> Any:
    return traverse_util.flatten_dict(params, sep="/")[f"{reader.kernel}/kernel"]


def _sources(depth: int) -> tuple[str, ...]:
    return ("input", *(f"layer{number}" for number in range(1, depth + 1)))


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
            weights = np.where(reads, sizes, np.nan)
            yield HeatMap(name, sources, (*sources[1:], "end"), weights, "size of coefficients")

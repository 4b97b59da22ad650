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
from densejax.models.densenet import DenseNet
from densejax.models.vovnet import VoVNet


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """What the layers of one block of a DenseNet, or of one OSA module of a VoVNet, read.

    Attributes:
      block: the name of the block or module.
      sources: "input" and the block's layers, in the order of their channels.
      targets: the layers that read several sources; the last one comes after the block.
      weights: float [sources, targets], the mean of |weight|; NaN where a target does not read a
        source.
    """

    block: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    weights: np.ndarray


def mean_weights(kernel: Any, widths: Sequence[int]) -> list[float]:
    """Mean of |weight| for each source; NaN for the sources that the kernel does not read.

    Args:
      kernel: [..., channels in, channels out]; it reads the first sources, one after the other.
      widths: number of feature maps of each source.
    """
    by_channel = np.abs(kernel).reshape(-1, *np.shape(kernel)[-2:]).mean((0, 2))
    ends = np.cumsum(widths).tolist()
    number = ends.index(len(by_channel)) + 1  # of the sources that it reads
    means = [part.mean() for part in np.split(by_channel, ends[: number - 1])]
    return means + [np.nan] * (len(widths) - number)


def heat_maps(model: nn.Module, params: Any) -> list[HeatMap]:
    """One heat map for each block of a DenseNet or each OSA module of a VoVNet.

    With one-shot aggregation a layer reads only the layer before it. The single target is then the
    1x1 convolution that aggregates, or the classifier after the last block of a DenseNet.

    Raises:
      UserError: a network whose layers read only one source.
    """
    if isinstance(model, DenseNet):
        blocks = _densenet_blocks(model, params)
    elif isinstance(model, VoVNet):
        blocks = _vovnet_modules(model, params)
    else:
        raise UserError(f"{type(model).__name__}: its layers read only one source; take a DenseNet")
    return [
        HeatMap(
            block=name,
            sources=("input", *(f"layer{number}" for number in range(1, len(widths)))),
            targets=tuple(kernels),
            weights=np.array([mean_weights(kernel, widths) for kernel in kernels.values()]).T,
        )
        for name, widths, kernels in blocks
    ]


def _densenet_blocks(model: DenseNet, params: Any) -> Iterator[tuple[str, list[int], dict]]:
    """(name, feature maps of each source, kernel of each target) of each block."""
    sizes = zip(model.widths(), model.block_depths(), model.growth_rates(), strict=True)
    for index, (width, depth, growth_rate) in enumerate(sizes, 1):
        name, transition = f"block{index}", f"transition{index}"
        layers = [f"layer{n}" for n in range(1, depth + 1) if model.join == "dense"]
        kernels = {layer: params[name][layer]["conv1"]["kernel"] for layer in layers}
        if transition in params:
            kernels[transition] = params[transition]["conv"]["kernel"]
        elif model.num_classes:
            kernels["classifier"] = params["head"]["classifier"]["kernel"]
        yield name, [width] + [growth_rate] * depth, kernels


def _vovnet_modules(model: VoVNet, params: Any) -> Iterator[tuple[str, list[int], dict]]:
    """The same of each OSA module."""
    for name in (name for name in params if "_module" in name):
        kernel, depth = params[name]["aggregation"]["conv"]["kernel"], model.module_depth
        width = model.widths[int(name.removeprefix("stage").split("_")[0]) - 1]
        yield name, [kernel.shape[-2] - depth * width] + [width] * depth, {"aggregation": kernel}


if __name__ == "__main__":  # the name of the command in earlier versions
    runpy.run_module("densejax.reuse", run_name="__main__")

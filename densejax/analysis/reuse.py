"""Which earlier layers a network reads, by the weights that read them.

The heat map of Huang et al. 2017, Figure 5: for a target layer and a source, the mean of |weight|
over all weights of the target's first convolution that read the source's feature maps. That is the
L1 norm of those weights over their number, so a source of many feature maps does not weigh more.
"""

import dataclasses
import runpy
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from densejax.config import UserError
from densejax.models.densenet import DenseNet
from densejax.models.vovnet import VoVNet


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """What the layers of one block, or of one OSA module, read.

    Attributes:
      block: its name.
      sources: "input" of the block and its layers, in the order of channels.
      targets: layers that read several sources; the last one stands behind the block or module.
      weights: float [sources, targets], the mean of |weight|; NaN where nothing is read.
    """

    block: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    weights: np.ndarray


def mean_weights(kernel: Any, widths: Sequence[int]) -> list[float]:
    """Mean of |weight| for each source; NaN for those beyond the kernel's input channels.

    Args:
      kernel: [..., channels in, channels out]; it reads the first sources, one after the other.
      widths: feature maps of each source.
    """
    by_channel = np.abs(kernel).reshape(-1, *np.shape(kernel)[-2:]).mean((0, 2))
    ends = [int(end) for end in np.cumsum(widths)]
    parts = ends[: ends.index(len(by_channel)) + 1]
    means = [part.mean() for part in np.split(by_channel, parts[:-1])]
    return means + [np.nan] * (len(widths) - len(means))


def heat_maps(model: nn.Module, params: Any) -> list[HeatMap]:
    """One heat map for each block of a DenseNet or each OSA module of a VoVNet.

    With one-shot aggregation a layer reads only the layer before it: the single target is the 1x1
    convolution (or, behind a network's last block, the classifier) that aggregates.

    Raises:
      UserError: a network whose layers read one source alone.
    """
    blocks = {}  # (feature maps of each source, kernel by target) by name
    if isinstance(model, VoVNet):
        for name in (name for name in params if "_module" in name):
            kernel, depth = params[name]["aggregation"]["conv"]["kernel"], model.module_depth
            width = model.widths[int(name.removeprefix("stage").split("_")[0]) - 1]
            first = kernel.shape[-2] - depth * width
            blocks[name] = [first] + [width] * depth, {"aggregation": kernel}
    elif isinstance(model, DenseNet):
        sizes = zip(model.widths(), model.block_depths(), model.growth_rates(), strict=True)
        for index, (width, depth, growth_rate) in enumerate(sizes, 1):
            name, end = f"block{index}", f"transition{index}"
            layers = [f"layer{n}" for n in range(1, depth + 1) if model.join == "dense"]
            kernels = {layer: params[name][layer]["conv1"]["kernel"] for layer in layers}
            if end in params:
                kernels[end] = params[end]["conv"]["kernel"]
            elif model.num_classes:
                kernels["classifier"] = params["head"]["classifier"]["kernel"]
            blocks[name] = [width] + [growth_rate] * depth, kernels
    else:
        raise UserError(f"{type(model).__name__}: its layers read one source; take a DenseNet")
    return [
        HeatMap(
            name,
            ("input", *(f"layer{number}" for number in range(1, len(widths)))),
            tuple(kernels),
            np.array([mean_weights(kernel, widths) for kernel in kernels.values()]).T,
        )
        for name, (widths, kernels) in blocks.items()
    ]


if __name__ == "__main__":  # the command's name in earlier versions
    runpy.run_module("densejax.reuse", run_name="__main__")

"""What a trained network loses where one connection is cut: which sources its layers need.

Weights say what a layer reads (densejax.analysis.reuse). A cut says whether the layer needs it. In
the input of this one layer, the maps of one source are replaced by their mean over the measured
images, channel by channel. Zeros would also shift the layer's input, because the next norm expects
the mean.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from densejax import models
from densejax.analysis import reuse
from densejax.analysis.reuse import HeatMap
from densejax.config import UserError
from densejax.inference.classifier import Classifier
from densejax.models.normalization import at_least_float32
from densejax.training import metrics
from densejax.training.losses import Loss

Means = dict[str, float]  # "loss" in nats, "accuracy" and perhaps "top5_accuracy" in [0, 1]


@dataclasses.dataclass(frozen=True)
class Connection:
    """A layer that reads a concatenation, and one source in it.

    Attributes:
      block: as a heat map names it.
      target: the layer, as a heat map names it.
      source: the number of an output of the block; 0 is its input.
      weight: the mean of |weight|.
      module: path of the module that gets the concatenation.
      channels: bool [channels], those of the concatenation that are of the source.
    """

    block: str
    target: str
    source: int
    weight: float
    module: str
    channels: np.ndarray


def connections(model: nn.Module, params: Any) -> list[Connection]:
    """All connections of a network, target by target.

    Raises:
      UserError: a network whose layers read no concatenations.
    """
    if not hasattr(model, "readers"):
        raise UserError(
            f"{type(model).__name__}: connections are cut where layers read concatenations; take a "
            f"DenseNet"
        )
    found, widths = [], reuse.output_widths(model, params)
    readers = reuse.several_sources(model)
    for one in reuse.heat_maps(model, params):
        for column, reader in enumerate(readers[one.block]):
            widths_read = [widths[one.block][source] for source in reader.reads]
            sources = np.repeat(reader.reads, widths_read)  # of each channel
            for source in reader.reads:
                weight = float(one.weights[source, column])
                fields = (one.block, reader.name, source, weight, reader.module, sources == source)
                found.append(Connection(*fields))
    return found


def measure(
    network: Classifier, loss: Loss, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> tuple[Means, list[Means]]:
    """The loss and accuracy of a network as it is, and with each of its connections cut, in turn.

    Running statistics are used, and images are prepared as in an evaluation.

    Args:
      network: a trained one whose layers read several sources.
      loss: of each example, from (logits, labels).
      images: uint8 [number, height, width, channels], as they are stored.
      labels: int32 [number].
      batch_size: images that are computed at once.

    Returns:
      (uncut, of each of `connections`).

    Raises:
      UserError: a network whose layers read no concatenations.
    """
    found = connections(network.model, network.variables["params"])
    uncut = {one.module: np.zeros_like(one.channels) for one in found}
    concatenating = dataclasses.replace(network, model=models.reference(network.model))
    variables = jax.device_put(network.variables)
    batches = [jax.device_put(batch) for batch in _batches(images, labels, batch_size)]

    def logits(variables, images, change):
        with nn.intercept_methods(_changing(uncut, change)):
            return concatenating.logits(variables, images)

    @jax.jit  # masks are its arguments: one program cuts every connection
    def cut(variables, batch, means, masks):
        def change(module, x):
            return jnp.where(masks[module], means[module].astype(x.dtype), x)

        found = logits(variables, batch["image"], change)
        of_each = loss(found, batch["label"])
        return metrics.sums(found, batch["label"], of_each, batch["mask"])

    @jax.jit
    def input_sums(variables, batch):
        sums = {}

        def change(module, x):
            of_each = at_least_float32(x).mean((1, 2))  # [views * batch, channels]
            of_each = of_each.reshape(-1, len(batch["mask"]), x.shape[-1]).mean(0)
            sums[module] = jnp.where(batch["mask"][:, None], of_each, 0).sum(0)
            return x

        logits(variables, batch["image"], change)
        return sums

    def total(function, *arguments):
        parts = [function(variables, batch, *arguments) for batch in batches]
        return jax.tree.map(lambda *parts: sum(parts), *jax.device_get(parts))

    means = jax.tree.map(lambda part: part / len(images), total(input_sums))
    means, uncut = jax.device_put((means, uncut))
    results = [total(cut, means, uncut | {one.module: one.channels}) for one in found]
    return metrics.means(total(cut, means, uncut)), [metrics.means(result) for result in results]


def _changing(modules, change: Callable[[str, jax.Array], jax.Array]) -> Callable:
    """An interceptor by which modules get `change(path, features)` in place of their features."""

    def intercept(method, arguments, options, context):
        path = "/".join(context.module.path)
        if path in modules and context.method_name == "__call__":
            arguments = (change(path, arguments[0]), *arguments[1:])
        return method(*arguments, **options)

    return intercept


def _batches(images, labels, size) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one size; the last is padded where "mask" is false."""
    for start in range(0, len(images), size := min(size, len(images))):
        places = np.arange(start, start + size)
        kept = np.minimum(places, len(images) - 1)
        yield {"image": images[kept], "label": labels[kept], "mask": places < len(images)}


def rank_correlation(connections: Sequence[Connection], damages: Sequence[float]) -> dict[str, Any]:
    """How alike the sources of a target are ordered by weight and by damage.

    They are compared within a target alone: over all connections, the width of sources and the
    depth of targets decide both.

    Args:
      connections: target by target.
      damages: what the loss rises by where each is cut.

    Returns:
      "mean": Spearman's rank correlation, the mean over targets, or None of none; "interval": 95 %
      of it by the bootstrap over targets, or None of fewer than two; "targets": the number of those
      that have at least three sources, neither all weights equal nor all damages.
    """
    found, pairs = [], zip(connections, damages, strict=True)
    for _, group in itertools.groupby(pairs, key=lambda pair: (pair[0].block, pair[0].target)):
        sides = np.array([(one.weight, damage) for one, damage in group]).T
        if sides.shape[1] >= 3 and np.ptp(sides, axis=1).all():
            found.append(float(stats.spearmanr(*sides).statistic))
    if len(found) < 2:
        return {"mean": found[0] if found else None, "interval": None, "targets": len(found)}
    draws = np.random.default_rng(0).choice(found, (10_000, len(found))).mean(1)
    interval = np.percentile(draws, (2.5, 97.5)).tolist()
    return {"mean": float(np.mean(found)), "interval": interval, "targets": len(found)}


def heat_maps(
    maps: Sequence[HeatMap], connections: Sequence[Connection], damages: Sequence[float]
) -> list[HeatMap]:
    """Heat maps of weights, with the damages in their place."""
    found = [dataclasses.replace(one, weights=np.full_like(one.weights, np.nan)) for one in maps]
    blocks = {one.block: one for one in found}
    for one, damage in zip(connections, damages, strict=True):
        block = blocks[one.block]
        block.weights[one.source, block.targets.index(one.target)] = damage
    return found

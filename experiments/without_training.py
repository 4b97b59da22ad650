"""Figures that need no training: python experiments/without_training.py --output=DIR.

counts.png        parameters and multiply-adds of DenseNet-BC and ResNet over their depth
feature_maps.png what a DenseNet's layers read, keep and are connected by, over its depth
gradients.png     gradient norm of every layer before the first step (compiles for minutes)

How much memory a compiled training step takes is experiments/benchmarks/memory_by_depth.py's.
"""

import jax
import numpy as np
import script

from densejax import models
from densejax.analysis import gradients, plots
from densejax.models import counts
from densejax.runs import formats, screen
from densejax.training import parallel

# (label, model, what gives a network of each depth, depths)
CIFAR = (32, 32, 3)
BASIC = {depth: (f"resnet{depth}_cifar", {}) for depth in (20, 32, 44, 56, 110)}
BOTTLENECK = {9 * n + 2: ("preact_resnet164", {"blocks": (n,) * 3}) for n in (4, 12, 18, 27)}
NETWORKS = {
    f"DenseNet-BC, k = {rate}": {
        depth: ("densenet_bc_100_12", {"depth": depth, "growth_rate": rate})
        for depth in (22, 40, 100, 190, 250)
    }
    for rate in (12, 24)
} | {"ResNet": BASIC, "ResNet, bottlenecks, pre-activation": BOTTLENECK}
INITIAL = {
    "plain": ("plain{}_cifar", (20, 56)),
    "residual": ("resnet{}_cifar", (20, 56)),
    "dense, k = 12": ("densenet_40_12", (22, 58)),
}


def network(name, changes):
    """A network of the table with changed fields and ten classes."""
    return models.create(models.fields(name, **changes), 10)


def draw_counts():
    """Parameters and multiply-adds of one 32x32 image over depth."""
    figure, panels = plots.figure(2)
    for number, (label, by_depth) in enumerate(NETWORKS.items()):
        values = [counts.of_network(network(*one), CIFAR) for one in by_depth.values()]
        for axes, column in zip(panels, zip(*values, strict=True), strict=True):
            axes.plot(list(by_depth), column, label=label, **plots.style(number))
    for axes, quantity in zip(panels, ("parameters", "multiply-adds of an image"), strict=True):
        plots.logarithmic(axes.xaxis, formats.si)
        plots.logarithmic(axes.yaxis, formats.si)
        axes.set(xlabel="depth L", ylabel=quantity)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def feature_maps(model):
    """(kept, read, connections) of a DenseNet's blocks.

    Returns:
      The feature maps that its blocks hold, each counted once; the feature maps that its L layers
      read, if each has a concatenation of its own; and the number of pairs of a layer (or the
      input) and a layer that reads it.
    """
    kept = read = connections = 0
    for width, depth, rate in zip(
        model.widths(), model.block_depths(), model.growth_rates(), strict=True
    ):
        kept += width + depth * rate
        read += depth * width + rate * depth * (depth - 1) // 2
        connections += depth * (depth + 1) // 2
    return kept, read, connections


def draw_feature_maps():
    """Feature maps kept and read, and connections, over depth."""
    figure, (maps, edges) = plots.figure(2)
    depths = (16, 22, 40, 58, 76, 100, 160, 250)
    made = [network("densenet_bc_100_12", {"depth": depth}) for depth in depths]
    kept, read, connections = zip(*map(feature_maps, made), strict=True)
    maps.plot(depths, read, label="read: every layer its own copy", **plots.style(1))
    maps.plot(depths, kept, label="kept: each once", **plots.style(0))
    layers = np.array([sum(model.block_depths()) for model in made])
    edges.plot(
        layers, layers * (layers + 1) / 2, label="one block: L (L + 1) / 2", **plots.style(1)
    )
    edges.plot(layers, connections, label="three blocks", **plots.style(0))
    edges.plot(layers, layers, label="a chain: L", **plots.style(2))
    maps.set(xlabel="depth L of DenseNet-BC, k = 12", ylabel="feature maps")
    edges.set(xlabel="dense layers L", ylabel="connections")
    for axes in (maps, edges):
        plots.logarithmic(axes.xaxis, formats.si)
        plots.logarithmic(axes.yaxis, formats.si)
        axes.legend()
    return figure


def draw_gradients(seeds=3, batch_size=64):
    """Norms by layer from image to classifier, geometric means over seeds; noise as images."""
    figure, panels = plots.figure(2)
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (batch_size, *CIFAR))
    labels = jax.random.randint(keys[1], (batch_size,), 0, 10)
    for number, (label, (name, depths)) in enumerate(INITIAL.items()):
        for axes, depth in zip(panels, depths, strict=True):
            changes = {"depth": depth} if name.startswith("densenet") else {}
            model = network(name.format(depth), changes)
            norms = []
            for seed in range(seeds):
                screen.show(f"gradients: {label}, L = {depth}, seed {seed} of {seeds}")
                found = gradients.kernel_norms(model, images, labels, seed)
                norms.append(list(found.values()))
            means = np.exp(np.log(norms).mean(0))
            marks = plots.style(number) | {"markersize": 3}
            axes.plot(range(1, len(means) + 1), means, label=f"{label}, L = {depth}", **marks)
    for axes in panels:
        axes.set(yscale="log", xlabel="layer, from the image", ylabel="gradient norm of its kernel")
        axes.legend()
    return figure


FIGURES = {"counts": draw_counts, "feature_maps": draw_feature_maps, "gradients": draw_gradients}


def main() -> None:
    """Writes the figures."""
    parser = script.Parser(__doc__)
    parser.add_argument("--output", type=script.path, required=True, help="folder")
    parser.add_argument(
        "--figures", nargs="+", choices=FIGURES, default=list(FIGURES), help="default: all"
    )
    options = parser.parse_args()
    parallel.start()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.figures:
        screen.show(f"drawing {name}.png")
        plots.save(FIGURES[name](), options.output / f"{name}.png")
        screen.say(f"{options.output}/{name}.png is drawn")


if __name__ == "__main__":
    script.run(main)

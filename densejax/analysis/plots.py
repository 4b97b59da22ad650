"""The look of all figures: importing this module sets it for matplotlib.

Colours have a contrast of at least 3 with a white and with a dark page (WCAG 2.2, 1.4.11), and
colour-blind readers can tell them apart (after Okabe and Ito, 2008). Markers and dashes differ too.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from densejax.config import UserError
from densejax.models.connections import Graph
from densejax.runs import files, formats

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise UserError("figures need matplotlib: pip install 'densejax-lab[plots]'") from error
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK = "#3b4149"  # of text and lines; `svg` replaces it by the colour of the page's text
COLORS = ("#0072b2", "#d55e00", "#008f68", "#c4628f", "#9a7400", "#6f6fd6", "#7f7f7f", "#3f8fbf")
MARKERS, DASHES = "os^DvPX*", ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))  # 24 different lines
matplotlib.rcParams.update(
    {
        "axes.axisbelow": True,
        "axes.edgecolor": INK,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "figure.titlesize": 10,
        "font.size": 9,
        "grid.alpha": 0.25,
        "grid.color": INK,
        "image.cmap": "cividis",
        "legend.fontsize": 9,
        "legend.frameon": False,
        "errorbar.capsize": 2,
        "lines.linewidth": 1.5,
        "lines.markersize": 5,
        "savefig.bbox": "tight",
        "svg.fonttype": "none",
        "pdf.fonttype": 42,  # TrueType, as publishers ask for
        "svg.hashsalt": "densejax",  # equal figures are equal files
        "text.color": INK,
        "text.parse_math": False,  # a "$" in a name is no formula
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


def figure(columns: int = 1, width: float = 4.8, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with panels beside each other; width and height of a panel are in inches."""
    figure = Figure(figsize=(columns * width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a figure's line `number`, counted from 0."""
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    return {"color": color, "marker": marker, "linestyle": DASHES[number % len(DASHES)]}


def logarithmic(axis: Any, form: Callable[[float], str]) -> None:
    """Makes `axes.xaxis` or `axes.yaxis`, after all data are drawn, logarithmic.

    `form` turns a value into its label.
    """
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("log")
    low, high = axis.get_view_interval()
    decades = LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,))
    axis.set_major_locator(MaxNLocator(4) if high < 5 * low else decades)
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_locator(NullLocator())


def legend(axes: Axes, columns: int = 2) -> None:
    """A legend below the panel, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=columns)


def heat_maps(maps: Sequence[Any], damages: Sequence[Any] = ()) -> Figure:
    """Draws what `densejax.analysis.reuse.heat_maps` returns, with a panel for each block.

    A colour is a weight divided by the largest of its column: 1 is the source that the target reads
    most. A box marks the target that comes after the block. If damages of the same connections are
    given, they are drawn likewise in a second row; they may be negative.
    """
    rows = {maps[0].measure: maps} | ({"increase of loss by a cut": damages} if damages else {})
    widths = [max(len(one.targets), 4) + 3 for one in maps]
    height = 0.19 * max(len(one.sources) for one in maps) + 1.7
    size = (0.19 * sum(widths) + 1.3, height * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(rows), len(maps), squeeze=False, width_ratios=widths)
    for row, (label, drawn) in zip(panels, rows.items(), strict=True):
        shares = [one.weights / np.nanmax(abs(one.weights), axis=0, initial=1e-30) for one in drawn]
        lowest = min(0.9, *(np.floor(10 * np.nanmin(share)) / 10 for share in shares))
        for axes, one, share in zip(row, drawn, shares, strict=True):
            image = axes.imshow(share, vmin=lowest, vmax=1, interpolation="nearest")
            for column, target in enumerate(one.targets):
                if not target.startswith("layer"):
                    box = Rectangle((column - 0.5, -0.5), 1, len(share), fill=False, linewidth=1.8)
                    axes.add_patch(box).set(edgecolor=INK, clip_on=False)
            for axis, names in ((axes.xaxis, one.targets), (axes.yaxis, one.sources)):
                shown = range(0, len(names), 1 + len(names) // 20)
                axis.set_ticks(shown, [names[number].removeprefix("layer") for number in shown])
            axes.tick_params("x", rotation=90)
            axes.grid(False)
            axes.set_title(one.block.replace("_", "\n"))
            axes.set_anchor("N")
        row[0].set_ylabel("source")
        figure.colorbar(image, ax=list(row), label=f"{label}\nover column's largest", shrink=0.7)
    figure.supxlabel("target", fontsize=9)
    return figure


def short(name: str, length: int = 20) -> str:
    """A name that a figure has room for."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def confusion(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draws how many images of each class are taken for which, as shares of the class's images.

    Colours grow with the 0.4th power of a share: a mistake in a hundred images can be seen.

    Args:
      counts: int [classes, classes], by the class and by the class predicted.
      class_names: of which those are shown that there is room for.
    """
    number = len(class_names)
    side = min(max(0.34 * number + 0.6, 2.0), 11.0)  # inches
    figure = Figure(figsize=(side + 2.4, side + 1.2), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.4, 0, 1))
    shown = range(0, number, math.ceil(number / (11 * side)))
    names = [short(class_names[place]) for place in shown]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(shown, names, fontsize=min(9, max(6, 50 * side / number)))
    axes.tick_params("x", rotation=90)
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="class")
    for row, column in np.argwhere(counts) if number <= 20 else ():
        color = "white" if shares[row, column] > 0.2 else "black"
        text = axes.text(column, row, counts[row, column], color=color, fontsize=7)
        text.set(ha="center", va="center")
    bar = figure.colorbar(image, label="share of the class's images", shrink=0.8)
    bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1], labels=["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    return figure


def reliability(bins: Mapping[str, Sequence], error: float) -> Figure:
    """Draws accuracy against confidence, by bins as `assessment.calibration` returns them.

    Vertical lines are the gaps whose mean over images is the expected calibration error.
    """
    figure = Figure(figsize=(4.8, 4.6), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    images, *means = (np.array(bins[name], float) for name in ("images", "confidence", "accuracy"))
    confidence, accuracy = means
    label = "as often right as confident"
    axes.plot((0, 1), (0, 1), color=INK, linestyle="--", linewidth=1, label=label)
    axes.vlines(confidence, accuracy, confidence, color=COLORS[1], linewidth=3, label="gap")
    few = (images > 0) & (images < 20)
    for inside, color, label in (
        (images >= 20, COLORS[0], "a bin of images"),
        (few, "white", "a bin of fewer than 20 images"),
    ):
        if inside.any():
            places = confidence[inside], accuracy[inside]
            (points,) = axes.plot(*places, "o", color=COLORS[0], label=label, clip_on=False)
            points.set(markerfacecolor=color, zorder=3)
    axes.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"expected calibration error {formats.percent(error)} ({len(images)} bins)")
    axes.legend(loc="upper left")
    edges = np.linspace(0, 1, len(images) + 1)
    below.stairs(images / images.sum(), edges, fill=True, color=COLORS[0])
    below.set(xlabel="confidence: the largest probability", ylabel="share of\nimages", ylim=(0, 1))
    return figure


def mistakes(
    found: Sequence[Mapping[str, Any]], images: Sequence[np.ndarray], white_level: int = 255
) -> Figure:
    """Draws images [height, width, channels] that are taken for another class, side by side.

    Args:
      found: "class", "predicted", "probability" and "file" ("" for none) of each.
      images: uint8; of other than three channels their mean is drawn.
      white_level: the value of white.
    """
    columns = min(max(len(found), 3), 6)
    rows = max(-(-len(found) // columns), 1)
    figure = Figure(figsize=(1.6 * columns, 2.3 * rows + 0.3), layout="constrained")
    figure.suptitle("the most confident mistakes" if found else "no mistakes")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    for axes, one, image in zip(panels, found, images, strict=False):
        image = image if image.shape[-1] == 3 else image.mean(-1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=white_level)
        lines = [one["class"], f"taken for {one['predicted']}", formats.percent(one["probability"])]
        axes.set_title("\n".join(short(line, 24) for line in lines), fontsize=8)
        file = "/".join(one["file"].split("/")[-2:])
        text = axes.text(0.5, -0.03, short(file, 30), fontsize=5, transform=axes.transAxes)
        text.set(ha="center", va="top")
    return figure


def connections(graphs: Mapping[str, Graph]) -> Figure:
    """Draws what each layer reads, with a panel for each block: arcs, or a matrix of a deep block.

    0 is the block's input, and "end" what follows it.
    """
    depths = [len(graph.reads) for graph in graphs.values()]
    widths = [min(2 + 0.35 * depth, 5) for depth in depths]
    figure = Figure(figsize=(sum(widths), 0.5 + max(widths) * 0.7), layout="constrained")
    panels = figure.subplots(1, len(graphs), squeeze=False, width_ratios=widths)[0]
    for axes, (name, graph), depth in zip(panels, graphs.items(), depths, strict=True):
        readers = (*graph.reads, graph.emits)
        axes.set_title(name)
        axes.grid(False)
        names = [*map(str, range(depth + 1)), "end"]
        step = 1 + depth // 20
        shown = [*range(0, depth + 2 - step, step), depth + 1]
        axes.set_xticks(shown, [names[number] for number in shown])
        if depth > 12:
            read = np.zeros((depth + 1, depth + 2))
            for reader, sources in enumerate(readers, 1):
                read[list(sources), reader] = 1
            axes.imshow(read, cmap="Greys", vmin=0, vmax=1.4, aspect="equal")
            axes.set_xlim(0.5, depth + 1.5)
            axes.set(xlabel="reader", ylabel="output that is read")
            continue
        for reader, sources in enumerate(readers, 1):
            for source in sources:
                length, color = reader - source, COLORS[source % len(COLORS)]
                arc = Arc(((reader + source) / 2, 0), length, length, theta2=180, color=color)
                axes.add_patch(arc).set(linewidth=1.3)
        axes.plot(range(depth + 2), [0] * (depth + 2), "o", color=INK, clip_on=False)
        axes.set(xlim=(-0.3, depth + 1.3), ylim=(0, (depth + 1) / 2 + 0.2), yticks=())
        axes.set_aspect("equal")
        axes.spines["left"].set_visible(False)
    return figure


def save(figure: Figure, path: epath.PathLike, form: str = "png") -> None:
    """Writes a figure as PNG, SVG or PDF, of which equal figures are equal files."""
    file, undated = io.BytesIO(), {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(file, format=form, dpi=150, metadata=undated.get(form))
    files.write(epath.Path(path), file.getvalue())


def svg(figure: Figure, title: str) -> str:
    """A figure as an SVG element that takes the text colour and the font of its page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None}, dpi=144)
    text = file.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S
    )
    text = re.sub(r' id="[a-z0-9]+_\d+"', "", text)  # figures on one page must not share ids
    text = text.replace(INK, "currentColor").replace("'DejaVu Sans'", "inherit")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)

"""The figures of a sweep for experiments/report.py: of groups of runs that differ only in the seed.

Errors are in percent. Marks are means over seeds; a mark of a single seed is hollow. Bars are 95 %
intervals, from three seeds on. A kind of network has one name, colour and marker everywhere.
"""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox
from sweep_runs import Group, Run, numeric, say

from densejax import config as schema
from densejax.analysis import plots, reuse
from densejax.config import UserError
from densejax.inference import classifier
from densejax.runs import formats

COUNTS = ("parameters", "multiply_adds")
# What an error is drawn against: a network's costs, with the Pareto front, and its paths.
COSTS = {
    "parameters": "parameters",
    "multiply_adds": "multiply-adds of an image",
    "training_seconds": "seconds of training",
    "latency_64": "seconds to classify 64 images",
}
PATHS = {
    "longest_path": "layers on the longest path",
    "mean_path": "layers on the mean path",
    "edges": "outputs that layers read (edges)",
}
MOST = 5  # lines that a panel has room for
FAR = 4  # times the median error: a network that is worse would squeeze all others into a line
# The colour (a number in plots.COLORS) of each kind; kinds that add have squares and dashes.
CONCATENATING = {"dense": 0, "one-shot": 2, "exponential": 5, "window": 4, "hardnet": 3}
CONCATENATING |= {"random": 7, "chain": 6}
SUMMING = {"residual": 1, "plain": 6, "weighted": 4, "laurel": 3, "dsnet": 2, "hyper": 5}
LOOKS = {kind: (color, "o", plots.DASHES[0]) for kind, color in CONCATENATING.items()}
LOOKS |= {kind: (color, "s", plots.DASHES[1]) for kind, color in SUMMING.items()}
LOOKS |= {"VoVNet": (2, "^", plots.DASHES[2]), "RDNet": (0, "^", plots.DASHES[2])}
LOOKS |= {"HarDNet": (3, "^", plots.DASHES[2])}


def style(kind: str) -> dict[str, Any]:
    """Colour, marker and dashes of a kind of network; options such as ":size=2" do not matter."""
    color, marker, dashes = LOOKS.get(kind.partition(":")[0], (6, "D", plots.DASHES[2]))
    return {"color": plots.COLORS[color], "marker": marker, "linestyle": dashes}


def styles(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """As `style` of each group; where a kind is repeated, each has a look of its own."""
    if len({group.kind for group in groups}) == len(groups):
        return [style(group.kind) for group in groups]
    return [plots.style(number) for number in range(len(groups))]


def error_of(groups: Sequence[Group]) -> str:
    """The name of the groups' error, which says on what images it was measured."""
    return f"{' or '.join(sorted({group.split for group in groups}))} error (%)"


def mark(
    axes: Axes, x: Sequence[float], groups: Sequence[Group], quantity: str, label: str = "", **look
) -> None:
    """Means of a quantity in [0, 1] at x, with intervals."""
    means = [100 * group.mean(quantity) for group in groups]
    axes.plot(x, means, **look | {"marker": ""})
    axes.plot([], [], label=label or None, **look)
    for place, mean, group in zip(x, means, groups, strict=True):
        spread = 100 * group.half_width(quantity) if len(group.runs) > 2 else math.nan
        face = {"markerfacecolor": "none"} if len(group.runs) == 1 else {}
        _, *bars = axes.errorbar([place], [mean], [spread], **look | face | {"linestyle": ""})
        for part in itertools.chain(*bars):  # a mark may reach over the edge, its bar may not
            part.set_clip_on(True)


def annotate(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Texts beside points, (x, y, text, colour) each, that overlap neither points nor each other.

    Call it when everything else is drawn: it finds the places in pixels.
    """
    axes.figure.draw_without_rendering()
    pixels = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in pixels]
    sides = [(1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)]
    across, up = ({-1: "right", 0: "center", 1: "left"}, {-1: "top", 0: "center", 1: "bottom"})
    for x, y, text, color in sorted(points):
        arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": color, "shrinkA": 0}
        look = {"textcoords": "offset points", "fontsize": 9, "color": color, "arrowprops": arrow}
        label = axes.annotate(text, (x, y), (0, 0), **look)
        label.set_in_layout(False)
        for distance, (right, above) in itertools.product((5, 12, 20, 30, 42), sides):
            label.set(ha=across[right], va=up[above])
            label.xyann = (distance * right, distance * above)
            label.get_window_extent()  # which moves the text
            box = Text.get_window_extent(label)  # of the text without the line
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.figure.bbox.x1
            inside &= axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        label.arrow_patch.set_visible(distance > 5)
        taken.append(box)


def curve(group: Group) -> tuple[list[float], list[float]]:
    """(epochs, training errors as it learns): means over the group's runs."""
    by_epoch = {}
    for record in itertools.chain.from_iterable(run.records for run in group.runs):
        if "train_accuracy" in record:
            by_epoch.setdefault(record["epoch"], []).append(100 * (1 - record["train_accuracy"]))
    return list(by_epoch), [statistics.fmean(errors) for errors in by_epoch.values()]


def legend(axes: Axes) -> None:
    """A legend below a panel, of one column where a label is long."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]))
    plots.legend(axes, 1 if longest > 20 else 2)


def curves(groups: Sequence[Group], limits: tuple[float, float]) -> Figure:
    """Error over epochs: lines are training, as it learns; marks at the end are the result."""
    figure, (axes,) = plots.figure(width=4.0)
    for group, look in zip(groups, styles(groups), strict=True):
        line = look | {"marker": "", "linewidth": 1.1}
        axes.plot(*curve(group), label=plots.short(group.label(), 36), **line)
        end = group.records[-1]["epoch"]
        mark(axes, [end], [group], "error", **look | {"linestyle": "", "clip_on": False})
    axes.set_ylim(limits)
    plots.logarithmic(axes.yaxis, "{:g}".format)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.set(xlabel="epoch", ylabel="error (%)")
    legend(axes)
    return figure


def front(groups: Sequence[Group], quantity: str) -> list[Group]:
    """The Pareto front: no other group has both less of the quantity and no larger error."""
    best, found = math.inf, []
    for group in sorted(groups, key=lambda g: (g.mean(quantity), g.mean("error"))):
        if group.mean("error") < best:
            best = group.mean("error")
            found.append(group)
    return found


def against(groups: Sequence[Group], quantity: str, numbers: str = "") -> Figure:
    """Error over a quantity of COSTS or PATHS, a mark for each group; costs also have the front.

    A thin line joins the marks of one kind.

    Args:
      groups: each of another network.
      quantity: what the horizontal axis shows.
      numbers: the axis that is written beside the marks; "": the kinds, if each is there once.
    """
    kinds = sorted({group.kind for group in groups})
    each_once = len(kinds) == len(groups)
    below = 0 if each_once else math.ceil(len(kinds) / 3) * 0.2  # inches of the legend
    figure, (axes,) = plots.figure(width=4.0, height=3.4 + below)
    for kind in kinds:
        mine = [group for group in groups if group.kind == kind]
        mine.sort(key=lambda group: group.mean(quantity))
        x, look = [group.mean(quantity) for group in mine], style(kind)
        mark(axes, x, mine, "error", label=kind, **look | {"linestyle": ""})
        y = [100 * group.mean("error") for group in mine]
        axes.plot(x, y, color=look["color"], linewidth=0.8, alpha=0.5, zorder=0)
    if quantity in COSTS:
        best = front(groups, quantity)
        steps = [[g.mean(quantity) for g in best], [100 * g.mean("error") for g in best]]
        look = {"color": plots.INK, "alpha": 0.5, "zorder": 0}
        axes.step(*steps, where="post", linewidth=0.8, **look)
        corner = {"transform": axes.transAxes, "ha": "right", "va": "top", "fontsize": 8}
        axes.text(0.99, 0.99, "line: Pareto front", **corner, **look)
    axes.margins(0.12)
    low, high = axes.dataLim.intervalx
    if high >= 3 * low > 0:
        plots.logarithmic(axes.xaxis, formats.si)
    else:
        axes.xaxis.set_major_formatter(lambda value, _: formats.si(value))
        axes.locator_params("x", nbins=5)
    plots.logarithmic(axes.yaxis, "{:.3g}".format)
    axes.set(xlabel=(COSTS | PATHS)[quantity], ylabel=error_of(groups))
    if len(kinds) > 1 and not each_once:
        figure.legend(loc="outside lower center", ncols=3)
    if each_once or numbers:
        points = []
        for group in groups:
            text = group.kind if each_once else say(group.axes[numbers])
            place = group.mean(quantity), 100 * group.mean("error")
            points.append((*place, text, style(group.kind)["color"]))
        annotate(axes, points)
    return figure


def along(groups: Sequence[Group], axis: str) -> Figure:
    """Error along an axis of numbers: test solid, training (not augmented) dotted without marks.

    Groups that are alike on the other axes make a line. If no two groups of one kind of network
    have the same place on this axis, they make one line; the other axes are written below this one.
    """
    figure, (axes,) = plots.figure(width=4.0)
    lines, others = {}, [name for name in groups[0].axes if name != axis]
    is_line = len({group.kind for group in groups}) == 1
    is_line &= len({group.axes[axis] for group in groups}) == len(groups)
    for group in sorted(groups, key=lambda group: group.axes[axis]):
        rest = {key: value for key, value in group.axes.items() if key != axis}
        lines.setdefault("" if is_line else str(rest), []).append(group)
    looks = styles([line[0] for line in lines.values()])
    for line, look in zip(lines.values(), looks, strict=True):
        x = [group.axes[axis] for group in line]
        label = plots.short(line[0].label(axis), 36)
        mark(axes, x, line, "error", label=label, **look | {"linestyle": "-"})
        axes.plot(x, [100 * group.mean("train_error") for group in line], ":", color=look["color"])
    values = sorted({group.axes[axis] for group in groups})
    ticks, name = {value: formats.si(value) for value in values}, axis.replace("_", " ")
    if is_line and others:
        for group in groups:
            below = (say(group.axes[other]) for other in others)
            ticks[group.axes[axis]] = "\n".join((formats.si(group.axes[axis]), *below))
        name = "\n".join((name, *(f"below it: {other.replace('_', ' ')}" for other in others)))
    scale = float
    if values[-1] >= 8 * values[0] > 0:
        plots.logarithmic(axes.xaxis, formats.si)
        scale = math.log
    shown = values[:1]
    for value in values[1:]:  # numbers that would overlap the one before have no tick
        if scale(value) - scale(shown[-1]) > (scale(values[-1]) - scale(values[0])) / 15:
            shown.append(value)
    axes.set_xticks(shown, [ticks[value] for value in shown])
    errors = [100 * group.mean(name) for name in ("error", "train_error") for group in groups]
    if max(errors) >= 3 * min(errors) > 0:
        plots.logarithmic(axes.yaxis, "{:.3g}".format)
    axes.set(xlabel=name, ylabel=f"training, {error_of(groups)}")
    if len(lines) > 1:
        legend(axes)
    return figure


def gaps(groups: Sequence[Group]) -> Figure:
    """Training (not augmented) and test error of each group, joined by a line."""
    labels = [plots.short(group.label(), 36) for group in groups]
    size = {"width": 3.0 + 0.08 * max(map(len, labels)), "height": 1.0 + 0.22 * len(groups)}
    figure, (axes,) = plots.figure(**size)
    rows = range(len(groups))
    train, test = ([100 * g.mean(name) for g in groups] for name in ("train_error", "error"))
    axes.hlines(rows, train, test, color=plots.INK, linewidth=1)
    split = error_of(groups).removesuffix(" error (%)")
    for values, number, label in ((train, 1, "training"), (test, 0, split)):
        look = plots.style(number) | {"linestyle": ""}
        axes.plot([], [], label=label, **look)
        for row, value in enumerate(values):
            face = {"markerfacecolor": "none"} if len(groups[row].runs) == 1 else {}
            axes.plot([value], [row], **look | face)
    axes.set_yticks(rows, labels)
    axes.set(xlabel="error (%)", ylim=(len(groups) - 0.5, -0.5))
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)
    return figure


def of_costs_and_paths(groups: Sequence[Group], what: str) -> Iterator[tuple[str, str, Figure]]:
    """As `of_sweep`: error against each quantity in which the groups differ by 5 % or more."""
    alike = all(group.axes.keys() == groups[0].axes.keys() for group in groups)
    numbers = numeric(groups, least=2)[:1] if alike else []
    for quantity, name in (COSTS | PATHS).items():
        values = [group.mean(quantity) for group in groups]
        if not any(map(math.isnan, values)) and max(values) >= 1.05 * min(values):
            text = f"{error_of(groups).capitalize()} against {name}{what}"
            text += f"; numbers: {numbers[0].replace('_', ' ')}" if numbers else ""
            text += "; the line is the Pareto front" if quantity in COSTS else ""
            yield quantity, f"{text}.", against(groups, quantity, *numbers)


def near(groups: Sequence[Group]) -> tuple[list[Group], str]:
    """(those whose error is at most `FAR` times the median, what a caption says of the others)."""
    limit = FAR * statistics.median(group.mean("error") for group in groups)
    far = [group for group in groups if group.mean("error") > limit]
    names = ", ".join(f"{g.label()} ({100 * g.mean('error'):.0f} %)" for g in far)
    said = f" Outside the picture: {names}." if far else ""
    return [group for group in groups if group not in far], said


def of_sweep(groups: Sequence[Group]) -> Iterator[tuple[str, str, Figure]]:
    """(file name, caption, figure) of all that can be drawn of a sweep's groups."""
    groups, said = near(groups)
    for name, text, figure in _of_sweep(groups):
        yield name, text + said, figure


def _of_sweep(groups):
    axes, split = numeric(groups), error_of(groups).removesuffix(" error (%)")
    for axis in axes:
        text = f"Error along {axis.replace('_', ' ')}: {split} images solid, training images, not "
        yield f"by_{axis}", text + "augmented, dotted.", along(groups, axis)
    if len({(group.kind, *map(group.mean, COUNTS)) for group in groups}) == len(groups) > 1:
        yield from of_costs_and_paths(groups, "")
    if not any(math.isnan(group.mean("gap")) for group in groups):
        text = f"Train/test gap: errors on training images, not augmented, and {split} images."
        yield "gap", text, gaps(groups)
    if all(len(curve(group)[0]) < 2 for group in groups):
        return  # one epoch is no curve
    seen = [error for g in groups for error in (*curve(g)[1], 100 * g.mean("error"))]
    limits = (max(0.9 * min(seen), 0.01), 1.1 * max(seen))
    panels = [groups[start : start + MOST] for start in range(0, len(groups), MOST)]
    for number, panel in enumerate(panels, 1):
        part = f" {number} of {len(panels)}" if len(panels) > 1 else ""
        text = f"Learning curves{part}: training error as it learns, on augmented images; "
        text += f"the mark at the end is the {split} error of the result."
        yield f"curves{part.replace(' ', '_')}", text, curves(panel, limits)


def of_all(groups: dict[str, list[Group]]) -> Iterator[tuple[str, str, Figure]]:
    """As `of_sweep`, for the networks of all sweeps that have the most common recipe.

    The learning rate is no part of the recipe: each kind of network has its own best rate.
    """
    recipes, defaults = {}, schema.default().to_dict()
    for group in itertools.chain.from_iterable(groups.values()):
        # A key that is newer than a run gets its default value.
        recipe = [
            defaults[section] | group.config[section]
            for section in ("data", "augmentation", "train", "evaluate", "optimizer")
        ]
        recipe[-1].pop("learning_rate")
        networks = recipes.setdefault(json.dumps(recipe), {})
        networks.setdefault((group.kind, *map(group.mean, COUNTS)), group)
    if not recipes:
        return
    mine, said = near(list(max(recipes.values(), key=len).values()))
    if len({group.kind for group in mine}) > 1:
        rates = {}
        for group in mine:
            rates.setdefault(group.config["optimizer"]["learning_rate"], set()).add(group.kind)
        by_rate = "; ".join(f"{rate}: {', '.join(sorted(rates[rate]))}" for rate in sorted(rates))
        what = ", all networks of one recipe"
        what += f" but for the peak learning rate ({by_rate})" if len(rates) > 1 else ""
        for name, text, figure in of_costs_and_paths(mine, what):
            yield name, text + said, figure


def heat_maps(groups: Sequence[Group]) -> Iterator[tuple[str, str, Figure]]:
    """As `of_sweep`: what the layers of each group's first network read, if its weights exist."""
    for group in groups:
        run = group.runs[0]
        if group.config["model"]["family"] != "resnet" and (run.path / "checkpoints").exists():
            try:
                network = classifier.load(run.path)
                maps = reuse.heat_maps(network.model, network.variables["params"])
            except UserError as error:  # a damaged checkpoint costs its picture, not the page
                print(f"densejax: {run.path}: no heat map: {error}", file=sys.stderr)
                continue
            caption = f"{group.label()}, seed {run.sweep['seed']}"
            yield f"reuse_{run.name}", caption, plots.heat_maps(maps)


def of_assessment(run: Run) -> Iterator[tuple[str, str, Figure]]:
    """As `of_sweep`: which classes a run's network confuses, and how well it is calibrated."""
    found = run.assessment
    counts, names = np.array(found["confusion"]), found["classes"]["name"]
    text = f"Images of each class (rows) by the class predicted, {found['split']} images."
    yield f"confusion_{run.name}", text, plots.confusion(counts, names)
    text = "Accuracy against confidence, in bins of equal width."
    error = found["calibration_error"]
    yield f"reliability_{run.name}", text, plots.reliability(found["calibration"], error)

"""The figures of a sweep for experiments/report.py: of groups of runs that differ in seed alone.

Errors are in percent. Marks are means and bars sample standard deviations over seeds.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from densejax import formats
from densejax.analysis import plots

MOST = 8  # lines in a panel that tell apart; more go into a panel for each kind of network


def mark(axes: Axes, x: Sequence[float], groups: Sequence[Any], quantity: str, **style) -> None:
    """Means of a quantity in [0, 1] at x, with deviations."""
    means = [100 * group.mean(quantity) for group in groups]
    spread = [100 * group.deviation(quantity) for group in groups]
    axes.errorbar(x, means, spread, **style)


def curves(groups: Sequence[Any]) -> Figure:
    """Error over epochs: lines are training, as it learns; marks at the end are the result."""
    figure, (axes,) = plots.figure()
    for number, group in enumerate(groups):
        by_epoch = {}
        for record in itertools.chain.from_iterable(run.records for run in group.runs):
            if "train_accuracy" in record:
                errors = by_epoch.setdefault(record["epoch"], [])
                errors.append(100 * (1 - record["train_accuracy"]))
        means = [statistics.fmean(errors) for errors in by_epoch.values()]
        style = plots.style(number)
        axes.plot(by_epoch, means, label=group.label(), **style | {"marker": "", "linewidth": 1.1})
        end = group.config["train"]["epochs"]
        mark(axes, [end], [group], "error", **style | {"linestyle": "", "clip_on": False})
    plots.logarithmic(axes.yaxis, "{:g}".format)
    axes.set(xlabel="epoch", ylabel="error (%)")
    plots.legend(axes)
    return figure


def against(groups: Sequence[Any], quantity: str) -> Figure:
    """Error over a count of the network, a mark for each group, by kind of network."""
    figure, (axes,) = plots.figure()
    for number, kind in enumerate(sorted({group.kind for group in groups})):
        mine = sorted((g for g in groups if g.kind == kind), key=lambda g: g.mean(quantity))
        x = [group.mean(quantity) for group in mine]
        mark(axes, x, mine, "error", label=kind, **plots.style(number) | {"linestyle": ""})
        for place, group in zip(x, mine if len(groups) < 12 else (), strict=False):
            point = place, 100 * group.mean("error")
            axes.annotate(
                group.label("kind"), point, (5, 4), textcoords="offset points", fontsize=7
            )
    plots.logarithmic(axes.xaxis, formats.si)
    plots.logarithmic(axes.yaxis, "{:g}".format)
    axes.margins(0.12)
    axes.set(xlabel=quantity.replace("_", "-"), ylabel="error (%)")
    plots.legend(axes)
    return figure


def along(groups: Sequence[Any], axis: str) -> Figure:
    """Error along an axis of numbers: test solid, training (not augmented) dashed."""
    figure, (axes,) = plots.figure()
    lines = {}
    for group in groups:
        rest = {key: value for key, value in group.axes.items() if key != axis}
        lines.setdefault(str(rest), []).append(group)
    for number, line in enumerate(lines.values()):
        x = [group.axes[axis] for group in line]
        style = plots.style(number)
        label = line[0].label(axis) or "test"
        mark(axes, x, line, "error", label=label, **style | {"linestyle": "-"})
        dashed = {"linestyle": "--", "markerfacecolor": "none"}
        mark(axes, x, line, "train_error", **style | dashed)
    if max(x) >= 8 * min(x) > 0:
        plots.logarithmic(axes.xaxis, formats.si)
    axes.set_ylim(bottom=0)
    axes.set(xlabel=axis.replace("_", " "), ylabel="error (%)")
    plots.legend(axes)
    return figure


def gaps(groups: Sequence[Any]) -> Figure:
    """Training (not augmented) and test error of each group, joined by a line."""
    figure, (axes,) = plots.figure(height=1.0 + 0.22 * len(groups))
    rows = range(len(groups))
    train, test = ([100 * g.mean(name) for g in groups] for name in ("train_error", "error"))
    axes.hlines(rows, train, test, color=plots.INK, linewidth=1)
    axes.plot(train, rows, label="training", **plots.style(1) | {"linestyle": ""})
    axes.plot(test, rows, label="test", **plots.style(0) | {"linestyle": ""})
    axes.set_yticks(rows, [group.label() for group in groups])
    axes.set(xlabel="error (%)", ylim=(len(groups) - 0.5, -0.5))
    axes.set_xlim(left=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, 0), ncols=2)
    return figure


def of_sweep(groups: Sequence[Any]) -> Iterator[tuple[str, str, Figure]]:
    """(file name, caption, figure) of all that can be drawn of a sweep's groups."""
    by_kind = itertools.groupby(sorted(groups, key=lambda g: g.kind), key=lambda g: g.kind)
    panels = {"": groups} if len(groups) <= MOST else {kind: list(g) for kind, g in by_kind}
    for axis, first in groups[0].axes.items():
        values = {group.axes.get(axis) for group in groups if not isinstance(first, bool | str)}
        if len(values) > 2 and all(isinstance(value, int | float) for value in values):
            name = axis.replace("_", " ")
            text = f"Error along {name}: test solid, training images without augmentation dashed."
            yield f"by_{axis}", text, along(groups, axis)
    counts = ("parameters", "multiply_adds")
    if len({tuple(map(g.mean, counts)) for g in groups}) == len(groups) > 1:
        for count in counts:
            yield count, f"Test error against {count.replace('_', '-')}.", against(groups, count)
    if not any(math.isnan(group.mean("gap")) for group in groups):
        text = "Train/test gap: errors on training images, not augmented, and on test images."
        yield "gap", text, gaps(groups)
    for kind, mine in panels.items():
        text = f"Learning curves{kind and ', ' + kind}: training error as it learns, on augmented "
        text += "images; the mark at the end is the test error of the result."
        yield f"curves{kind and '_' + kind.replace(' ', '_')}", text, curves(mine)

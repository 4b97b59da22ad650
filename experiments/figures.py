"""The figures of a sweep for experiments/report.py: of groups of runs that differ in seed alone.

Errors are in percent. Marks are means and bars sample standard deviations over seeds.
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

from densejax import config as schema
from densejax.analysis import plots, reuse
from densejax.config import UserError
from densejax.inference import classifier
from densejax.runs import formats

COUNTS = ("parameters", "multiply_adds")
MOST = 9  # lines that a panel has room for; more go into a panel for each kind of network


def say(value: Any) -> str:
    """A value of an axis for people."""
    return value.replace("_", "-") if isinstance(value, str) else str(value)


def numeric(groups: Sequence[Any]) -> list[str]:
    """The axes along which at least three numbers lie."""
    found = []
    for axis in groups[0].axes:
        values = {group.axes.get(axis) for group in groups}
        if len(values) > 2 and {type(value) for value in values} <= {int, float}:
            found.append(axis)
    return found


def error_of(groups: Sequence[Any]) -> str:
    """The name of the groups' error: of what images it is."""
    return f"{' or '.join(sorted({group.split for group in groups}))} error (%)"


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
        axes.plot(
            list(by_epoch), means, label=group.label(), **style | {"marker": "", "linewidth": 1.1}
        )
        end = group.config["train"]["epochs"]
        mark(axes, [end], [group], "error", **style | {"linestyle": "", "clip_on": False})
    plots.logarithmic(axes.yaxis, "{:g}".format)
    axes.set(xlabel="epoch", ylabel=f"training error, at the end {error_of(groups)}")
    plots.legend(axes)
    return figure


def against(groups: Sequence[Any], quantity: str, numbers: str = "") -> Figure:
    """Error over a count, a mark for each group, by kind; `numbers`: the axis beside the marks."""
    figure, (axes,) = plots.figure()
    for number, kind in enumerate(sorted({group.kind for group in groups})):
        mine = [group for group in groups if group.kind == kind]
        x = [group.mean(quantity) for group in mine]
        mark(axes, x, mine, "error", label=kind, **plots.style(number) | {"linestyle": ""})
        for place, group in zip(x, mine if numbers else (), strict=False):
            point, text = (place, 100 * group.mean("error")), say(group.axes[numbers])
            axes.annotate(text, point, (5, 4), textcoords="offset points", fontsize=8)
    axes.margins(0.1)
    low, high = axes.dataLim.intervalx
    if high < 1.2 * low:  # counts that are about equal stand at about the same place
        axes.set_xlim(0.75 * low, high / 0.75)
    plots.logarithmic(axes.xaxis, formats.si)
    plots.logarithmic(axes.yaxis, "{:.3g}".format)
    axes.set(xlabel=quantity.replace("_", "-"), ylabel=error_of(groups))
    if len({group.kind for group in groups}) > 1:
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
        label = line[0].label(axis)
        mark(axes, x, line, "error", label=label, **style | {"linestyle": "-"})
        dashed = {"linestyle": "--", "markerfacecolor": "none"}
        mark(axes, x, line, "train_error", **style | dashed)
    values = sorted({group.axes[axis] for group in groups})
    if values[-1] >= 8 * values[0] > 0:
        plots.logarithmic(axes.xaxis, formats.si)
    axes.set_xticks(values, map(formats.si, values))
    axes.set(xlabel=axis.replace("_", " "), ylabel=f"training, {error_of(groups)}")
    if len(lines) > 1:
        plots.legend(axes)
    return figure


def gaps(groups: Sequence[Any]) -> Figure:
    """Training (not augmented) and test error of each group, joined by a line."""
    figure, (axes,) = plots.figure(height=1.0 + 0.22 * len(groups))
    rows = range(len(groups))
    train, test = ([100 * g.mean(name) for g in groups] for name in ("train_error", "error"))
    axes.hlines(rows, train, test, color=plots.INK, linewidth=1)
    axes.plot(train, rows, label="training", **plots.style(1) | {"linestyle": ""})
    label = error_of(groups).removesuffix(" error (%)")
    axes.plot(test, rows, label=label, **plots.style(0) | {"linestyle": ""})
    axes.set_yticks(rows, [group.label() for group in groups])
    axes.set(xlabel="error (%)", ylim=(len(groups) - 0.5, -0.5))
    axes.set_xlim(left=0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)
    return figure


def of_sweep(groups: Sequence[Any]) -> Iterator[tuple[str, str, Figure]]:
    """(file name, caption, figure) of all that can be drawn of a sweep's groups."""
    by_kind = itertools.groupby(sorted(groups, key=lambda g: g.kind), key=lambda g: g.kind)
    panels = {"": groups} if len(groups) <= MOST else {kind: list(g) for kind, g in by_kind}
    axes, split = numeric(groups), error_of(groups).removesuffix(" error (%)")
    for axis in axes:
        text = f"Error along {axis.replace('_', ' ')}: {split} images solid, training images, not "
        yield f"by_{axis}", text + "augmented, dashed.", along(groups, axis)
    if len({(group.kind, *map(group.mean, COUNTS)) for group in groups}) == len(groups) > 1:
        for count in COUNTS:
            text = f"{split.capitalize()} error against {count.replace('_', '-')}"
            text += f"; numbers: {axes[0].replace('_', ' ')}." if axes else "."
            yield count, text, against(groups, count, *axes[:1])
    if not any(math.isnan(group.mean("gap")) for group in groups):
        text = f"Train/test gap: errors on training images, not augmented, and {split} images."
        yield "gap", text, gaps(groups)
    for kind, mine in panels.items():
        text = f"Learning curves{kind and ', ' + kind}: training error as it learns, on augmented "
        text += f"images; the mark at the end is the {split} error of the result."
        yield f"curves{kind and '_' + kind.replace(' ', '_')}", text, curves(mine)


def of_all(groups: dict[str, list[Any]]) -> Iterator[tuple[str, str, Figure]]:
    """As `of_sweep`, of all sweeps whose points are networks under the one most common recipe.

    The learning rate is not part of it: each kind of network has its own best.
    """
    recipes, defaults = {}, schema.default().to_dict()
    for group in itertools.chain.from_iterable(groups.values()):
        # A key that is newer than a run is at its default.
        recipe = [
            defaults[section] | group.config[section]
            for section in ("data", "augmentation", "train", "evaluate", "optimizer")
        ]
        recipe[-1].pop("learning_rate")
        networks = recipes.setdefault(json.dumps(recipe), {})
        networks.setdefault((group.kind, *map(group.mean, COUNTS)), group)
    mine = list(max(recipes.values(), key=len, default={}).values())
    if len({group.kind for group in mine}) > 1:
        rates = {(group.kind, group.config["optimizer"]["learning_rate"]) for group in mine}
        said = ", ".join(f"{rate} ({kind})" for kind, rate in sorted(rates))
        for count in COUNTS:
            text = f"{error_of(mine).capitalize()} against {count.replace('_', '-')}, all networks "
            text += f"of one recipe but for the peak learning rate: {said}."
            yield count, text, against(mine, count)


def heat_maps(groups: Sequence[Any]) -> Iterator[tuple[str, str, Figure]]:
    """As `of_sweep`: what the layers of each group's first network read, if it is here."""
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


def of_assessment(run: Any) -> Iterator[tuple[str, str, Figure]]:
    """As `of_sweep`: which classes a run's network confuses, and how well it is calibrated."""
    found = run.assessment
    counts, names = np.array(found["confusion"]), found["classes"]["name"]
    text = f"Images of each class (rows) by the class predicted, {found['split']} images."
    yield f"confusion_{run.name}", text, plots.confusion(counts, names)
    text = "Accuracy against confidence, in bins of equal width."
    error = found["calibration_error"]
    yield f"reliability_{run.name}", text, plots.reliability(found["calibration"], error)

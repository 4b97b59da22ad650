"""Sweeps as a table, figures and one page: python experiments/report.py --root=DIR [--output=DIR].

Reads ROOT/SWEEP/RUN of experiments/run.py; writes runs.csv (a row for each run), index.html (one
page that needs no network, light and dark) and its figures as PNG into DIR, by default ROOT/report.
Runs that have not ended are listed and enter no mean. Errors are in percent, bars and +- are sample
standard deviations over seeds.
"""

import argparse
import csv
import dataclasses
import functools
import html
import io
import itertools
import json
import math
import statistics
import string
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import figures
from etils import epath
from matplotlib.figure import Figure
from sweeps import SWEEPS

from densejax import classifier, files, formats, parallel
from densejax.analysis import plots, reuse
from densejax.config import UserError, default, flatten

KINDS = {
    ("densenet", "dense"): "DenseNet",
    ("resnet", "add"): "ResNet",
    ("densenet", "one_shot"): "one-shot DenseNet",
    ("vovnet", None): "VoVNet",
    ("resnet", "none"): "plain network",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory: its sweep.json, config.json, metrics.jsonl, last start and summary.json.

    `result`, the summary, is {} where the run has not ended.
    """

    path: epath.Path
    sweep: dict[str, Any]
    config: dict[str, Any]
    records: list[dict[str, float]]
    start: dict[str, Any]
    result: dict[str, Any]

    @functools.cached_property
    def axes(self) -> dict[str, Any]:
        """Its place in the sweep, without the seed."""
        return {key: value for key, value in self.sweep["axes"].items() if key != "seed"}

    @functools.cached_property
    def kind(self) -> str:
        """How its network joins layers."""
        model = self.config["model"]
        return KINDS[model["family"], model.get("join")]

    @property
    def state(self) -> str:
        """Its result, or how far it is, for people."""
        if self.result:
            return formats.percent(self.measures["accuracy"])
        if not self.records:
            return "no step logged yet"
        return f"epoch {self.records[-1]['epoch']:.1f} of {self.config['train']['epochs']}"

    @functools.cached_property
    def measures(self) -> dict[str, Any]:
        """Every number and name of its result, and what follows from them; {} without a result."""
        found = {key: v for key, v in self.result.items() if not isinstance(v, dict | list)}
        if found:
            images = found["steps"] * self.config["train"]["batch_size"]
            found["training_compute"] = 6 * found["multiply_adds"] * images
            split = self.config["evaluate"]["final_split"]
            found |= {name: found[f"{split}_{name}"] for name in ("accuracy", "error")}
            if "train_error" in found:
                found["gap"] = found["error"] - found["train_error"]
        return found


@dataclasses.dataclass(frozen=True)
class Group:
    """The ended runs of a sweep that differ in their seed alone."""

    runs: list[Run]

    def __getattr__(self, name: str) -> Any:
        """What all its runs share: axes, kind."""
        return getattr(self.runs[0], name)

    def label(self, without: str = "") -> str:
        """Its place in the sweep, as `dense, depth 40`, `without` one of the axes."""
        words = []
        for key, value in self.axes.items():
            name = key.replace("_", " ")
            if isinstance(value, bool):
                text = name if value else f"not {name}"
            else:
                text = say(value) if key == "kind" else f"{name} {say(value)}"
            words += [text] if key != without else []
        return ", ".join(words)

    def values(self, quantity: str) -> list[float]:
        """One value for each run that has it."""
        found = (run.measures.get(quantity) for run in self.runs)
        return [value for value in found if value is not None]

    def mean(self, quantity: str) -> float:
        """The mean over runs, NaN where no run has the quantity."""
        values = self.values(quantity)
        return statistics.fmean(values) if values else math.nan

    def deviation(self, quantity: str) -> float:
        """The sample standard deviation over runs, NaN of fewer than two."""
        values = self.values(quantity)
        return statistics.stdev(values) if len(values) > 1 else math.nan


def say(value: Any) -> str:
    """A value of an axis for people."""
    return str(value) if isinstance(value, bool | float | int) else str(value).replace("_", "-")


def read(root: epath.Path) -> dict[str, list[Run]]:
    """The runs below a root by sweep (raises UserError where there is none)."""

    def load(path):
        return json.loads(path.read_text()) if path.exists() else {}

    def lines(path):
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    found = {}
    for file in sorted(root.glob("*/*/sweep.json")):
        path, sweep = file.parent, load(file)
        starts = lines(path / "history.jsonl") or [{"versions": {}, "devices": ""}]
        rest = load(path / "config.json"), lines(path / "metrics.jsonl"), starts[-1]
        run = Run(path, sweep, *rest, load(path / "summary.json"))
        found.setdefault(sweep["sweep"], []).append(run)
    if not found:
        raise UserError(f"--root={root}: it has no SWEEP/RUN/sweep.json; experiments/run.py trains")
    return found


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The ended runs, those of one place in the sweep together, in the order of the axes."""
    found = {}
    for run in runs:
        if run.result:
            found.setdefault(json.dumps(run.axes, sort_keys=True), []).append(run)

    def order(group):
        return [
            (isinstance(v, str), str(v) if isinstance(v, str) else v) for v in group.axes.values()
        ]

    return sorted((Group(runs) for runs in found.values()), key=order)


def table(sweeps: dict[str, list[Run]]) -> str:
    """All runs as CSV, one row each; what a run has not is empty."""
    rows = []
    for run in itertools.chain.from_iterable(sweeps.values()):
        row = {"sweep": run.sweep["sweep"], "run": run.sweep["run"], "seed": run.sweep["seed"]}
        row |= {"finished": bool(run.result), "parameters": None, "multiply_adds": None}
        row |= {"test_accuracy": None, "train_loss": None}
        rows.append(row | run.measures | run.axes | {"command": run.sweep["command"]})
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def cell(value: Any, text: str = "") -> str:
    """A table's cell: the value that it is sorted by, and what it shows."""
    missing = value is None or value != value
    kind = "" if isinstance(value, str | bool) else ' class="number"'
    shown, sorts = ("–", "") if missing else (text or say(value), str(value))
    return f'<td{kind} data-value="{html.escape(sorts)}">{html.escape(shown)}</td>'


def results(groups: Sequence[Group]) -> str:
    """The sortable table of a sweep's groups."""

    def points(group, quantity):
        mean, spread = 100 * group.mean(quantity), 100 * group.deviation(quantity)
        return cell(mean, f"{mean:.2f}" + (f" ± {spread:.2f}" if spread == spread else ""))

    def number(group, quantity, form=formats.si):
        return cell(mean := group.mean(quantity), "" if math.isnan(mean) else form(round(mean)))

    columns = {
        key: functools.partial(lambda key, g: cell(g.axes.get(key)), key) for key in groups[0].axes
    }
    columns |= {
        "network": lambda g: cell(g.kind, g.kind),
        "n": lambda g: cell(len(g.runs)),
        "accuracy (%)": lambda g: points(g, "accuracy"),
        "training accuracy (%)": lambda g: points(g, "train_accuracy"),
        "gap (points)": lambda g: points(g, "gap"),
        "parameters": lambda g: number(g, "parameters", formats.count),
        "multiply-adds": lambda g: number(g, "multiply_adds"),
        "training FLOP": lambda g: number(g, "training_compute"),
        "images/s": lambda g: number(g, "images_per_second", formats.count),
    }
    heads = (name.replace("_", " ") for name in columns)
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in heads)
    rows = ("".join(column(group) for column in columns.values()) for group in groups)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<div class="scrolls" tabindex="0"><table><caption>Means over n seeds ± sample standard '
        "deviation. Training accuracy: on training images, not augmented, after the last step. "
        "Training FLOP: 6 × multiply-adds × images seen. Images/s: whatever else the machine did."
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def listed(values: dict[str, Any]) -> str:
    """Keys of a configuration and their values."""
    pairs = (f"{key}={json.dumps(value)}" for key, value in sorted(values.items()))
    return f"<code>{html.escape(', '.join(pairs)) or 'nothing'}</code>"


def provenance(runs: Sequence[Run]) -> str:
    """Each run's command, what of its configuration is its own, and its versions."""
    known = json.loads(default().to_json())  # a tuple is a list there, as in config.json
    flat = [flatten(run.config) for run in runs]
    keys = sorted(set().union(*flat))
    own = {key for key in keys if len({json.dumps(values.get(key)) for values in flat}) > 1}
    shared = {key: value for key, value in flat[0].items() if key not in own}
    changed = {key: v for key, v in shared.items() if flatten(known).get(key, "") != v}
    parts = [f"<p>In all runs, beside the defaults: {listed(changed)}</p>"]
    for run, values in zip(runs, flat, strict=True):
        versions = " ".join(f"{name} {version}" for name, version in run.start["versions"].items())
        parts.append(
            f"<details><summary>{html.escape(run.sweep['run'])}: {run.state}</summary>"
            f"<pre><code>{html.escape(run.sweep['command'])}</code></pre>"
            f"<p>In this run: {listed({key: values[key] for key in own & values.keys()})}</p>"
            f'<p class="quiet">{html.escape(run.start["devices"])}; {html.escape(versions)}</p>'
            "</details>"
        )
    return (
        f"<details><summary>Commands, configurations, versions</summary>{''.join(parts)}</details>"
    )


def heat_maps(groups: Sequence[Group]) -> Iterator[tuple[str, str, Figure]]:
    """As figures.of_sweep: what the layers of each group's first network read, if it is here."""
    for group in groups:
        run = group.runs[0]
        if run.config["model"]["family"] != "resnet" and (run.path / "checkpoints").exists():
            network = classifier.load(run.path)
            maps = reuse.heat_maps(network.model, network.variables["params"])
            caption = f"{group.label()}, seed {run.sweep['seed']}"
            yield f"reuse_{run.sweep['run']}", caption, plots.heat_maps(maps)


def section(name: str, runs: Sequence[Run], folder: epath.Path) -> str:
    """A sweep's part of the page; writes its figures."""
    groups = grouped(runs)
    question = SWEEPS[name].__doc__.strip().splitlines()[0] if name in SWEEPS else ""
    left = [run for run in runs if not run.result]
    parts = [
        f'<section id="{name}"><h2>{name.replace("_", " ")}</h2><p>{html.escape(question)}</p>'
    ]
    parts.append(f'<p class="quiet">{len(runs) - len(left)} of {len(runs)} runs have ended.</p>')
    if groups:
        best = max(groups, key=lambda group: group.mean("accuracy"))
        parts.append(f"<p>Most accurate: {html.escape(best.label())}.</p>{results(groups)}")

    def draw(drawings, kind):
        for file, caption, drawing in drawings:
            plots.save(drawing, folder / f"{name}_{file}.png")
            caption = html.escape(caption)
            svg = plots.svg(drawing, caption)
            yield f"<figure{kind}>{svg}<figcaption>{caption}</figcaption></figure>"

    if groups:
        parts.append(f'<div class="figures">{"".join(draw(figures.of_sweep(groups), ""))}</div>')
    if maps := "".join(draw(heat_maps(groups), ' class="wide scrolls" tabindex="0"')):
        parts.append(
            "<details><summary>Feature reuse: what each layer reads</summary><p>Mean |weight| of "
            "the first convolution that reads a source's feature maps, over its column's largest. "
            f"A box marks what stands behind the block.</p>{maps}</details>"
        )
    if left:
        items = (f"<li>{html.escape(run.sweep['run'])}: {run.state}</li>" for run in left)
        parts.append(f"<p>Not ended, in no mean:</p><ul>{''.join(items)}</ul>")
    return "".join([*parts, provenance(runs), "</section>"])


def main() -> int:
    """Does what the flags say; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=epath.Path, required=True, help="holds SWEEP/RUN")
    parser.add_argument("--output", type=epath.Path, help="folder; default: ROOT/report")
    options = parser.parse_args()
    try:
        sweeps = read(options.root)
        folder = options.output or options.root / "report"
        folder.mkdir(parents=True, exist_ok=True)
        parallel.start()
        body = "".join(section(name, runs, folder) for name, runs in sweeps.items())
    except UserError as error:
        print(f"densejax: {error}", file=sys.stderr)
        return 2
    links = "".join(f'<a href="#{name}">{name.replace("_", " ")}</a>' for name in sweeps)
    page = (epath.Path(__file__).parent / "report.html").read_text()
    page = string.Template(page).substitute(
        title="densejax: sweeps", body=f"<nav>{links}</nav>{body}"
    )
    files.write(folder / "runs.csv", table(sweeps))
    files.write(folder / "index.html", page)
    print(f"{folder}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())

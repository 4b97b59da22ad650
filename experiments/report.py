"""Sweeps as tables, figures and one page: python experiments/report.py --root=DIR [--output=DIR].

Reads ROOT/SWEEP/RUN of experiments/run.py; writes into DIR, by default ROOT/report, runs.csv (a row
for each run), report.csv (for each mean), report.md (the tables), index.html (one page that needs
no network, light and dark) and its figures, by default as PNG. Runs that have not ended, or are
damaged, are listed and enter no mean. Where runs of one mean are of different code, data, weights,
versions or precision, that is said, and nothing is written; --select=code=0123 takes some of them.
"""

import argparse
import collections
import csv
import dataclasses
import functools
import glob
import io
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import page
import script
from comparisons import half_width
from etils import epath
from figures import kind_of, numeric, say
from ml_collections import ConfigDict
from sweeps import differences, origin

from densejax import models
from densejax.analysis import assessment
from densejax.config import UserError
from densejax.data import facts
from densejax.models import counts
from densejax.runs import files, formats, workdir
from densejax.training import parallel, result

# report.csv has the means of these; for shares of the images it also has the spread.
SHARES = ("accuracy", "error", "train_accuracy", "train_error", "gap")
QUANTITIES = ("parameters", "multiply_adds", "training_compute", "training_seconds", "edges")
QUANTITIES += ("longest_path", "mean_path", "images_per_second", "latency_1", "latency_64")


@functools.cache
def paths(model: str) -> dict[str, float]:
    """Edges and paths of a stored section `config.model`, as JSON; {} where they are not known."""
    try:
        section = facts.without_lists(models.completed(json.loads(model)))
        graphs = models.create(section, 10).graphs()
    except (UserError, AttributeError):  # fields of another version, or a family without graphs
        return {}
    return dataclasses.asdict(counts.connections(graphs.values()))


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory: its sweep.json, config.json, metrics.jsonl, last start and summary.json.

    `result`, the summary, is {} if the run has not ended. `assessment` is {} if the result has
    none. `damage` says why the run is left out.
    """

    path: epath.Path
    sweep: dict[str, Any]
    config: dict[str, Any]
    records: list[dict[str, float]]
    start: dict[str, Any]
    result: dict[str, Any]
    assessment: dict[str, Any] = dataclasses.field(default_factory=dict)
    damage: str = ""

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.name

    @functools.cached_property
    def axes(self) -> dict[str, Any]:
        """Its place in the sweep, without the seed."""
        return {key: value for key, value in self.sweep["axes"].items() if key != "seed"}

    @functools.cached_property
    def kind(self) -> str:
        """How its network joins layers."""
        model = models.completed(self.config["model"])
        return kind_of(model["family"], model.get("connect"))

    @property
    def split(self) -> str:
        """The images that its result, and so its error, was measured on."""
        return self.config["evaluate"]["final_split"]

    @property
    def versions(self) -> dict[str, str]:
        """The versions of its result, or else of its last start."""
        return self.result.get("versions", self.start["versions"])

    @property
    def state(self) -> str:
        """Its result, or how far it is, for people."""
        if self.damage:
            return self.damage
        if self.result:
            return f"{self.split} accuracy {formats.percent(self.measures['accuracy'])}"
        if self.sweep.get("diverged"):
            return "diverged: its numbers were not finite"
        if not self.records:
            return "no step logged yet"
        last, train = self.records[-1], self.config["train"]
        limit = f", step {last['step']} of {limit}" if (limit := train.get("max_steps")) else ""
        return f"epoch {last['epoch']:.1f} of {train['epochs']}{limit}"

    @functools.cached_property
    def measures(self) -> dict[str, Any]:
        """Every number and name of its result, and what follows from them; {} without a result."""
        found = {key: v for key, v in self.result.items() if not isinstance(v, dict | list)}
        if found:
            images = found["steps"] * self.config["train"]["batch_size"]
            found["training_compute"] = 6 * found["multiply_adds"] * images
            if found["images_per_second"]:  # none where a run was too short to be timed
                found["training_seconds"] = images / found["images_per_second"]
            found |= paths(json.dumps(self.config["model"]))
            found |= {name: found[f"{self.split}_{name}"] for name in ("accuracy", "error")}
            for images, seconds in self.sweep["latency"].items():
                found[f"latency_{images}"] = seconds
            if "train_error" in found:
                found["gap"] = found["error"] - found["train_error"]
        return found


@dataclasses.dataclass(frozen=True)
class Group:
    """The ended runs of a sweep that differ in their seed alone."""

    runs: list[Run]

    def __getattr__(self, name: str) -> Any:
        """What all its runs share: axes, kind, split, versions."""
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

    def half_width(self, quantity: str) -> float:
        """Half of the 95 % t interval of the mean, NaN of fewer than two values."""
        return half_width(self.values(quantity))

    def deviation(self, quantity: str) -> float:
        """The sample standard deviation over runs, NaN of fewer than two."""
        values = self.values(quantity)
        return statistics.stdev(values) if len(values) > 1 else math.nan


def read(root: epath.Path) -> dict[str, list[Run]]:
    """The runs below a root by sweep (raises UserError where there is none)."""
    found = {}
    for file in sorted(epath.Path(glob.escape(str(root))).glob("*/*/sweep.json")):
        try:
            run = read_run(file.parent)
            _ = run.state, run.measures, run.versions, run.config and run.kind, run.start["devices"]
            _ = run.sweep["seed"], run.sweep["command"]
            if not all(isinstance(value, str | int | float) for value in run.axes.values()):
                raise TypeError(f"axes = {run.axes}")
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            sweep = {"axes": {}, "seed": None, "command": ""}
            start = {"versions": {}, "devices": ""}
            damage = f"damaged: {str(error) or repr(error)}"
            run = Run(file.parent, sweep, {}, [], start, {}, damage=damage)
            said = UserError(f"{run.path} is left out: {run.state}")
            print(f"densejax: {said}", file=sys.stderr)
        found.setdefault(file.parent.parent.name, []).append(run)
    if not found:
        raise UserError(f"--root={root}: it has no SWEEP/RUN/sweep.json; experiments/run.py trains")
    return found


def read_run(path: epath.Path) -> Run:
    """The run in a directory.

    Raises:
      ValueError, LookupError, TypeError, AttributeError, OSError: something of it is damaged.
    """
    sweep = script.read_json(path / "sweep.json")
    latencies = script.read_json(path.parent / "latency.json", {}).get("seconds", {})
    sweep["latency"] = latencies.get(path.name.rpartition("_seed")[0], {})
    starts = workdir.history(path) or [{"versions": {}, "devices": ""}]
    records = script.read_json(path / "metrics.jsonl", [], lines=True)
    config, summary = script.read_json(path / "config.json", {}), result.read(path) or {}
    now = ConfigDict(workdir.completed(config)) if summary else None
    if summary and not workdir.same_run(summary["config"], now):
        summary = {}  # the run goes on to more epochs than its result has
    found = assessment.read(path) if summary else {}
    return Run(path, sweep, config, records, starts[-1], summary, found)


def selected(runs: Sequence[Run], words: Sequence[str]) -> list[Run]:
    """The runs; results of other versions than `words`, such as "code=0123", are left out."""
    found = []
    for run in runs:
        for word in words:
            key, _, value = word.partition("=")
            if run.result and not run.versions.get(key, "").startswith(value):
                why = f"{key} is {run.versions.get(key, 'not recorded')}, not {value}"
                run = dataclasses.replace(run, result={}, assessment={}, damage=why)
        found.append(run)
    return found


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The ended runs, grouped by their place in the sweep.

    Groups are ranked by their error; if an axis has numbers, they are in the order of the axes.
    """
    found = {}
    for run in runs:
        if run.result:
            found.setdefault(json.dumps(run.axes, sort_keys=True), []).append(run)
    groups = [Group(runs) for runs in found.values()]

    def order(group):
        return [
            (isinstance(v, str), str(v) if isinstance(v, str) else v) for v in group.axes.values()
        ]

    groups.sort(key=order)
    if groups and not numeric(groups):
        groups.sort(key=lambda group: (group.split, group.mean("error")))
    return groups


def require_comparable(root: epath.Path, groups: dict[str, list[Group]]) -> None:
    """Raises UserError with every group whose runs differ in more than their seed, or not in it."""
    found, remedy = [], "Train all of them again with the same, into another --root of run.py"
    for name, ended in groups.items():
        for group in ended:
            seeds = collections.Counter(run.sweep["seed"] for run in group.runs)
            if max(seeds.values()) > 1:
                alike = ", ".join(r.name for r in group.runs if seeds[r.sweep["seed"]] > 1)
                raise UserError(
                    f"--root={root}: {name}, {group.label()}: {alike} have a seed in common, which "
                    f"would count twice; keep one run of each seed"
                )
            others = differences({run.name: origin(run.name, run.result) for run in group.runs})
            found += [f"{name}, {group.label()}: {others}"] if others else []
            for key in ("jax", "code") if others else ():
                if len({run.versions.get(key) for run in group.runs}) > 1:
                    remedy = f"--select={key}={group.versions.get(key)} takes those of one {key}"
    if found:
        raise UserError(
            f"--root={root}: no mean is taken over runs of different code, data, weights, "
            f"versions, precision or configurations: {'; '.join(found)}. {remedy}"
        )


def plain(value: Any) -> Any:
    """A value for a CSV, changed so that no spreadsheet takes it for a formula."""
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if is_formula else value


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV; a value that a row does not have is empty."""
    rows = [{plain(key): plain(value) for key, value in row.items()} for row in rows]
    file = io.StringIO()
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def table_of_runs(sweeps: dict[str, list[Run]]) -> str:
    """All runs as CSV, one row each."""
    rows = []
    for run in itertools.chain.from_iterable(sweeps.values()):
        row = {"sweep": run.path.parent.name, "run": run.name, "seed": run.sweep["seed"]}
        row |= {"finished": bool(run.result), "parameters": None, "multiply_adds": None}
        row |= {"test_accuracy": None, "train_loss": None, "mismatch": run.sweep.get("mismatch")}
        row |= {"split": run.split if run.result else None} | run.measures | run.axes
        rows.append(row | run.versions | {"command": run.sweep["command"]})
    return csv_of(rows)


def table_of_means(groups: dict[str, list[Group]]) -> str:
    """All groups as CSV, one row each; intervals are halves of 95 % t intervals."""
    rows = []
    for sweep, ended in groups.items():
        for group in ended:
            row = {"sweep": sweep, "n": len(group.runs), "network": group.kind}
            row |= group.axes | {"split": group.split, "mismatch": group.sweep.get("mismatch")}
            for name in (name for name in SHARES if group.values(name)):
                row |= {name: group.mean(name), f"{name}_interval": group.half_width(name)}
                row[f"{name}_deviation"] = group.deviation(name)
            row |= {name: group.mean(name) for name in QUANTITIES if group.values(name)}
            rows.append({k: None if v != v else v for k, v in row.items()} | group.versions)
    return csv_of(rows)


def formats_of(text: str) -> list[str]:
    """The type of --formats."""
    found = text.split(",")
    if not set(found) <= {"png", "svg", "pdf"}:
        raise argparse.ArgumentTypeError(f"{text!r}: give some of png,svg,pdf")
    return found


def main() -> None:
    """Does what the flags say."""
    parser = script.Parser(__doc__)
    parser.add_argument(
        "--root", type=script.path, required=True, help="the folder that has SWEEP/RUN"
    )
    parser.add_argument("--output", type=script.path, help="folder; default: ROOT/report")
    parser.add_argument(
        "--select", action="append", default=[], help="takes only runs of one version: code=0123"
    )
    parser.add_argument(
        "--formats", type=formats_of, default=["png"], help="formats of the figures: png,svg,pdf"
    )
    options = parser.parse_args()
    sweeps = {name: selected(runs, options.select) for name, runs in read(options.root).items()}
    groups = {name: grouped(runs) for name, runs in sweeps.items()}
    require_comparable(options.root, groups)
    folder = options.output or options.root / "report"
    folder.mkdir(parents=True, exist_ok=True)
    parallel.start()
    files.write(folder / "runs.csv", table_of_runs(sweeps))
    files.write(folder / "report.csv", table_of_means(groups))
    files.write(folder / "report.md", page.markdown(sweeps, groups))
    content = page.of(sweeps, groups, "densejax: sweeps", page.Files(folder, options.formats))
    files.write(folder / "index.html", content)
    print(f"{folder}/index.html")
    if not any(groups.values()):
        raise UserError(f"--root={options.root}: no run has ended whole, so the report is empty")


if __name__ == "__main__":
    script.run(main)

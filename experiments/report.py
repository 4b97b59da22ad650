"""Sweeps as a table, figures and one page: python experiments/report.py --root=DIR [--output=DIR].

Reads ROOT/SWEEP/RUN of experiments/run.py; writes runs.csv (a row for each run), index.html (one
page that needs no network, light and dark) and its figures as PNG into DIR, by default ROOT/report.
Runs that have not ended are listed and enter no mean.
"""

import argparse
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import page
from etils import epath
from figures import say

from densejax import files, formats, parallel
from densejax.config import UserError

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
        latencies = load(path.parent / "latency.json").get("seconds", {})  # of --latency
        sweep["latency"] = latencies.get(sweep["run"].rpartition("_seed")[0], {})
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
        row |= {"test_accuracy": None, "train_loss": None, "mismatch": run.sweep.get("mismatch")}
        rows.append(row | run.measures | run.axes | {"command": run.sweep["command"]})
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


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
        files.write(folder / "runs.csv", table(sweeps))
        groups = {name: grouped(runs) for name, runs in sweeps.items()}
        content = page.of(sweeps, groups, "densejax: sweeps", folder)
        files.write(folder / "index.html", content)
    except UserError as error:
        print(f"densejax: {error}", file=sys.stderr)
        return 2
    print(f"{folder}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())

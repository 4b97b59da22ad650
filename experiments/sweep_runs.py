"""The runs of sweeps, read from their directories, and their means over seeds."""

import dataclasses
import functools
import glob
import json
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import script
from etils import epath
from ml_collections import ConfigDict
from scipy import stats
from sweeps import ADDING

from densejax import models
from densejax.analysis import assessment
from densejax.config import UserError
from densejax.data import facts
from densejax.models import counts
from densejax.runs import formats, workdir
from densejax.training import result

FAMILIES = {"vovnet": "VoVNet", "rdnet": "RDNet", "hardnet": "HarDNet"}


def say(value: Any) -> str:
    """A value of an axis for people."""
    return value.replace("_", "-") if isinstance(value, str) else str(value)


def kind_of(family: str, connect: Any) -> str:
    """What a network is called by how it joins layers."""
    if family in FAMILIES:
        return FAMILIES[family]
    if not isinstance(connect, str):
        return "its own graph"
    return say(ADDING.get(connect, connect) if family == "resnet" else connect)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % t interval of a mean; NaN of fewer than two values."""
    if len(values) < 2:
        return math.nan
    quantile = stats.t.ppf(0.975, len(values) - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


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

    def require_whole(self) -> None:
        """Raises ValueError, LookupError, TypeError or AttributeError if a part is damaged."""
        _ = self.state, self.measures, self.versions, self.config and self.kind
        _ = self.start["devices"], self.sweep["seed"], self.sweep["command"]
        if not all(isinstance(value, str | int | float) for value in self.axes.values()):
            raise TypeError(f"axes = {self.axes}")

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
            run.require_whole()
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


def numeric(groups: Sequence["Group"], least: int = 3) -> list[str]:
    """The axes whose values are numbers, at least `least` different ones."""
    found = []
    for axis in groups[0].axes:
        values = {group.axes.get(axis) for group in groups}
        if len(values) >= least and {type(value) for value in values} <= {int, float}:
            found.append(axis)
    return found

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
import io
import itertools
from collections.abc import Sequence
from typing import Any

import page
import script
from etils import epath
from sweep_runs import Group, Run, grouped, read, selected
from sweeps import differences, origin

from densejax.config import UserError
from densejax.runs import files
from densejax.training import parallel

# report.csv has the means of these; for shares of the images it also has the spread.
SHARES = ("accuracy", "error", "train_accuracy", "train_error", "gap")
QUANTITIES = ("parameters", "multiply_adds", "training_compute", "training_seconds", "edges")
QUANTITIES += ("longest_path", "mean_path", "images_per_second", "latency_1", "latency_64")


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

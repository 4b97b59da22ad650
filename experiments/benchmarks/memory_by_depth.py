"""How the memory of a training step grows with a DenseNet-BC's depth (k = 12); nothing runs.

Command: python experiments/benchmarks/memory_by_depth.py --output=FILE.json [--target=v5e]
             [--depths=40,100,160,250] [--implementations=in_place,in_place:layer,concat]
             [--plot=FILE.png] [--format=json]

The step is compiled for abstract arrays and the compiler's own account is read: its temporary
memory is what activations and their gradients need. `--target` is `cpu` or a device of
densejax/targets, as for traffic.py. Every figure goes into FILE.json as it comes, and what stands
there already is not compiled again by the same code.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import networks
import numpy as np
from etils import epath
from networks import Work

from densejax.config import UserError
from densejax.runs import files, formats, workdir
from experiments import script

MODEL = "densenet_bc_100_12"


def compile_one(work: Work, name: str, target: str) -> dict[str, Any]:
    """Bytes of one compiled step and the seconds that it took."""
    step, state, batch = networks.training(work, name, networks.mesh(target))
    start = time.perf_counter()
    memory = step.lower(state, batch).compile().memory_analysis()
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "compile_seconds": time.perf_counter() - start,
    }


def growth(points: Iterable[tuple[int, int]]) -> tuple[float | None, float | None]:
    """(slope of log bytes over log depth by least squares, bytes at 250 over bytes at 100).

    Args:
      points: (depth, bytes); what cannot be had of them is None.
    """
    points = {depth: size for depth, size in points if size > 0}
    slope = None
    if len(points) > 1:
        logs = np.log(list(points)), np.log(list(points.values()))
        slope = float(np.polyfit(*logs, deg=1)[0])
    return slope, points[250] / points[100] if {100, 250} <= points.keys() else None


def by_name(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, int]]]:
    """(depth, bytes) of each implementation, in the order of depth."""
    found = {}
    for row in sorted(rows, key=lambda row: row["depth"]):
        found.setdefault(row["implementation"], []).append((row["depth"], row["temp_bytes"]))
    return found


def text(rows: list[dict[str, Any]], title: str) -> str:
    """The table for people."""
    depths = sorted({row["depth"] for row in rows})
    cells = [("temp MiB", *(f"L = {depth}" for depth in depths), "slope", "250 / 100")]
    for name, points in by_name(rows).items():
        sizes = dict(points)
        fitted = ("-" if value is None else f"{value:.2f}" for value in growth(points))
        cells.append(
            (name, *(f"{sizes[d] / 2**20:,.0f}" if d in sizes else "-" for d in depths), *fitted)
        )
    return f"{title}\n{formats.table(cells, right=len(depths) + 2)}"


def draw(rows: list[dict[str, Any]], title: str, path: str) -> None:
    """Writes a PNG: bytes over depth, both logarithmic, with guides of slope 1 and 2."""
    from densejax.analysis import plots  # matplotlib may be missing

    figure, (axes,) = plots.figure(width=8, height=4.4)
    depths = np.array(sorted({row["depth"] for row in rows}))
    for number, (name, points) in enumerate(by_name(rows).items()):
        x, y = np.array(points).T
        slope = growth(points)[0]
        label = name if slope is None else f"{name} (slope {slope:.2f})"
        axes.plot(x, y / 2**20, label=label, **plots.style(number))
    lowest = min(row["temp_bytes"] for row in rows if row["depth"] == depths[0]) / 2**20
    for slope, dashes in ((1, ":"), (2, "--")):
        guide = 0.8 * lowest * (depths / depths[0]) ** slope
        axes.plot(depths, guide, dashes, color="gray", label=f"guide of slope {slope}")
    plots.logarithmic(axes.xaxis, "{:g}".format)
    plots.logarithmic(axes.yaxis, "{:,.0f}".format)
    axes.set_xticks(depths, depths)
    axes.set(xlabel="depth L", ylabel="temporary memory (MiB)", title=title)
    figure.legend(loc="outside right upper")
    plots.save(figure, path)


def depths(text: str) -> list[int]:
    """Depths that a flag gives with commas between them."""
    return [script.positive(word) for word in text.split(",")]


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows that were asked for, those that are in the file already from there."""
    path = epath.Path(options.output)
    stored = script.read_json(path, [])
    if not (isinstance(stored, list) and all(isinstance(row, dict) for row in stored)):
        raise UserError(f"--output={path}: it is no file that this script wrote")
    common = {"target": options.target, "batch_size": options.batch_size, "dtype": options.dtype}
    common |= {"jax": jax.__version__, "code": workdir.code_digest()}
    rows = []
    for depth in options.depths:
        for name in options.implementations.split(","):
            row = {"implementation": name, "depth": depth} | common
            known = [old for old in stored if row.items() <= old.items()]
            if not known:
                work = Work(MODEL, options.batch_size, 0, options.dtype, {"depth": depth})
                known = [row | compile_one(work, name, options.target)]
                stored += known
                files.write(path, json.dumps(stored, indent=1) + "\n")
                print(f"{name}, L = {depth}: {known[0]['compile_seconds']:.0f} s", file=sys.stderr)
            rows += known
    return rows


def main() -> None:
    """Prints a table of bytes by depth and their growth."""
    parser = script.Parser(__doc__)
    levels = [f":{level}" if level != "none" else "" for level in networks.RECOMPUTE]
    every = [block + level for block in networks.IMPLEMENTATIONS for level in levels]
    parser.add_argument(
        "--output", type=script.path, required=True, help="the JSON file that keeps the numbers"
    )
    parser.add_argument("--target", default="cpu", help="cpu or a name of densejax/targets")
    parser.add_argument(
        "--depths", type=depths, default="40,100,160,250", help="depths of the networks"
    )
    parser.add_argument("--implementations", default=",".join(every), help="default: all")
    parser.add_argument("--batch_size", type=script.positive, default=64, help="images of a step")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="float32", help="the precision"
    )
    parser.add_argument("--plot", type=script.path, help="the PNG to draw; needs matplotlib")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="how to print")
    options = parser.parse_args()
    rows = measure(options)
    title = (
        f"DenseNet-BC, k = 12, batch {options.batch_size}, {options.dtype}, compiled for "
        f"{options.target}, jax {jax.__version__}"
    )
    print(json.dumps(rows, indent=2) if options.format == "json" else text(rows, title))
    if options.plot:
        draw(rows, title, options.plot)


if __name__ == "__main__":
    script.run(main)

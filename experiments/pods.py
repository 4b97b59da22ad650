"""What a training step costs on slices and boxes that are not there, and how it scales over them.

Command: python experiments/pods.py --output=experiments/results/compile
             [--tpu_python=PATH] [--cuda_python=PATH] [--report]
Needs:   the extras `tpu` and `cuda` in the interpreters that are named; a CPU. A cell of the table
         is one process of `python -m densejax.compile`, minutes long (BC-100 on a TPU the longest).

Each cell is kept in a JSON file of its own and not compiled again while the package's code for
models, data, training and topologies is the same; table.md has all that are there. --report leaves
cells of older code as they are, and shows them, too.
Efficiency is t / (t + c) at weak scaling: t is the roofline of the program's bytes and FLOPs on one
device (its main memory alone: a TPU's own counts as free), c what its all-reduces take one after
another, by `densejax.topology.roofline.communication` and the bandwidths and latencies in
densejax/targets; nothing is taken to overlap. Both are the least that it can be: a slower step, or
one that overlaps, scales better.
"""

import json
import math
import pathlib
import subprocess
import sys

import script

from densejax.runs import workdir
from densejax.topology import roofline, targets

IMAGENET = "--config=configs/imagenet.py"
NETWORKS = {  # name: (images of each device, flags)
    "densenet121": (64, (IMAGENET,)),
    "densenet121_replica": (64, (IMAGENET, "--config.parallel.batch_norm=replica")),
    "densenet_bc_100_12": (128, ("--config=configs/cifar10.py",)),
}
PLACES = ("h100:8", "h100:1", "v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v5e:4x4", "v5e:2x2")
CELLS = [(name, place) for name in ("densenet121", "densenet_bc_100_12") for place in PLACES]
CELLS += [("densenet121_replica", place) for place in ("h100:8", "v5e:16x16")]
CELLS.sort(key=lambda cell: not cell[1].startswith("h100"))  # a TPU's take many times as long


COLUMNS = {  # title: (key, unit); all but the global batch are of one device
    "devices": ("devices", 1),
    "global batch": ("global_batch", 1),
    "arguments MB": ("argument_bytes", 1e6),
    "temporaries MB": ("temp_bytes", 1e6),
    "memory MB": ("hbm_bytes", 1e6),
    "GFLOP": ("flops", 1e9),
    "moved GB": ("bytes_accessed", 1e9),
    "parameters MB": ("parameter_bytes", 1e6),
    "all-reduced MB": ("sent", 1e6),
    "all-reduces": ("collectives", 1),
    "roofline ms": ("step_seconds", 1e-3),
    "all-reduces ms": ("communication_seconds", 1e-3),
    "efficiency %": ("efficiency", 1e-2),
}


def code() -> str:
    """Digests of the code that trains and of the code that analyses a compiled step."""
    return f"{workdir.code_digest()} {workdir.code_digest(pathlib.Path(targets.__file__).parent)}"


def compile_cell(name: str, place: str, python: str, path: pathlib.Path) -> None:
    """Writes what densejax.compile says of one cell, unless it fails or today's code wrote it."""
    if (cell := script.read_json(path)) and cell.get("code") == code():
        return
    images, flags = NETWORKS[name]
    batch = images * math.prod(map(int, place.partition(":")[2].split("x")))
    command = [python, "-m", "densejax.compile", *flags, f"--topology={place}", "--format=json"]
    command += [f"--config.{part}.batch_size={batch}" for part in ("train", "evaluate")]
    command += ["--config.train.dtype=bfloat16"]
    print(f"{name} on {place}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        print(f"  failed: {said[-1]}", file=sys.stderr, flush=True)
        return
    facts = json.loads(done.stdout) | {"network": name, "code": code()}
    path.write_text(json.dumps(facts, indent=1) + "\n")


def scaling(cell: dict, place: str) -> dict:
    """What the all-reduces of a compiled step cost, by the links as they are described now."""
    device, _, shape = place.partition(":")
    sent = sum(cell["collective_bytes"].values())
    if "step_seconds" not in cell:
        return {"sent": sent}
    shape, cost = tuple(map(int, shape.split("x"))), (cell["step_seconds"], sent)
    link = targets.target(device), shape
    return {"sent": sent} | roofline.weak_scaling(*link, *cost, cell["collectives"])


def report(folder: pathlib.Path) -> str:
    """The table of all cells that are there, in markdown."""
    lines = [["network", "topology", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    for name, place in sorted(CELLS, key=lambda cell: [*NETWORKS].index(cell[0])):
        if cell := script.read_json(folder / f"{name}-{place.replace(':', '-')}.json"):
            cell = {"collective_bytes": {}} | cell
            cell |= scaling(cell, place)
            void = " (FLOPs void)" if cell.get("program_flops_are_void") else ""
            fits = "" if cell["fits"] else " DOES NOT FIT"
            figures = [(cell.get(key, math.nan), unit) for key, unit in COLUMNS.values()]
            figures = [number / unit for number, unit in figures]
            figures = [f"{n:,.0f}" if n >= 1000 else f"{n:.4g}" for n in figures]
            lines.append([name + void + fits, place, *figures])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Compiles what is missing, writes table.md and prints it."""
    parser = script.Parser(__doc__)
    parser.add_argument("--output", type=script.path, required=True, help="folder of the results")
    parser.add_argument(
        "--tpu_python", default=sys.executable, help="interpreter with JAX for TPUs"
    )
    parser.add_argument(
        "--cuda_python", default=sys.executable, help="interpreter with JAX for CUDA"
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="compile nothing; write the tables of what was compiled before",
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, place in [] if options.report else CELLS:
        python = options.cuda_python if place.startswith("h100") else options.tpu_python
        path = options.output / f"{name}-{place.replace(':', '-')}.json"
        compile_cell(name, place, python, path)
    text = report(options.output)
    (options.output / "table.md").write_text(f"{__doc__}\n{text}")
    print(text)


if __name__ == "__main__":
    script.run(main)

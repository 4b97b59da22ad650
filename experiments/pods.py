"""What a training step costs on slices and boxes that are not there, and how it scales over them.

Command: python experiments/pods.py --output=experiments/results/compile
             [--tpu_python=PATH] [--cuda_python=PATH] [--report]
Needs:   the extras `tpu` and `cuda` in the interpreters that are named; a CPU. A cell of the table
         is one process of `python -m densejax.compile`, minutes long (BC-100 on a TPU the longest).

Each cell is kept in a JSON file of its own and not compiled again; table.md has all that are there.
Efficiency is t / (t + c) at weak scaling: t is the roofline of the program's bytes and FLOPs on one
device, c what its all-reduces take one after another, by `densejax.analysis.roofline.communication`
and the bandwidths and latencies in densejax/targets; nothing is taken to overlap.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys

from densejax import formats

TOPOLOGIES = ("h100:1", "h100:8", "v5e:16x16", "v5e:2x2", "v5p:4x4x4", "v6e:16x16", "v5e:4x4")
NETWORKS = {  # name: (images of each device, flags)
    "densenet121": (64, ("--config=configs/imagenet.py",)),
    "densenet121_replica": (
        64,
        ("--config=configs/imagenet.py", "--config.parallel.batch_norm=replica"),
    ),
    "densenet_bc_100_12": (128, ("--config=configs/cifar10.py",)),
}
# Quick ones first; BatchNorm of each device alone where the difference is largest.
CELLS = [(name, place) for place in TOPOLOGIES[:2] for name in NETWORKS]
CELLS += [(name, place) for name in list(NETWORKS)[::2] for place in TOPOLOGIES[2:]]
CELLS += [("densenet121_replica", "v5e:16x16")]


def compile_cell(name: str, place: str, python: str, path: pathlib.Path) -> None:
    """Writes what densejax.compile says of one cell, unless it is there already or fails."""
    if path.exists():
        return
    images, flags = NETWORKS[name]
    batch = images * math.prod(map(int, place.partition(":")[2].split("x")))
    command = [python, "-m", "densejax.compile", *flags, f"--topology={place}", "--format=json"]
    command += [f"--config.{part}.batch_size={batch}" for part in ("train", "evaluate")]
    command += ["--config.train.dtype=bfloat16"]
    print(f"{name} on {place}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
        return
    path.write_text(json.dumps(json.loads(done.stdout) | {"network": name}, indent=1) + "\n")


def report(folder: pathlib.Path) -> str:
    """The table of all cells that are there, in markdown."""
    titles = "network, topology, devices, global batch, arguments MB, temporaries MB, memory MB, "
    titles += "GFLOP, GB moved, all-reduce MB, parameters MB, all-reduces, roofline ms, limit, "
    titles += "all-reduces ms, efficiency"
    lines = [titles.split(", "), ["---"] * len(titles.split(", "))]
    for name in NETWORKS:
        for place in sorted({place for _, place in CELLS}):
            path = folder / f"{name}-{place.replace(':', '-')}.json"
            if not path.exists():
                continue
            cell = json.loads(path.read_text())
            sizes = [cell[key] for key in ("argument_bytes", "temp_bytes", "hbm_bytes")]
            sent = sum(cell["collective_bytes"].values())
            flops = f"{cell['flops'] / 1e9:,.0f}" + " (void)" * cell["program_flops_are_void"]
            line = [name, place, str(cell["devices"]), f"{cell['global_batch']:,}"]
            line += [f"{size / 1e6:,.0f}" for size in sizes]
            line += [flops, f"{cell['bytes_accessed'] / 1e9:.1f}", f"{sent / 1e6:.2f}"]
            line += [f"{cell['parameter_bytes'] / 1e6:.2f}", str(cell["collectives"])]
            line += [f"{1e3 * cell['step_seconds']:.2f}", cell["step_limit"]]
            line += [f"{1e3 * cell['communication_seconds']:.2f}"]
            lines.append([*line, formats.percent(cell["efficiency"])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Compiles what is missing, writes table.md and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--tpu_python", default=sys.executable)
    parser.add_argument("--cuda_python", default=sys.executable)
    parser.add_argument("--report", action="store_true", help="compile nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, place in [] if options.report else CELLS:
        python = options.cuda_python if place.startswith("h100") else options.tpu_python
        path = options.output / f"{name}-{place.replace(':', '-')}.json"
        compile_cell(name, place, python, path)
    (options.output / "table.md").write_text(text := report(options.output))
    print(text)


if __name__ == "__main__":
    main()

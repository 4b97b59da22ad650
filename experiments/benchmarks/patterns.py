"""Each connection pattern beside dense: python experiments/benchmarks/patterns.py --output=FILE.

Counts, and the training step on the devices of this machine, of one network with each pattern. All
programs are compiled first and take a step in turn then, round by round, so that a slow minute of
the machine touches all alike. Patterns that add are ResNets with pre-activation of as many blocks.
"""

import json
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import jax
import jax_child
from networks import Work

from densejax import models
from densejax.models import counts
from densejax.models.connections import ADDING, CONCATENATING
from densejax.runs import files, formats, workdir
from densejax.training import parallel
from experiments import script

# (DenseNet, its fields, batch size) and (ResNet, its fields) of each form.
FORMS = {
    "cifar": (
        ("densenet_40_12", {}),
        ("preact_resnet164", {"blocks": (6, 6, 6), "block": "basic", "stride_on": "3x3"}),
    ),
    "imagenet": (
        ("densenet121", {}),
        ("resnet50", {"preactivation": True}),
    ),
}
BATCH_SIZES = {"cifar": 64, "imagenet": 8}


def of_form(form: str) -> list[tuple[str, str, dict]]:
    """(label, implementation, model and fields) of every row, the dense one first."""
    (dense, dense_fields), (residual, residual_fields) = FORMS[form]
    rows = []
    for connect in CONCATENATING:
        for block in ("in_place", "concat"):
            rows.append((connect, block, (dense, dense_fields | {"connect": connect})))
    for connect in ADDING:
        fields = residual_fields | {"connect": connect}
        rows.append((f"sum, {connect}", "densejax", (residual, fields)))
    return rows


def measure(form: str, rounds: int) -> list[dict]:
    """The rows of the table, each with the seconds of its steps."""
    rows, steps = [], []
    for label, block, (model, fields) in of_form(form):
        work = Work(model, BATCH_SIZES[form], 0, "float32", fields)
        network = models.create(models.fields(model, **fields), work.num_classes)
        parameters, multiply_adds = counts.of_network(network, work.image_shape)
        with tempfile.TemporaryDirectory() as folder:
            jax_child.draw(work, pathlib.Path(folder))
            facts, take_step = jax_child.training(work, pathlib.Path(folder), block)
        found = counts.connections(network.graphs().values())
        rows.append(
            {"pattern": label, "block": block, "parameters": parameters}
            | {"multiply_adds": multiply_adds, "edges": found.edges, "path": found.longest_path}
            | {"temp_bytes": facts["temp_bytes"], "compile_seconds": facts["compile_seconds"]}
            | {"seconds": []}
        )
        steps.append(take_step)
        print(f"{label}, {block}: {facts['compile_seconds']:.0f} s to compile", file=sys.stderr)
    for _ in range(rounds):
        for row, take_step in zip(rows, steps, strict=True):
            start = time.perf_counter()
            take_step()()  # the first call begins the step, the second waits for its end
            row["seconds"].append(time.perf_counter() - start)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text; time and memory are relative to the dense network in place."""
    header = ("pattern", "block", "parameters", "multiply-adds", "edges", "longest path")
    lines = [(*header, "step / dense", "memory / dense", "step, ms")]
    first = statistics.median(rows[0]["seconds"])
    for row in rows:
        middle = statistics.median(row["seconds"])
        spread = f"{1e3 * min(row['seconds']):.0f}-{1e3 * max(row['seconds']):.0f}"
        lines.append(
            (
                *(row["pattern"], row["block"], formats.count(row["parameters"])),
                *(formats.count(row["multiply_adds"]), str(row["edges"]), str(row["path"])),
                *(f"{middle / first:.2f}", f"{row['temp_bytes'] / rows[0]['temp_bytes']:.2f}"),
                f"{1e3 * middle:.0f} ({spread})",
            )
        )
    return formats.table(lines, right=7)


def main() -> None:
    """Prints a table and writes what it is made from."""
    parser = script.Parser(__doc__)
    parser.add_argument("--output", type=script.path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--form", choices=FORMS, default="cifar", help="network and size of the images"
    )
    parser.add_argument(
        "--rounds", type=script.positive, default=7, help="steps of each pattern that are timed"
    )
    options = parser.parse_args()
    parallel.start()
    rows = measure(options.form, options.rounds)
    facts = {
        "device": f"{jax.devices()[0].device_kind}, {processor()}",
        "batch_size": BATCH_SIZES[options.form],
        "rounds": options.rounds,
        "versions": workdir.versions(),
    }
    files.write(options.output, json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    print(
        f"{options.form}, batch of {facts['batch_size']}, {facts['device']}, medians of "
        f"{options.rounds} (smallest-largest)\n{table(rows)}"
    )


def processor() -> str:
    """The name of this machine's processor."""
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    script.run(main)

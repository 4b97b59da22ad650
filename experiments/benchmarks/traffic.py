"""What a compiler makes of a training step: FLOPs, bytes moved, memory and kernels; nothing runs.

Command: python experiments/benchmarks/traffic.py --target=v5e [--model=densenet_bc_100_12]
             [--implementations=in_place,in_place:layer,concat,flax] [--batch_size=128]
             [--dtype=bfloat16] [--format=json]

The target is a device of densejax/targets, which need not be there: a TPU's compiler is in libtpu
(minutes for each step), an NVIDIA GPU's in jax[cuda13]; or `cpu`. Beside the figures stands the
floor of densejax.topology.roofline. A row whose FLOPs are not within 10 % of six per multiply-add
and image, plus what its recompute level says and less what transitions that pool first leave out,
is void.
"""

import json
import sys
import time
from typing import Any

import jax
import networks
from networks import Work

from densejax.models import counts
from densejax.runs import formats
from densejax.topology import hlo, roofline, targets
from experiments import script

LIMIT = 0.1  # share by which FLOPs may differ from what they should be


def analyse(work: Work, name: str, target: str) -> dict[str, Any]:
    """The row of one implementation, compiled for a target (raises UserError)."""
    mesh = networks.mesh(target)
    make = networks.plain_training if name == "flax" else networks.training
    step, state, batch = make(work, *([] if name == "flax" else [name]), mesh)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    found, memory = hlo.read(compiled.as_text()), compiled.memory_analysis()
    multiply_adds = counts.of_network(work.network(), work.image_shape)[1]
    again = left_out = 0
    if name != "flax":
        again = counts.recomputed(work.network(name), work.image_shape)
        left_out = counts.pooled_first(work.network(name), work.image_shape, True)
    expected = work.batch_size * (6 * (multiply_adds - left_out) + 2 * again)
    row = {
        "implementation": name,
        "target": target,
        "model": work.model,
        "batch_size": work.batch_size,
        "dtype": work.dtype,
        "jax": jax.__version__,
        "flops": found["flops"],
        "expected_flops": expected,
        "is_void": not abs(found["flops"] / expected - 1) < LIMIT,
        "bytes": found["bytes"],
        "on_chip_bytes": found["on_chip_bytes"],
        "compiler_bytes": (compiled.cost_analysis() or {}).get("bytes accessed"),
        "temp_bytes": memory.temp_size_in_bytes,
        **{key: found[key] for key in ("kernels", "convolutions", "custom_calls")},
        "unknown_loops": found["unknown_loops"],
        "compile_seconds": seconds,
    }
    if target != "cpu":
        device, floor = targets.target(target), floor_of(work)
        row["seconds_for_bytes"] = found["bytes"] / device.memory_bytes_per_second
        row["floor_bytes"] = floor.bytes
        row["floor_seconds"], row["floor_limit"] = floor.bound(device)
    return row


def floor_of(work: Work) -> roofline.Cost:
    """What the step cannot do without."""
    return roofline.training(work.network(), work.image_shape, work.batch_size, work.dtype)


def text(rows: list[dict[str, Any]], work: Work) -> str:
    """The table for people."""

    def gibibytes(number):
        return "-" if number is None else f"{number / 2**30:.3g}"

    cells = [("", "GFLOP", "expected", "moved GiB", "on chip GiB", "compiler's GiB", "temp MiB",
              "ms for bytes", "kernels", "convolutions", "custom calls")]  # fmt: skip
    for row in rows:
        milliseconds = row.get("seconds_for_bytes")
        cells.append(
            (
                row["implementation"] + (" VOID" if row["is_void"] else ""),
                f"{row['flops'] / 1e9:.4g}",
                f"{row['expected_flops'] / 1e9:.4g}",
                *(gibibytes(row[key]) for key in ("bytes", "on_chip_bytes", "compiler_bytes")),
                f"{row['temp_bytes'] / 2**20:,.0f}",
                f"{1e3 * milliseconds:.3g}" if milliseconds is not None else "-",
                *(str(row[key]) for key in ("kernels", "convolutions", "custom_calls")),
            )
        )
    floor = floor_of(work)
    limit = ""
    if "floor_seconds" in rows[0]:
        limit = f"{1e3 * rows[0]['floor_seconds']:.3g} ms, by {rows[0]['floor_limit']}"
    known = ("floor", f"{floor.flops / 1e9:.4g}", "", gibibytes(floor.bytes))
    cells.append((*known, *[""] * 3, limit, *[""] * 3))
    title = (
        f"{work.model}, batch {work.batch_size}, {work.dtype}, compiled for {rows[0]['target']}, "
        f"jax {jax.__version__}"
    )
    return f"{title}\n{formats.table(cells, right=10)}"


def main() -> None:
    """Prints a row for each implementation."""
    parser = script.Parser(__doc__)
    parser.add_argument("--target", default="v5e", help="cpu or a name of densejax/targets")
    parser.add_argument("--model", default="densenet_bc_100_12", help="the network's name")
    parser.add_argument(
        "--implementations", default="in_place,concat,flax", help="default: %(default)s"
    )
    parser.add_argument("--batch_size", type=script.positive, default=128, help="images of a step")
    parser.add_argument("--image_size", type=int, default=0, help="0: as the network's paper")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="the precision"
    )
    parser.add_argument(
        "--fields",
        type=script.fields,
        default={},
        help='fields of the network, such as {"depth": 40}',
    )
    parser.add_argument("--format", choices=["text", "json"], default="text", help="how to print")
    options = parser.parse_args()
    rows = []
    work = Work(
        options.model, options.batch_size, options.image_size, options.dtype, options.fields
    )
    for name in options.implementations.split(","):
        rows.append(analyse(work, name, options.target))
        print(f"{name}: compiled in {rows[-1]['compile_seconds']:.0f} s", file=sys.stderr)
    print(json.dumps(rows, indent=2) if options.format == "json" else text(rows, work))


if __name__ == "__main__":
    script.run(main)

"""Times implementations of one network side by side, each in a process of its own."""

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import networks
import numpy as np
from networks import Work
from turns import Process, Unavailable, alternate

from densejax import models
from densejax.config import UserError
from densejax.models.convolution import cores
from densejax.runs import formats
from experiments import script

HERE = pathlib.Path(__file__).parent
LAYOUTS = ("nchw", "channels_last")
PEERS = (
    "torchvision",
    "torch_compile",
    "torch_graphs",
    "keras",
)  # skipped, aloud, where they cannot be measured
LIMIT = 1e-3  # by which implementations may differ, as a share of the largest value


def expand(text: str, work: Work, recompute: str = "none") -> list[str]:
    """Names of the processes that a list of implementations stands for.

    Blocks get the recompute level; PyTorch's get one process for each memory layout.

    Raises:
      UserError: an unknown name, or one twice.
    """
    names = []
    for name in text.split(","):
        first, _, rest = name.partition(":")
        if first in PEERS[:3] and rest in ("", *LAYOUTS):
            names += [f"{first}:{layout}" for layout in ([rest] if rest else LAYOUTS)]
        elif name in ("flax", "keras", "densejax"):
            names.append(name)
        elif first in (*networks.IMPLEMENTATIONS, "densejax"):
            full = name if rest or recompute == "none" else f"{name}:{recompute}"
            networks.changes(full, work.model)
            names.append(full)
        else:
            allowed = ", ".join(("densejax", *networks.IMPLEMENTATIONS, "flax", *PEERS))
            raise UserError(f"--implementations: {name!r} is unknown; allowed are {allowed}")
    if len(set(names)) < len(names):
        raise UserError(f"--implementations={text}: names one twice")
    return names


def specification(work: Work, mode: str, directory: str) -> dict[str, Any]:
    """What a process is told; the peers' know nothing of densejax."""
    fields = models.fields(work.model, **work.fields)
    network = models.create(fields, work.num_classes)
    spec = {"mode": mode, "directory": directory, "work": dataclasses.asdict(work)}
    spec |= {"num_classes": work.num_classes, "fields": fields.to_dict()}
    if fields.family == "densenet":
        spec |= {"widths": network.widths(), "depths": network.block_depths()}
    return spec | {"optimizer": networks.recipe().to_dict()}


def start(
    names: Sequence[str], spec: Mapping[str, Any], torch_python: str, at_once: int = 1
) -> dict[str, Process]:
    """One process after the other, or so many at once, build and compile; then they wait.

    Raises:
      Unavailable: ours or the plain flax network cannot be measured.
    """
    commands = {True: [torch_python, HERE / "torch_child.py"]}
    commands[False] = [sys.executable, HERE / "jax_child.py"]
    Process(commands[False], {**spec, "implementation": "draw"}).close()

    def child(name):
        peer = name.partition(":")[0]
        try:
            is_torch = peer in PEERS[:3]
            return Process(commands[is_torch], {**spec, "implementation": name})
        except Unavailable as error:
            if peer not in PEERS:
                raise
            print(f"{name}: skipped: {error}", file=sys.stderr)
            return None

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        children = dict(zip(names, pool.map(child, names), strict=True))
    return {name: child for name, child in children.items() if child}


def row(name: str, facts: Mapping, answers: Sequence[Mapping], batch_size: int) -> dict[str, Any]:
    """One implementation's figures, from what its process said."""
    tries = [answer["seconds_per_step"] for answer in answers]
    idle = answers[1:]  # before its first turn a process has only built
    waited = sum(answer["idle_seconds"] for answer in idle)
    median = statistics.median(tries)
    return {
        "implementation": name,
        "seconds_per_step": median,
        "images_per_second": batch_size / median,
        "temp_bytes": None,
        "peak_rss_bytes": answers[-1]["peak_rss_bytes"],
        "compile_seconds": None,
        "cores": cores(),
        **facts,
        "idle_cores": sum(a["idle_processor_seconds"] for a in idle) / waited if waited else None,
        "tries": tries,
    }


def best_layouts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of PyTorch's rows the faster layout's, with both layouts' seconds in it."""
    result = {}
    for found in rows:
        name, _, layout = found["implementation"].partition(":")
        if layout not in LAYOUTS:
            result[found["implementation"]] = found
            continue
        before = result.get(name, {"seconds_per_step": float("inf")})
        both = before.get("layouts", {}) | {layout: found["seconds_per_step"]}
        if found["seconds_per_step"] < before["seconds_per_step"]:
            before = {**found, "implementation": name, "layout": layout}
        result[name] = before | {"layouts": both}
    return list(result.values())


class Different(Exception):
    """Implementations that do not compute the same."""


def check(values: Mapping[str, Mapping[str, Sequence[float]]], limit: float = LIMIT) -> None:
    """Prints how far each implementation's quantities are from the first one's.

    Args:
      values: of each implementation its logits, or its first loss and the norms of its gradient.
      limit: share of the largest value by which they may differ.

    Raises:
      Different: by more than that.
    """
    (first, expected), *_ = values.items()
    wrong = {}
    for name, found in values.items():
        for quantity, numbers in expected.items():
            error = np.inf  # of networks that do not have as many arrays
            if len(found[quantity]) == len(numbers):
                error = np.abs(np.subtract(found[quantity], numbers)).max() / np.abs(numbers).max()
            if not error < limit:
                wrong[name] = quantity
            print(f"{name}: {quantity} {error:.1e} from {first}'s", file=sys.stderr)
    if wrong:
        names = ", ".join(f"{name} ({quantity})" for name, quantity in wrong.items())
        raise Different(f"{names}: more than {limit} from {first}; nothing is timed")


def text(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The table for people."""
    seconds = {found["implementation"]: found["seconds_per_step"] for found in rows}
    torch = min((seconds[name] for name in PEERS[:3] if name in seconds), default=None)

    def ratio(found, other):
        return f"{found['seconds_per_step'] / other:.2f}" if other else "-"

    def mebibytes(number):
        return "-" if number is None else f"{number / 2**20:,.0f}"

    cells = [("", "s/step", "spread", "/ torch", "/ flax", "images/s", "XLA temp MiB",
              "peak RSS MiB", "compile s")]  # fmt: skip
    for found in rows:
        layout = f" ({found['layout']})" if "layout" in found else ""
        compiling = found["compile_seconds"]
        cells.append(
            (
                found["implementation"] + layout,
                f"{found['seconds_per_step']:.3g}",
                f"{min(found['tries']):.3g} to {max(found['tries']):.3g}",
                ratio(found, torch),
                ratio(found, seconds.get("flax")),
                f"{found['images_per_second']:.1f}",
                mebibytes(found["temp_bytes"]),
                mebibytes(found["peak_rss_bytes"]),
                "-" if compiling is None else f"{compiling:.1f}",
            )
        )
    versions = {}
    for found in rows:
        versions |= found["versions"]
    devices = sorted({found["device"] for found in rows})
    facts = [f"{'; '.join(devices)}; {cores()} cores"]
    facts += [f"{name} {version}" for name, version in versions.items()]
    return f"{title}\n{', '.join(facts)}\n{formats.table(cells, right=8)}"


def measure(options: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    """The rows of all implementations that can be measured; says so of those that cannot."""
    work = Work(options.model, options.batch_size, options.image_size, fields=options.fields)
    is_dense = models.fields(work.model).family == "densenet"
    wanted = options.implementations or options.defaults[is_dense]
    names = expand(wanted, work, options.recompute)
    with tempfile.TemporaryDirectory() as directory:
        children = start(names, specification(work, mode, directory), options.torch_python)
        check({name: child.facts["check"] for name, child in children.items()})
        answers = alternate(children, options.tries, options.steps)
        for child in children.values():
            child.close()
    rows = [
        row(name, child.facts, answers[name], work.batch_size) for name, child in children.items()
    ]
    for found in rows:
        if (found["idle_cores"] or 0) > 0.2:
            print(f"{found['implementation']}: used {found['idle_cores']:.2f} cores while it "
                  f"waited: the others' times are too long", file=sys.stderr)  # fmt: skip
    return rows


def main(mode: str, document: str, implementations: Mapping[bool, str]) -> int:
    """The command of train_step.py ("train") and inference.py ("inference").

    Args:
      mode: what is timed.
      document: the command's docstring.
      implementations: the default list, for DenseNets (True) and for other networks.

    Returns:
      Exit code: 1 where implementations differ in what they compute.
    """
    parser = script.Parser(document)
    parser.add_argument("--model", default="densenet_bc_100_12", help="the network's name")
    parser.add_argument("--batch_size", type=script.positive, default=64, help="images of a step")
    parser.add_argument("--image_size", type=int, default=0, help="0: as the network's paper")
    parser.add_argument("--implementations", help=f"default: {implementations[True]}")
    parser.add_argument("--recompute", default="none", help="model.recompute of the dense blocks")
    parser.add_argument(
        "--fields",
        type=script.fields,
        default={},
        help='fields of the network, such as {"depth": 40}',
    )
    parser.add_argument(
        "--tries", type=script.positive, default=5, help="rounds, in which all take a turn"
    )
    parser.add_argument("--steps", type=script.positive, default=3, help="timed steps of a turn")
    parser.add_argument(
        "--torch_python", default=sys.executable, help="the interpreter that has PyTorch"
    )
    parser.add_argument("--format", choices=["text", "json"], default="text", help="how to print")
    parser.set_defaults(defaults=implementations)
    options = parser.parse_args()
    if not shutil.which(options.torch_python):
        raise UserError(f"--torch_python={options.torch_python}: there is no such program")
    try:
        rows = measure(options, mode)
    except (Unavailable, Different) as error:
        print(f"densejax: {error}", file=sys.stderr)
        return 1
    rows = best_layouts(rows)
    if options.format == "json":
        print(json.dumps(rows, indent=2))
    else:
        title = (
            f"{options.model}, batch {options.batch_size}, {mode}, medians of {options.tries} turns"
        )
        print(text(rows, f"{title} of {options.steps} steps, after one that is not timed"))
    return 0

"""A configuration's steps, compiled for devices that need not be there, and what they take.

The steps are those that training maps (the same functions, shardings and donation), compiled by the
topology's own compiler. No data is read. All figures are of one device; a set that is kept in
memory lies there, too.
"""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from densejax.config import UserError
from densejax.models import counts
from densejax.runs import formats
from densejax.topology import hlo, roofline, targets
from densejax.training import experiment
from densejax.training.experiment import Experiment
from densejax.training.step import eval_step, train_step

TOLERANCE = 0.1  # share by which a program's FLOPs may differ from its network's


def compile_step(built: Experiment, trains: bool, batch_size: int) -> Any:
    """The compiled step for a batch of so many images over all devices; None: it does not fit."""
    shape, config = built.task.image_shape, built.config
    if not trains and config.data.storage == "stream" and config.evaluate.crop_size:
        shape = (config.evaluate.resize_size, config.evaluate.resize_size, shape[-1])
    batch = experiment.abstract_batch(built.mesh, shape, batch_size)
    if not trains:
        batch["mask"] = batch["label"].update(dtype=jnp.bool_)
    step = built.map(train_step, donate=True) if trains else built.map(eval_step)
    try:
        return step.lower(built.abstract_state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def multiply_adds(built: Experiment, trains: bool) -> int:
    """What an implementation needs for one image: forward, and backward with what is recomputed."""
    model, preparation, shape = built.task.model, built.task.preparation, built.task.image_shape
    crop = 0 if trains else preparation.crop_size
    if size := crop or preparation.image_size:
        shape = (size, size, shape[-1])
    once = counts.of_network(model, shape)[1] - counts.pooled_first(model, shape, trains)
    return 3 * once + counts.recomputed(model, shape) if trains else once * (10 if crop else 1)


def total_bytes(program: Any) -> float:
    """What a compiled step takes, results included; of none, which does not fit, infinite.

    An evaluation reads no momentum: a run keeps it beside, and batches that are read ahead, too.
    """
    if program is None:
        return math.inf
    memory = program.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    return used + memory.generated_code_size_in_bytes


def analyse(
    built: Experiment, trains: bool, target: targets.Target | None, shape: tuple[int, ...]
) -> dict[str, Any]:
    """All figures of a step; of one that does not fit, that alone."""
    start, size = time.monotonic(), (built.config.train if trains else built.config.evaluate)
    size = size.batch_size
    program = compile_step(built, trains, size)
    used, images = total_bytes(program), size // built.mesh.size
    row = {"global_batch": size, "images": images, "compile_seconds": time.monotonic() - start}
    row["fits"] = used < math.inf and (target is None or used <= target.memory_bytes)
    if program is None:
        return row
    found, memory = hlo.read(program.as_text()), program.memory_analysis()
    expected = 2 * images * multiply_adds(built, trains)
    is_void = not abs(found["flops"] / expected - 1) < TOLERANCE
    work = roofline.Work(found["bytes"], expected if is_void else found["flops"])
    row |= {
        "hbm_bytes": used,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": work.flops,
        "network_flops": expected,
        "program_flops": found["flops"],
        "program_flops_are_void": is_void,
        "bytes_accessed": work.bytes,
        "on_chip_bytes": found["on_chip_bytes"],
        "collective_bytes": {kind: found[kind] for kind in hlo.COLLECTIVES if found[kind]},
        **{name: found[name] for name in ("collectives", "convolutions", "unknown_loops")},
    }
    if target and not found["unknown_loops"]:  # whose turns count once: no time follows from it
        row["step_seconds"], row["step_limit"] = work.bound(target)
        if built.config.parallel.batch_norm != "groups":  # priced as if over the whole slice
            sent = sum(row["collective_bytes"].values())
            cost = row["step_seconds"], sent, found["collectives"]
            row |= roofline.weak_scaling(target, shape, *cost)
    return row


def largest_batch(built: Experiment, room: float, images: int, used: float) -> tuple[int, bool]:
    """(images of a device that fit by a line through two sizes, whether that compiles and fits).

    Args:
      built: for the devices that compile.
      room: bytes of a device.
      images: of a device in the step that is known.
      used: bytes that it takes; infinite where it does not fit, and less must do.
    """

    def memory(images):
        return total_bytes(compile_step(built, True, images * built.mesh.size))

    # Multiples of what the known size is one of: 128 images lie in a TPU's lanes, 127 do not.
    unit = math.lcm(built.config.train.accumulate_steps, math.gcd(images, 128))
    points = {images: used} if used < math.inf else {}
    while len(points) < 2:
        images = images // 2 // unit * unit or 2 * max(points, default=0)
        if not images or (size := memory(images)) == math.inf and points:
            return max(points, default=0), bool(points)
        points |= {images: size} if size < math.inf else {}
    less, more = sorted(points)
    slope = (points[more] - points[less]) / (more - less)
    if slope <= 0:  # so small that padding hides the images
        return more, points[more] <= room
    largest = int(less + (room - points[less]) / slope) // unit * unit
    if largest not in points:
        points[largest] = memory(largest) if largest > 0 else math.inf
    return largest, points[largest] <= room


def report(config: ConfigDict, topology: str, largest: bool = False) -> dict[str, Any]:
    """All figures of a configuration's training and evaluation steps on a topology's devices.

    Args:
      config: the whole configuration.
      topology: as `targets.topology` reads it.
      largest: whether to look for the largest batch, by two more compilations.

    Raises:
      UserError: the configuration, or a topology that is not known or cannot be compiled for.
    """
    experiment.build(config)  # a mistake is said before a compiler starts
    if config.parallel.mode != "shard_map":
        raise UserError("parallel.mode = 'pmap': only 'shard_map' can be compiled ahead; set it")
    target, devices, shape = targets.topology(topology)
    if largest and not target:
        raise UserError("--largest_batch: no memory is known of a cpu; name another topology")
    built = experiment.build(config, devices)
    row, state = analyse(built, True, target, shape), built.abstract_state
    size = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for name, tree in (("parameter", state.params), ("statistics", state.batch_stats))
    }
    result = {
        "config": config.name,
        "topology": topology,
        "device": target.device if target else "cpu",
        "devices": len(devices),
        "memory_bytes": target.memory_bytes if target else None,
        "dtype": config.train.dtype,
        "jax": jax.__version__,
        **{f"{name}_bytes": number for name, number in size.items()},
        **row,
    }
    if largest:
        used = row.get("hbm_bytes", math.inf)
        found = largest_batch(built, target.memory_bytes, row["images"], used)
        result["largest_batch"], result["largest_batch_fits"] = found
    result["evaluation"] = analyse(built, False, target, shape)
    return result


def table(result: dict[str, Any]) -> str:
    """The figures for people."""

    def size(number):
        return f"{formats.si(number)}B"

    def cells(step):
        yield formats.count(step["images"]) + ("" if step["fits"] else " DO NOT FIT")
        if "flops" not in step:
            return
        yield from (size(step[key]) for key in ("argument_bytes", "temp_bytes", "hbm_bytes"))
        void = " (the program's are VOID)" if step["program_flops_are_void"] else ""
        yield formats.si(step["flops"]) + void
        yield size(step["bytes_accessed"]) + (" at least" if step["unknown_loops"] else "")
        sent = (f"{kind} {size(number)}" for kind, number in step["collective_bytes"].items())
        yield f"{step['collectives']:,}: {', '.join(sent) or '-'}"
        if "step_seconds" in step:
            yield f"{1e3 * step['step_seconds']:.3g} ms by {step['step_limit']}"
        if "efficiency" in step:
            yield f"{1e3 * step['communication_seconds']:.3g} ms"
            yield formats.percent(step["efficiency"])

    names = ["images", "arguments", "temporaries", "memory in all", "FLOPs", "bytes moved"]
    names += ["collectives", "roofline", "collectives take", "t / (t + collectives)"]
    steps = [[*cells(step)] for step in (result, result["evaluation"])]
    longest = max(map(len, steps))
    columns = [names[:longest], *(step + ["-"] * (longest - len(step)) for step in steps)]
    rows = [("of each device", "train", "evaluate"), *zip(*columns, strict=True)]
    room = f" of {size(result['memory_bytes'])}" if result["memory_bytes"] else ""
    lines = [
        f"{result['config']}, {result['dtype']}, {result['topology']}: {result['devices']:,} x "
        f"{result['device']}{room}, jax {result['jax']}",
        f"global batch {result['global_batch']:,}; parameters {size(result['parameter_bytes'])}, "
        f"BatchNorm's statistics {size(result['statistics_bytes'])}",
        formats.table(rows, right=2),
    ]
    if "largest_batch" in result:
        fits = "compiled, and fits" if result["largest_batch_fits"] else "does not fit"
        lines.append(f"largest batch by a line: {result['largest_batch']:,} images: {fits}")
    return "\n".join(lines)

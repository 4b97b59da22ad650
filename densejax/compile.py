"""What a run's steps take on devices that need not be there: python -m densejax.compile.

The steps are those that training maps (the same functions, shardings and donation), compiled for a
topology by its own compiler. No data is read. All figures are of one device.
"""

import contextlib
import json
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from densejax import command_line, data, experiment, formats, hlo
from densejax.analysis import counts, roofline
from densejax.config import UserError
from densejax.experiment import Experiment
from densejax.step import eval_step, train_step

TOPOLOGY = flags.DEFINE_string("topology", None, "Such as cpu:8, h100:8 or v5e:16x16.")
LARGEST = flags.DEFINE_bool("largest_batch", False, "Find it, by two more compilations.")
FORMAT = flags.DEFINE_enum(
    "format", "table", ["table", "json"], "How to print.", allow_override=True
)
TOLERANCE = 0.1  # share by which a program's FLOPs may differ from its network's


def topology(text: str) -> tuple[roofline.Target | None, list[jax.Device], tuple[int, ...]]:
    """(target, devices, their shape) of "v5e:16x16"; a CPU is no target: nobody describes it.

    Raises:
      UserError: no such topology, or its compiler is not installed.
    """
    name, _, shape = (text or "").partition(":")
    targets, numbers = roofline.targets(), r"[1-9]\d*(x[1-9]\d*)*"
    if not re.fullmatch(r"[1-9]\d*" if name == "cpu" else numbers, shape) or (
        name != "cpu" and name not in targets
    ):
        known = ", ".join(f"{key}:{target.smallest}" for key, target in targets.items())
        raise UserError(f"--topology={text}: give a device and its number, cpu:8, {known} or more")
    sides = tuple(map(int, shape.split("x")))
    if name != "cpu":
        return targets[name], targets[name].devices(shape), sides
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started: with the devices that it has
        jax.config.update("jax_num_cpu_devices", sides[0])
    if (count := len(jax.devices())) < sides[0]:
        raise UserError(f"--topology={text}: JAX has started with {count} devices")
    return None, jax.devices()[: sides[0]], sides


def lower_and_compile(built: Experiment, trains: bool, batch_size: int) -> Any:
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
    """FLOPs of one image from the network alone, half of them: forward, backward, recomputed."""
    model, preparation, shape = built.task.model, built.task.preparation, built.task.image_shape
    crop = 0 if trains else preparation.crop_size
    if size := crop or preparation.image_size:
        shape = (size, size, shape[-1])
    once = counts.of_network(model, shape)[1]
    return 3 * once + counts.recomputed(model, shape) if trains else once * (10 if crop else 1)


def resident(config: ConfigDict) -> int:
    """Bytes of the sets that lie on every device beside its step."""
    if config.data.storage != "memory":
        return 0
    info = data.info(config)
    names = {*config.data.train_split.split("+"), "test"}
    return sum(info.splits[name] for name in names) * (math.prod(info.image_shape) + 4)


def size_of(tree: Any) -> int:
    """Bytes of the arrays of an abstract tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def total_bytes(built: Experiment, program: Any) -> int | None:
    """All that a device holds while a compiled step runs; None of a program that does not fit."""
    if program is None:
        return None
    memory = program.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    return used + memory.generated_code_size_in_bytes + resident(built.config)


def analyse(
    built: Experiment, trains: bool, target: roofline.Target | None, shape: tuple[int, ...]
) -> dict[str, Any]:
    """All figures of a step; of one that does not fit, that alone."""
    section, start = built.config.train if trains else built.config.evaluate, time.monotonic()
    program = lower_and_compile(built, trains, section.batch_size)
    used, room = total_bytes(built, program), target.memory_bytes if target else math.inf
    images = section.batch_size // built.mesh.size
    row = {"global_batch": section.batch_size, "images": images, "hbm_bytes": used}
    row |= {"fits": used is not None and used <= room, "compile_seconds": time.monotonic() - start}
    if program is None:
        return row
    found, memory = hlo.read(program.as_text()), program.memory_analysis()
    expected = 2 * images * multiply_adds(built, trains)
    is_void = not abs(found["flops"] / expected - 1) < TOLERANCE
    work = roofline.Work(found["bytes"], expected if is_void else found["flops"])
    row |= {
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": work.flops,
        "expected_flops": expected,
        "program_flops": found["flops"],
        "program_flops_are_void": is_void,
        "bytes_accessed": found["bytes"],
        "on_chip_bytes": found["on_chip_bytes"],
        "collective_bytes": {kind: found[kind] for kind in hlo.COLLECTIVES if found[kind]},
        "collectives": found["collectives"],
        "unknown_loops": found["unknown_loops"],
    }
    if target:
        seconds, limit = work.bound(target)
        sent = sum(row["collective_bytes"].values())
        talks = roofline.communication(target, shape, sent, found["collectives"])
        row |= {"step_seconds": seconds, "step_limit": limit, "communication_seconds": talks}
        row["efficiency"] = seconds / (seconds + talks)
    return row


def largest_batch(built: Experiment, target: roofline.Target, images: int, used: int | None):
    """(images per device that fit by a line through two sizes, whether that compiles and fits).

    Args:
      built: for the devices that compile.
      target: one of them.
      images: per device, of the step that is known.
      used: bytes that it takes; None where it does not fit, and less must do.
    """
    parts, points = built.config.train.accumulate_steps, {images: used} if used else {}

    def measure(images):
        return total_bytes(built, lower_and_compile(built, True, images * built.mesh.size))

    while len(points) < 2 and (images := images // 2 // parts * parts):
        if used := measure(images):
            points[images] = used
    if len(points) < 2:
        return 0, False
    (more, much), (less, little) = points.items()
    slope = (much - little) / (more - less)
    largest = int(less + (target.memory_bytes - little) / slope) // parts * parts
    used = measure(largest)
    return largest, used is not None and used <= target.memory_bytes


def table(result: dict[str, Any]) -> str:
    """The figures for people."""

    def line(name, key, form):
        steps = (result, result["evaluation"])
        return name, *("-" if step.get(key) is None else form(step[key]) for step in steps)

    def size(number):
        return f"{formats.si(number)}B"

    def milliseconds(seconds):
        return f"{1e3 * seconds:.3g} ms"

    room = f" of {size(result['memory_bytes'])}" if result["memory_bytes"] else ""
    rows = [
        ("each device", "train", "evaluate"),
        line("images", "images", formats.count),
        line("arguments", "argument_bytes", size),
        line("temporaries", "temp_bytes", size),
        line(f"memory in all{room}", "hbm_bytes", size),
        line("", "fits", lambda fits: "fits" if fits else "DOES NOT FIT"),
        line("FLOPs", "flops", formats.si),
        line("FLOPs as the program says", "program_flops_are_void",
             lambda is_void: "VOID: the network's are above" if is_void else "the same"),
        line("bytes through the memory", "bytes_accessed", size),
        line("collectives", "collectives", formats.count),
        line("their bytes", "collective_bytes",
             lambda sent: ", ".join(f"{kind} {size(n)}" for kind, n in sent.items()) or "0"),
        line("roofline", "step_seconds", milliseconds),
        line("its limit", "step_limit", str),
        line("collectives at least", "communication_seconds", milliseconds),
        line("weak scaling at most", "efficiency", formats.percent),
    ]  # fmt: skip
    if "largest_batch" in result:
        fits = "compiled, fits" if result["largest_batch_fits"] else "DOES NOT FIT when compiled"
        rows.append(("largest batch", f"{result['largest_batch']:,} images: {fits}", ""))
    title = (
        f"{result['config']} in {result['dtype']} on {result['topology']}: "
        f"{result['devices']:,} devices, {result['device']}, jax {jax.__version__}\n"
        f"global batch {result['global_batch']:,} = {result['images']:,} images on each; parameters "
        f"{size(result['parameter_bytes'])}, statistics {size(result['statistics_bytes'])}"
    )
    return f"{title}\n{formats.table(rows, right=2)}"


def main() -> int:
    """Does what the flags say; returns the exit code."""
    config = command_line.CONFIG.value
    experiment.describe(config)  # a mistake is said before a compiler starts
    if config.parallel.mode != "shard_map":
        raise UserError("parallel.mode = 'pmap': set 'shard_map', the same program with a lowering")
    target, devices, shape = topology(TOPOLOGY.value)
    if LARGEST.value and not target:
        raise UserError("--largest_batch: nobody knows the memory of a cpu; name another topology")
    built = experiment.to_train(config, devices)
    row = analyse(built, True, target, shape)
    state = built.abstract_state
    result = {
        "config": config.name,
        "topology": TOPOLOGY.value,
        "device": target.device if target else "cpu",
        "devices": len(devices),
        "memory_bytes": target.memory_bytes if target else None,
        "dtype": config.train.dtype,
        "jax": jax.__version__,
        "parameter_bytes": size_of(state.params),
        "statistics_bytes": size_of(state.batch_stats),
        **row,
    }
    if LARGEST.value:
        found = largest_batch(built, target, row["images"], row["hbm_bytes"])
        result["largest_batch"], result["largest_batch_fits"] = found
    result["evaluation"] = analyse(built, False, target, shape)
    print(json.dumps(result, indent=2) if FORMAT.value == "json" else table(result))
    return 0


if __name__ == "__main__":
    command_line.run(main)

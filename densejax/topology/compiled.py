"""Compiles a configuration's steps for devices that need not be there, and says what they take.

The steps are those that training maps (the same functions, shardings and donation), compiled by the
topology's own compiler. No data is read. All figures are of one device, without the data set, which
lies there too if it is kept in memory.
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

TOLERANCE = 0.1  # relative difference that a program's FLOPs may have from the network's


def compile_step(built: Experiment, trains: bool, batch_size: int) -> Any:
    """The compiled step for a batch over all devices; None if it does not fit into memory."""
    shape, config = built.task.image_shape, built.config
    if not trains and config.data.storage != "memory" and config.evaluate.crop_size:
        shape = (config.evaluate.resize_size, config.evaluate.resize_size, shape[-1])
    batch = experiment.abstract_batch(built.mesh, shape, batch_size)
    if trains and config.augmentation.alternate_flip:
        batch["mirrored"] = batch["label"].update(dtype=jnp.bool_)
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
    """Multiply-adds that a step needs for one image, with those that `recompute` does again."""
    model, preparation, shape = built.task.model, built.task.preparation, built.task.image_shape
    crop = 0 if trains else preparation.crop_size
    if size := crop or preparation.image_size:
        shape = (size, size, shape[-1])
    forward = counts.of_network(model, shape)[1] - counts.pooled_first(model, shape, trains)
    if trains:
        return 3 * forward + counts.recomputed(model, shape)
    one = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
    return forward * len(jax.eval_shape(preparation.views, one))


def total_bytes(program: Any) -> float:
    """Memory that a compiled step takes, with its results; infinite for None.

    A run needs more: the batches that it reads ahead, and the momentum during an evaluation.
    """
    if program is None:
        return math.inf
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    return used + memory.generated_code_size_in_bytes


def analyse(
    built: Experiment, trains: bool, target: targets.Target | None, shape: tuple[int, ...]
) -> dict[str, Any]:
    """All figures of a step; only the first few if it does not fit into memory."""
    batch_size = (built.config.train if trains else built.config.evaluate).batch_size
    images, start = batch_size // built.mesh.size, time.monotonic()
    program = compile_step(built, trains, batch_size)
    used = total_bytes(program)
    row = {
        "global_batch": batch_size,
        "images": images,
        "compile_seconds": time.monotonic() - start,
        "fits": used < math.inf and (target is None or used <= target.memory_bytes),
    }
    if program is None:
        return row
    found, memory = hlo.read(program.as_text()), program.memory_analysis()
    expected = 2 * images * multiply_adds(built, trains)
    # The backward pass leaves frozen parts out, which `expected` does not know.
    is_frozen = trains and bool(built.config.train.frozen)
    is_wrong = not is_frozen and not abs(found["flops"] / expected - 1) < TOLERANCE
    cost = roofline.Cost(found["bytes"], expected if is_wrong else found["flops"])
    row |= {
        "hbm_bytes": used,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "flops": cost.flops,
        "network_flops": expected,
        "program_flops": found["flops"],
        "program_flops_are_void": is_wrong,
        "bytes_accessed": cost.bytes,
        "on_chip_bytes": found["on_chip_bytes"],
        "collective_bytes": {kind: found[kind] for kind in hlo.COLLECTIVES if found[kind]},
        **{name: found[name] for name in ("collectives", "convolutions", "unknown_loops")},
    }
    if target and not found["unknown_loops"]:  # such a loop counts once: the time would be wrong
        row["step_seconds"], row["step_limit"] = cost.bound(target)
        if built.config.parallel.batch_norm != "groups":  # `communication` is over the whole slice
            seconds, sent = row["step_seconds"], sum(row["collective_bytes"].values())
            row |= roofline.weak_scaling(target, shape, seconds, sent, found["collectives"])
    return row


def largest_batch(built: Experiment, room: float, images: int, used: float) -> tuple[int, bool]:
    """Estimates how many images fit on a device, by a line through the memory of two batch sizes.

    Args:
      built: for the devices that compile.
      room: bytes of a device.
      images: a number of images for each device, whose step has been compiled.
      used: bytes that this step takes; infinite where it does not fit.

    Returns:
      The number of images of a device, and whether a step of so many compiles and fits.
    """

    def memory(images):
        return total_bytes(compile_step(built, True, images * built.mesh.size))

    accumulate, sizes = built.config.train.accumulate_steps, {images: used}
    while sizes[images] > room:
        images = images // 2 // accumulate * accumulate
        if not images:
            return 0, False
        sizes[images] = memory(images)
    # Sizes keep this one's factors: a TPU computes 128 images at once and pads 127.
    unit = math.lcm(accumulate, math.gcd(images, 128))
    other = images // 2 // unit * unit or 2 * images
    if other not in sizes:
        sizes[other] = memory(other)
    if sizes[other] == math.inf:
        return images, True
    less, more = sorted((images, other))
    slope = (sizes[more] - sizes[less]) / (more - less)
    if slope <= 0:  # the images are so small that padding hides them
        return more, True
    largest = max(images, int(less + (room - sizes[less]) / slope) // unit * unit)
    if largest not in sizes:
        sizes[largest] = memory(largest)
    return largest, sizes[largest] <= room


def report(config: ConfigDict, topology: str, largest: bool = False) -> dict[str, Any]:
    """All figures of a configuration's training and evaluation steps on a topology's devices.

    Args:
      config: the whole configuration.
      topology: as `targets.topology` reads it.
      largest: whether to look for the largest batch, by a few more compilations.

    Raises:
      UserError: the configuration is wrong, or the topology is unknown or has no compiler here.
    """
    experiment.build(config)  # refuses a wrong configuration before a compiler starts
    if config.parallel.mode != "shard_map":
        raise UserError("parallel.mode = 'pmap': only 'shard_map' can be compiled ahead; set it")
    target, devices, shape = targets.topology(topology)
    if largest and not target:
        raise UserError("--largest_batch: the memory of a cpu is not known; name a GPU or TPU")
    config = config.copy_and_resolve_references()
    config.train.class_weights = "none"  # they are of labels
    built = experiment.build(config, devices)
    row, state = analyse(built, True, target, shape), built.abstract_state
    result = {
        "config": config.name,
        "topology": topology,
        "device": target.device if target else "cpu",
        "devices": len(devices),
        "memory_bytes": target.memory_bytes if target else None,
        "dtype": built.computed_task.preparation.dtype,
        "jax": jax.__version__,
        "parameter_bytes": _size(state.params),
        "statistics_bytes": _size(state.batch_stats),
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
    train, evaluate = _figures(result), _figures(result["evaluation"])
    rows = [(name, train.get(name, "-"), evaluate.get(name, "-")) for name in train | evaluate]
    room = f" of {_bytes(result['memory_bytes'])}" if result["memory_bytes"] else ""
    lines = [
        f"{result['config']}, {result['dtype']}, {result['topology']}: {result['devices']:,} x "
        f"{result['device']}{room}, jax {result['jax']}",
        f"global batch {result['global_batch']:,}; parameters {_bytes(result['parameter_bytes'])}, "
        f"BatchNorm's statistics {_bytes(result['statistics_bytes'])}",
        formats.table([("of each device", "train", "evaluate"), *rows], right=2),
    ]
    if "largest_batch" in result:
        fits = "compiled, and fits" if result["largest_batch_fits"] else "does not fit"
        lines.append(f"largest batch by a line: {result['largest_batch']:,} images: {fits}")
    return "\n".join(lines)


def _figures(step: dict[str, Any]) -> dict[str, str]:
    """What the table shows of a step, by the names of its rows."""
    figures = {"images": formats.count(step["images"]) + ("" if step["fits"] else " DO NOT FIT")}
    if "flops" not in step:
        return figures
    source = " (the network's: the program's are wrong)" if step["program_flops_are_void"] else ""
    sent = (f"{kind} {_bytes(number)}" for kind, number in step["collective_bytes"].items())
    figures |= {
        "arguments": _bytes(step["argument_bytes"]),
        "temporaries": _bytes(step["temp_bytes"]),
        "memory in all": _bytes(step["hbm_bytes"]),
        "FLOPs": formats.si(step["flops"]) + source,
        "bytes moved": _bytes(step["bytes_accessed"])
        + (" at least" if step["unknown_loops"] else ""),
        "collectives": f"{step['collectives']:,}: {', '.join(sent) or '-'}",
    }
    if "step_seconds" in step:
        figures["roofline"] = f"{1e3 * step['step_seconds']:.3g} ms by {step['step_limit']}"
    if "efficiency" in step:
        figures["collectives take"] = f"{1e3 * step['communication_seconds']:.3g} ms"
        figures["t / (t + collectives)"] = formats.percent(step["efficiency"])
    return figures


def _bytes(number: float) -> str:
    return f"{formats.si(number)}B"


def _size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

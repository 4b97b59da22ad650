"""Devices: their mesh, where arrays lie on it, and the one function that maps a step over it."""

import hashlib
import os
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from densejax.config import UserError
from densejax.models.convolution import tracing_for
from densejax.runs import files

Axis = str | tuple[str, ...]
AXIS = "data"  # all devices along one axis
GROUP, MEMBER = "group", "member"  # or along two, where BatchNorm averages over groups of devices


def start() -> None:
    """Turns on the persistent compilation cache, unless JAX_COMPILATION_CACHE_DIR names another.

    The cache is private and has one folder for each kind of processor. A program that was compiled
    for one kind fails on another, and many machines may share a home directory.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = pathlib.Path("~/.cache/densejax/compiled").expanduser() / processor()
        advice = "set JAX_COMPILATION_CACHE_DIR to a folder that can be written"
        with files.writing(f"the compilation cache {cache}", advice):
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            cache.chmod(0o700)  # also if the folder is older: its programs are run
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def processor() -> str:
    """A short name of this machine's kind of processor."""
    cpu = pathlib.Path("/proc/cpuinfo")
    kinds = ("flags", "model name", "Features", "CPU implementer", "CPU part")  # of x86 and of ARM
    facts = [platform.processor()]
    if cpu.exists():
        lines = cpu.read_text().partition("\n\n")[0].splitlines()
        facts = [line for line in lines if line.startswith(kinds)]
    return hashlib.sha256("".join([platform.machine(), *facts]).encode()).hexdigest()[:8]


def mesh(group_size: int = 0, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices along the axis "data", or along "group" and "member".

    Args:
      group_size: neighbouring devices in a group, a divisor of their number; 0: no groups.
      devices: all devices of all processes unless said otherwise.

    Raises:
      UserError: the devices do not divide into such groups.
    """
    count = len(devices or jax.devices())
    if group_size and count % group_size:
        raise UserError(
            f"parallel.batch_norm_group_size = {group_size}: must divide the {count} devices"
        )
    shape = (count // group_size, group_size) if group_size else (count,)
    names = (GROUP, MEMBER) if group_size else (AXIS,)
    # A group may be half of an axis of 16 in a TPU slice; only this option allows that.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Explicit axes, JAX's default, would ask linen's layers for shardings they do not know.
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def axis(mesh: Mesh) -> Axis:
    """The name of a mesh's one axis, or those of its two: the argument of a reduction over all."""
    return mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis, examples, cut evenly over the devices."""
    return NamedSharding(mesh, PartitionSpec(axis(mesh)))


def check_batch_size(key: str, batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Raises UserError unless a batch divides evenly over the devices and each device's `parts`."""
    if left := batch_size % (mesh.size * parts):
        each = f" with train.accumulate_steps = {parts}" if parts > 1 else ""
        raise UserError(
            f"{key} = {batch_size}: must be a multiple of {mesh.size * parts}, for the "
            f"{mesh.size} devices{each}, such as {batch_size - left + mesh.size * parts}"
        )


def reverse(array: jax.Array, axis: Axis) -> jax.Array:
    """Reverses the order of the global batch [batch, ...]; each replica has its share of it.

    Devices exchange their shares in pairs: each sends one message, however many devices there are.
    """
    last = jax.lax.axis_size(axis) - 1
    pairs = [(device, last - device) for device in range(last + 1)]
    return jax.lax.ppermute(array, axis, pairs)[::-1]


def map_step(
    step: Callable[[Any, Any], Any], mesh: Mesh, mode: str, donate: bool = False
) -> Callable[[Any, Any], Any]:
    """Maps `step(state, batch)`, written for one replica and `axis(mesh)`, over a mesh.

    Both modes take and return the same arrays: a replicated state, a batch whose leading axis is
    the global batch, replicated results.

    Args:
      step: function of one replica.
      mesh: the devices.
      mode: "shard_map" (jit of shard_map) or "pmap", which knows no groups.
      donate: reuse the state's memory for the new state. With pmap the old state stays in memory:
        pmap takes the state unstacked, broadcasts it, and cannot donate what it broadcasts.
    """

    def traced(state, batch):
        with tracing_for(mesh.devices.flat[0].platform):
            return step(state, batch)

    if mode == "shard_map":
        mapped = jax.shard_map(
            traced,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(axis(mesh))),
            out_specs=PartitionSpec(),
        )
        return jax.jit(mapped, donate_argnums=(0,) if donate else ())
    mapped = jax.pmap(
        traced, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=list(mesh.devices.flat)
    )

    def per_device(array):
        return array.reshape(mesh.size, -1, *array.shape[1:])

    def step_all(state, batch):
        results = mapped(state, stack(batch))
        # Each process gets its devices' copies alone.
        return multihost_utils.host_local_array_to_global_array(results, mesh, PartitionSpec())

    stack = jax.jit(lambda batch: jax.tree.map(per_device, batch), out_shardings=split(mesh))
    return step_all

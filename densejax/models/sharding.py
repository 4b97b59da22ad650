"""Batches that lie on several devices: each device computes its own share, also under plain `jit`.

Under `jit`, XLA itself divides a program among the devices. It cannot divide a loop that takes a
few examples in each turn, as blocks and gradients do on a CPU. The examples of one turn lie on one
device, so XLA would first send the whole batch to every device. `jax.shard_map` says which device
computes what.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

EXAMPLES, WHOLE = True, False


def by_device(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    divided: tuple[bool, ...],
    results: Any,
) -> Any:
    """function(axes, *arguments), computed on each device with its share of the examples.

    Args:
      function: its `axes` are those of the devices, to sum over; None: there is one share.
      arguments: trees of arrays; the first is one array [batch, ...].
      divided: for each argument, EXAMPLES if its leading axis is divided, else WHOLE.
      results: the same for the result, or for each part of a tuple of results.
    """
    mesh, axes = _devices(arguments[0])
    if not axes:
        return function(None, *arguments)
    inputs, outputs = jax.tree.map(
        lambda is_divided: PartitionSpec(axes) if is_divided else PartitionSpec(),
        (divided, results),
    )
    if AxisType.Explicit in mesh.axis_types:  # JAX then divides nothing by itself
        arguments = [
            jax.reshard(argument, NamedSharding(mesh, spec))
            for argument, spec in zip(arguments, inputs, strict=True)
        ]
    mapped = jax.shard_map(
        lambda *shares: function(axes, *shares), mesh=mesh, in_specs=inputs, out_specs=outputs
    )
    return mapped(*arguments)


def _devices(x: jax.Array) -> tuple[AbstractMesh, tuple[str, ...]]:
    """The mesh that x [batch, ...] lies on, and its axes that divide the batch; (): none do.

    With automatic axes, JAX knows while it traces on which mesh an array lies, but not how it is
    divided: then all axes count as dividing it. If x is already mapped over axes, none do.
    """
    sharding, batch, axes = jax.typeof(x).sharding, x.shape[0], ()
    mesh, kinds = sharding.mesh, set(sharding.mesh.axis_types)
    if kinds == {AxisType.Auto}:
        axes = mesh.axis_names
    elif kinds == {AxisType.Explicit}:
        axes = sharding.spec[0] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    number = math.prod(mesh.shape[axis] for axis in axes)
    # An exported program may leave the batch size open, and a batch may be empty.
    divides = isinstance(batch, int) and batch and batch % number == 0
    # JAX refuses to loop over an explicit axis, also if it has one device.
    matters = number > 1 or kinds == {AxisType.Explicit}
    return mesh, axes if divides and matters else ()

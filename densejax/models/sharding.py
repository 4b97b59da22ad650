"""Batches that lie on several devices: under plain `jit`, too, each device computes its own share.

XLA then divides a program among devices by itself. It cannot where a program takes a few examples
after the others, as blocks and gradients do on a CPU: the examples of one turn lie on one device,
so XLA would send the whole batch to every device first. `jax.shard_map` says who computes what.
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
      divided: of each argument, whether it is EXAMPLES, whose leading axis is divided, or WHOLE.
      results: the same of the result, or of each where they are a tuple.
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

    Where axes are automatic, JAX knows while it traces on which mesh an array lies, but not how it
    is divided: then all of them divide it. Where x is mapped over axes already, none do.
    """
    sharding, batch, axes = jax.typeof(x).sharding, x.shape[0], ()
    mesh, kinds = sharding.mesh, set(sharding.mesh.axis_types)
    if kinds == {AxisType.Auto}:
        axes = mesh.axis_names
    elif kinds == {AxisType.Explicit}:
        axes = sharding.spec[0] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    number = math.prod(mesh.shape[axis] for axis in axes)
    # An exported program may leave the batch open; it may be empty.
    divides = isinstance(batch, int) and batch and batch % number == 0
    return mesh, axes if divides and number > 1 else ()

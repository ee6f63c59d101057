"""The device mesh and how arrays lie on it.

One mesh with three axes. The batch is split over "data" and "fsdp", and the rows of each image over
"rows"; parameters, optimizer state and averages are split over "fsdp" alone, which costs gathers in
each step and saves their memory. The same code runs on one device or on a pod: only the mesh's
shape differs.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Below this many elements an array is replicated: gathering it would cost more than it saves.
MIN_SHARDED_SIZE = 4096


def make_mesh(
    *, data: int = 0, fsdp: int = 1, rows: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices with the axes "data", "fsdp" and "rows".

    Args:
      data: devices along "data"; 0 takes all that the others leave.
      fsdp: devices along "fsdp".
      rows: devices along "rows", neighbours in the machine; those of an image are of one process.
      devices: of the mesh, if not those of this run: such as are only compiled for.

    Raises:
      ValueError: where the three do not multiply to the number of devices, or `rows` does not
        divide the devices of a process.
    """
    devices = jax.devices() if devices is None else devices
    of_process = collections.defaultdict(list)
    for device in devices:
        of_process[device.process_index].append(device)
    count, local = len(devices), len(of_process[devices[0].process_index])
    if rows < 1 or local % rows:
        raise ValueError(
            f"mesh.rows={rows} does not divide the {local} devices of a process, which reads whole "
            f"images; mesh.rows can be one of {_divisors(local)}"
        )
    images = count // rows
    if fsdp < 1 or images % fsdp or (data and data * fsdp != images):
        raise ValueError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.rows={rows} does not fit {count} devices; "
            f"mesh.fsdp can be one of {_divisors(images)}, and mesh.data=0 takes the rest"
        )
    shape, names = (images // fsdp, fsdp, rows), ("data", "fsdp", "rows")
    # Auto axes: XLA places the collectives. (make_mesh's default, Explicit, breaks Flax's Conv.)
    types = (AxisType.Auto,) * 3
    if rows == 1:
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    # Each process's devices by themselves: over all of them, rows might lie along an axis of the
    # machine that leads from one process to the next.
    placed = [
        mesh_utils.create_device_mesh((local // rows, rows), its)
        for _, its in sorted(of_process.items())
    ]
    return Mesh(np.concatenate(placed).reshape(shape), names, axis_types=types)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def seeing(mesh: Mesh, function: Callable) -> Callable:
    """`function` such that what it calls finds `mesh` in `jax.sharding.get_abstract_mesh()`.

    Every function that is compiled for a mesh goes through here: XLA cannot split a kernel of ours,
    which splits itself by `jax.shard_map` and has no other way to know the mesh.
    """

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def batch_sharding(mesh: Mesh, ndim: int = 1) -> NamedSharding:
    """Examples split over the devices; of images, whose array has four dimensions, rows too."""
    examples = ("data", "fsdp")
    return NamedSharding(mesh, PartitionSpec(examples, *["rows"] * (ndim == 4)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a train state, by one rule.

    The largest dimension that "fsdp" divides is split over it; arrays without one, and small
    arrays, are replicated.

    Args:
      abstract_state: a pytree of arrays or `jax.ShapeDtypeStruct`.
    """
    fsdp = mesh.shape["fsdp"]

    def rule(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0]
        if fsdp == 1 or leaf.size < MIN_SHARDED_SIZE or not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, abstract_state)

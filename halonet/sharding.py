"""The device mesh and how arrays lie on it.

One mesh with two axes. The batch is split over both; parameters, optimizer state and averages are
replicated over "data" and split over "fsdp", which costs gathers in each step and saves their
memory. The same code runs on one device or on a pod: only the mesh's shape differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Below this many elements an array is replicated: gathering it would cost more than it saves.
MIN_SHARDED_SIZE = 4096


def make_mesh(*, data: int = 0, fsdp: int = 1) -> Mesh:
    """A mesh of all devices with the axes "data" and "fsdp".

    Args:
      data: devices along "data"; 0 takes all that "fsdp" leaves.
      fsdp: devices along "fsdp".

    Raises:
      ValueError: where the two do not multiply to the number of devices.
    """
    count = jax.device_count()
    if fsdp < 1 or count % fsdp or (data and data * fsdp != count):
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        raise ValueError(
            f"mesh.data={data} x mesh.fsdp={fsdp} does not fit {count} devices; mesh.fsdp can be "
            f"one of {divisors}, and mesh.data=0 takes the rest"
        )
    # Auto axes: XLA places the collectives. (make_mesh's default, Explicit, breaks Flax's Conv.)
    return jax.make_mesh(
        (count // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


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

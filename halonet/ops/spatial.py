"""Images whose rows several devices share, each a part of them: what neighbours lend each other.

The rows lie along the mesh axis "rows", the images along all others. XLA partitions what looks at
one pixel at a time, and sums. What looks at more pixels runs on each device by itself here, with
the rows beside its own that it has asked the neighbours for: no other way of partitioning is sure
never to gather a whole map.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

ROWS = "rows"  # the mesh axis


def row_devices() -> int:
    """How many devices share the rows of an image, by the mesh that the program is traced for.

    Inside `on_each_device` it is 1: what runs there sees its own part alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.manual_axes else mesh.shape.get(ROWS, 1)


def on_each_device(function: Callable, maps: tuple[Array, ...], arrays: tuple[Array, ...]) -> Array:
    """`function(*maps, *arrays)` on each device: of the maps its own part, all of the arrays.

    Args:
      function: makes a map, whose rows are to those of `maps` as they are in the whole.
      maps: (N, H, W, ...). Where the devices beside "rows" do not divide N, each has all images.
      arrays: weights, say; their gradients are added up over the devices.

    Raises:
      ValueError: for maps whose rows the devices cannot share.
    """
    mesh = jax.sharding.get_abstract_mesh()
    images = tuple(name for name in mesh.axis_names if name != ROWS)
    shared = maps[0].shape[0] % math.prod(mesh.shape[name] for name in images) == 0
    devices = row_devices()
    for x in maps:
        if x.shape[1] % devices:
            raise ValueError(
                f"{devices} devices (mesh.rows) cannot share {x.shape[1]} rows of a map; "
                f"the nearest number that they can: {max(1, round(x.shape[1] / devices)) * devices}"
            )
    part = PartitionSpec(images if shared else None, ROWS if devices > 1 else None)
    return jax.shard_map(
        function,
        in_specs=(part,) * len(maps) + (PartitionSpec(),) * len(arrays),
        out_specs=part,
        check_vma=False,
    )(*maps, *arrays)


def with_neighbours(
    x: Float[Array, "n h w *c"], above: int, below: int, outside: float = 0.0
) -> Float[Array, "n h2 w *c"]:
    """A device's rows between those next to them, within `on_each_device`.

    Args:
      above, below: how many rows of the neighbour above and of the one below.
      outside: what stands for them beyond the first and the last row of the image.

    Raises:
      NotImplementedError: for more rows than a neighbour has.
    """
    height, last = x.shape[1], lax.axis_size(ROWS) - 1
    if max(above, below) > height:
        raise NotImplementedError(
            f"{max(above, below)} rows of a neighbour that has {height}: no rows are lent over "
            f"more than one device; a smaller mesh.rows than {last + 1} leaves each of them more"
        )
    parts, here = [x], lax.axis_index(ROWS)
    if above:
        lent = lax.ppermute(x[:, height - above :], ROWS, [(i, i + 1) for i in range(last)])
        # Who is lent nothing gets zeros.
        parts.insert(0, jnp.where(here == 0, outside, lent) if outside else lent)
    if below:
        lent = lax.ppermute(x[:, :below], ROWS, [(i + 1, i) for i in range(last)])
        parts.append(jnp.where(here == last, outside, lent) if outside else lent)
    return jnp.concatenate(parts, 1)

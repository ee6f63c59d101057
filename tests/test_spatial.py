"""Images whose rows several devices share: each layer, its gradients, and what devices exchange."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from halonet.ops import IMPLEMENTATIONS, halo_attention, table_size

COLLECTIVES = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def make_mesh(data, rows):
    axes = ("data", "fsdp", "rows")
    devices = jax.devices()[: data * rows]
    return jax.make_mesh((data, 1, rows), axes, (AxisType.Auto,) * 3, devices=devices)


def check(function, maps, arrays, mesh, kinds=frozenset({"collective-permute", "all-reduce"})):
    """Values and gradients as without a mesh, and no collectives but those of `kinds`."""
    part, whole = NamedSharding(mesh, P(("data", "fsdp"), "rows")), NamedSharding(mesh, P())
    inputs = (*maps, *arrays)
    layout = (part,) * len(maps) + (whole,) * len(arrays)
    shape = jax.eval_shape(function, *inputs)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=shape.shape), shape.dtype)

    def both(cotangent, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(cotangent)

    right = jax.jit(lambda *x: both(*x))(cotangent, *inputs)
    with jax.set_mesh(mesh):
        split = jax.jit(both, in_shardings=(part, *layout), out_shardings=(part, layout))
        split = split.lower(cotangent, *inputs).compile()
    assert set(COLLECTIVES.findall(split.as_text())) == kinds
    found = split(*jax.device_put((cotangent, *inputs), (part, *layout)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-4), found, right)


def attention(
    implementation, *, height=32, stride=1, block=4, halo=2, positions="exact", **options
):
    """The op and its arguments: maps of two blocks a row."""
    rng = np.random.default_rng(0)
    width, table = 2 * block, (table_size(block, halo, positions), 4)
    queries = (4, height // stride, width // stride, 2, 4)
    shapes = [queries, (4, height, width, 2, 4), (4, height, width, 2, 8), table, table]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    op = functools.partial(
        halo_attention,
        block=block,
        halo=halo,
        stride=stride,
        positions=positions,
        implementation=implementation,
        **options,
    )
    return op, tuple(arrays[:3]), tuple(arrays[3:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_blocks_are_shared(implementation):
    """One a device; the devices at the ends have the border's mask."""
    check(*attention(implementation, height=8, border="mask"), make_mesh(4, 2))


@pytest.mark.middle
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_form_shares_rows(implementation, border, mesh, stride):
    check(*attention(implementation, border=border, stride=stride), make_mesh(*mesh))

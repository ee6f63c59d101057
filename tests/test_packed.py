"""How the lane-packed form shares its work among devices, and which heads share lanes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from halonet.ops import halo_attention, packed

OPTIONS = {"block": 4, "halo": 2, "border": "mask"}


def inputs(heads=2):
    rng = np.random.default_rng(0)
    shapes = [(4, 16, 8, heads, 4)] * 3 + [(11, 4)] * 2
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def collectives(program):
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf" ({kinds})(?:-start)?\(", program.as_text()))


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [(P(None, "device"), {"collective-permute", "all-reduce"}), (P("device"), {"all-reduce"})],
    ids=["rows", "batch"],
)
def test_it_is_partitioned_without_gathering(spec, kinds):
    arguments = inputs()
    mesh = jax.make_mesh((4,), ("device",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    shared, copied = NamedSharding(mesh, spec), NamedSharding(mesh, P())
    layout = (shared, shared, shared, copied, copied)
    op = functools.partial(halo_attention, **OPTIONS, implementation="xla_packed")

    def both(*arguments):
        out, pull = jax.vjp(op, *arguments)
        return out, pull(out)

    split = jax.jit(both, in_shardings=layout, out_shardings=(shared, layout))
    split = split.lower(*arguments).compile()
    assert collectives(split) == kinds
    placed = jax.device_put(tuple(arguments), layout)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        jax.device_get(split(*placed)),
        jax.device_get(jax.jit(both)(*arguments)),
    )


@pytest.mark.parametrize(
    ("heads", "lanes", "products"), [(2, 128, 1), (6, 12, 2), (6, 4, 6), (3, 1, 3)]
)
def test_heads_share_products_as_far_as_lanes_go(monkeypatch, heads, lanes, products):
    arguments = inputs(heads)
    right = halo_attention(*arguments, **OPTIONS, implementation="xla_shift")
    monkeypatch.setattr(packed, "LANES", lanes)
    op = functools.partial(halo_attention, **OPTIONS, implementation="xla_packed")
    np.testing.assert_allclose(op(*arguments), right, rtol=1e-5, atol=1e-5)
    # Queries times keys: images, rows and columns of blocks, groups; queries of a group, keys.
    queries = heads // products * 16
    logits = f"4,4,2,{products},{queries},{8 * 16}"
    assert f"f32[{logits}] = dot_general" in str(jax.make_jaxpr(op)(*arguments))

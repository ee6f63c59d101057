"""How the portable form splits its work over devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from halonet.ops import halo_attention

OPTIONS = {"block": 4, "halo": 2}


def inputs(n=4, height=16, width=8, heads=2, d=4):
    rng = np.random.default_rng(0)
    shapes = [(n, height, width, heads, d)] * 3 + [(11, d)] * 2
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def collectives(program):
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return set(re.findall(rf" ({kinds})(?:-start)?\(", program.as_text()))


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize(
    ("spec", "forward", "backward"),
    [
        (P(None, "device"), {"collective-permute"}, {"collective-permute", "all-reduce"}),
        (P("device"), set(), {"all-reduce"}),
    ],
    ids=["rows", "batch"],
)
def test_shift_is_partitioned_without_gathering(spec, forward, backward, border):
    arguments = inputs()
    mesh = jax.make_mesh((4,), ("device",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    shared, copied = NamedSharding(mesh, spec), NamedSharding(mesh, P())
    layout = (shared, shared, shared, copied, copied)
    op = functools.partial(halo_attention, **OPTIONS, border=border, implementation="xla_shift")

    def gradients(*arguments):
        return jax.grad(lambda *x: jnp.square(op(*x)).sum(), (0, 1, 2, 3, 4))(*arguments)

    for function, out, kinds in ((op, shared, forward), (gradients, layout, backward)):
        split = (
            jax.jit(function, in_shardings=layout, out_shardings=out).lower(*arguments).compile()
        )
        assert collectives(split) == kinds
        placed = jax.device_put(tuple(arguments), layout)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            jax.device_get(split(*placed)),
            jax.device_get(jax.jit(function)(*arguments)),
        )

"""How the form for CPUs splits its work over steps."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.ops import halo_attention, rows

OPTIONS = {"block": 4, "halo": 2}


def inputs(n=4, height=16, width=8, heads=2, d=4):
    rng = np.random.default_rng(0)
    shapes = [(n, height, width, heads, d)] * 3 + [(11, d)] * 2
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("elements", "loops", "steps"),
    # One row of blocks here: 2 blocks x 2 heads x 64 keys x (16 queries + 4 + 4) = 6,144 elements.
    [
        (48 * 6144, 0, []),  # everything at once
        (12 * 6144, 1, [4]),  # three images of four rows each
        (8 * 6144, 1, [6]),  # two images of four rows each
        (2 * 6144, 2, [2, 12]),  # two rows of each image
        (1, 2, [4, 12]),  # one row
    ],
)
def test_rows_takes_as_much_at_a_time_as_fits(monkeypatch, elements, loops, steps):
    arguments = inputs(n=12)
    shift = functools.partial(halo_attention, **OPTIONS, implementation="xla_shift")
    right = jax.jit(shift)(*arguments)
    monkeypatch.setattr(rows, "ELEMENTS_PER_STEP", elements)
    op = functools.partial(halo_attention, **OPTIONS, implementation="xla_rows")
    lengths = [int(x) for x in re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(op)(*arguments)))]
    assert len(lengths) == loops
    assert sorted(lengths) == steps
    np.testing.assert_allclose(jax.jit(op)(*arguments), right, rtol=1e-5, atol=1e-5)


def test_rows_needs_less_memory_to_train(monkeypatch):
    arguments = inputs(n=8, height=32, width=32)
    monkeypatch.setattr(rows, "ELEMENTS_PER_STEP", 2**16)

    def temporaries(implementation):
        def loss(*arguments):
            return halo_attention(*arguments, **OPTIONS, implementation=implementation).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("xla_rows") < 0.5 * temporaries("xla_shift")


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_gradients_do_not_depend_on_the_steps(monkeypatch, border):
    arguments = inputs()

    def gradients(implementation):
        op = functools.partial(halo_attention, **OPTIONS, border=border)
        loss = lambda *x: jnp.square(op(*x, implementation=implementation)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*arguments)

    right = gradients("xla_shift")
    # One row at a time, two rows, an image, everything.
    for elements in (1, 2 * 6144, 4 * 6144, 16 * 6144):
        monkeypatch.setattr(rows, "ELEMENTS_PER_STEP", elements)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
        jax.tree.map(close, gradients("xla_rows"), right)

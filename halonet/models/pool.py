"""The max-pool of the stem, with a gradient that a CPU computes fast."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from halonet.ops import on_each_device, row_devices, with_neighbours


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Takes the largest of 3x3 pixels around every second pixel; odd sizes are rounded up."""
    if row_devices() == 1:
        return _max_pool(x)
    # Two rows, so that windows begin where they do in the whole: one of them is of the neighbour.
    return on_each_device(
        lambda x: _max_pool(with_neighbours(x, 2, 0, outside=-jnp.inf))[:, 1:], (x,), ()
    )


def max_pool_zeros(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """The same of a map with zeros around it, which take part; odd sizes are rounded up."""

    def pool(x: Array, rows: tuple[int, int]) -> Array:
        x = jnp.pad(x, ((0, 0), rows, (1, 1), (0, 0)))
        return nn.max_pool(x, (3, 3), strides=(2, 2))

    if row_devices() == 1:
        return pool(x, (1, 1))
    return on_each_device(lambda x: pool(with_neighbours(x, 1, 0), (0, 0)), (x,), ())


def _pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@jax.custom_vjp
def _max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """The pool of a whole map.

    The gradient goes to the first of equal pixels, as XLA's own does. On a CPU, XLA scatters it one
    element at a time; there it is put together from the nine places of a window, in half the time.
    """
    return _pool(x)


def _forward(x: Float[Array, "n h w c"]) -> tuple[Array, tuple[Array, Array]]:
    out = _pool(x)
    return out, (x, out)


def _backward(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array]:
    by_scatter = functools.partial(_backward_by_scatter, *residuals, d_out)
    by_place = functools.partial(_backward_by_place, *residuals, d_out)
    return (jax.lax.platform_dependent(cpu=by_place, default=by_scatter),)


_max_pool.defvjp(_forward, _backward)


def _backward_by_scatter(x: Array, out: Array, d_out: Array) -> Array:
    del out
    return jax.vjp(_pool, x)[1](d_out)[0]


def _backward_by_place(x: Array, out: Array, d_out: Array) -> Array:
    sizes = out.shape[1:3]
    ends = [(1, 2 * size - length) for size, length in zip(sizes, x.shape[1:3], strict=True)]
    padded = jnp.pad(x, ((0, 0), *ends, (0, 0)), constant_values=-jnp.inf)
    # The first place, row by row, that holds the largest pixel of a window.
    first = jnp.full(out.shape, 8, jnp.int8)
    for place in reversed(range(8)):
        rows, cols = (
            slice(start, start + 2 * size - 1, 2)
            for start, size in zip(divmod(place, 3), sizes, strict=True)
        )
        first = jnp.where(padded[:, rows, cols] == out, jnp.int8(place), first)
    parts = [jnp.where(first == place, d_out, 0) for place in range(9)]
    by_row = [_interleave(*parts[start : start + 3], axis=2) for start in (0, 3, 6)]
    d_padded = _interleave(*by_row, axis=1)
    return d_padded[:, 1 : 1 + x.shape[1], 1 : 1 + x.shape[2]]


def _interleave(left: Array, middle: Array, right: Array, *, axis: int) -> Array:
    """Adds up along `axis` what windows of three, each two further on, give to their places."""
    start, end = [(0, 0)] * left.ndim, [(0, 0)] * left.ndim
    start[axis], end[axis] = (1, 0), (0, 1)
    even = jnp.pad(left, end) + jnp.pad(right, start)
    both = jnp.stack([even, jnp.pad(middle, end)], axis + 1)
    return both.reshape(*left.shape[:axis], -1, *left.shape[axis + 1 :])

"""The reference against a loop that follows the definition, one query at a time, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.ops import halo_attention, table_size


def loop(q, k, v, row_table, col_table, *, block, halo, stride, border, positions, scale_positions):
    """Halo attention by its definition; NumPy, no vectors wider than one channel axis."""
    _, height, width, _, d_k = k.shape
    position_scale = 1 / np.sqrt(d_k) if scale_positions else 1

    def table_row(pixel, start, key):
        if positions == "exact":
            return key - pixel + block + halo - 1
        nth_query, nth_key = (pixel - start) // stride, key - (start - halo)
        return nth_key - nth_query + block + 2 * halo - 1

    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for image, y, x, head in np.ndindex(q.shape[:-1]):
        query = q[image, y, x, head]
        row, col = stride * y, stride * x
        top, left = row // block * block, col // block * block
        logits, values = [], []
        for i in range(top - halo, top + block + halo):
            for j in range(left - halo, left + block + halo):
                inside = 0 <= i < height and 0 <= j < width
                if border == "mask" and not inside:
                    continue
                key = k[image, i, j, head] if inside else np.zeros(d_k)
                position = row_table[table_row(row, top, i)] + col_table[table_row(col, left, j)]
                logits.append(query @ key / np.sqrt(d_k) + query @ position * position_scale)
                values.append(v[image, i, j, head] if inside else np.zeros(v.shape[-1]))
        weights = np.exp(np.array(logits) - max(logits))
        out[image, y, x, head] = weights @ np.array(values) / weights.sum()
    return out


@functools.cache
def example(size, block, halo, stride, border, positions, scale_positions):
    """The options of a call, its arrays and what the loop makes of them."""
    rng = np.random.default_rng(block + 10 * halo)
    n, (height, width), heads, d_k, d_v = 2, size, 2, 3, 5
    q = rng.normal(size=(n, -(-height // stride), -(-width // stride), heads, d_k))
    k = rng.normal(size=(n, height, width, heads, d_k))
    v = rng.normal(size=(n, height, width, heads, d_v))
    arrays = (q, k, v, *rng.normal(size=(2, table_size(block, halo, positions), d_k)))
    options = {"block": block, "halo": halo, "stride": stride, "border": border}
    options |= {"positions": positions, "scale_positions": scale_positions}
    return options, arrays, loop(*arrays, **options)


@pytest.mark.parametrize("implementation", ["reference", "xla_shift", "xla_rows"])
@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize(
    ("size", "block", "halo", "stride", "positions", "scale_positions"),
    [
        ((8, 12), 4, 1, 1, "exact", True),
        ((8, 12), 4, 3, 2, "exact", True),
        ((4, 6), 2, 3, 1, "exact", True),
        ((8, 12), 4, 0, 1, "exact", False),
        ((8, 12), 4, 1, 2, "contiguous", False),
        # Sizes that need padding.
        ((9, 6), 4, 1, 1, "exact", True),
        ((3, 7), 4, 2, 2, "exact", False),
        ((7, 5), 4, 1, 2, "contiguous", False),
        ((10, 8), 6, 2, 3, "contiguous", True),
    ],
)
def test_follows_the_definition(
    implementation, size, block, halo, stride, border, positions, scale_positions
):
    pad = size[0] % block > 0 or size[1] % block > 0
    options, arrays, right = example(size, block, halo, stride, border, positions, scale_positions)
    op = functools.partial(
        halo_attention, **options, pad_to_blocks=pad, implementation=implementation
    )
    with jax.enable_x64(True):
        ours = jax.jit(op)(*(jnp.asarray(x) for x in arrays))
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, right, rtol=0, atol=1e-12)

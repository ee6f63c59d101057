"""The reference against a loop that follows the definition, one query at a time, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.ops import halo_attention


def loop(q, k, v, row_table, col_table, *, block, halo, stride, border):
    """Halo attention by its definition; NumPy, no vectors wider than one channel axis."""
    _, height, width, _, d_k = k.shape
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for image, y, x, head in np.ndindex(q.shape[:-1]):
        row, col = stride * y, stride * x
        top, left = row // block * block, col // block * block
        logits, values = [], []
        for i in range(top - halo, top + block + halo):
            for j in range(left - halo, left + block + halo):
                inside = 0 <= i < height and 0 <= j < width
                if border == "mask" and not inside:
                    continue
                key = k[image, i, j, head] if inside else np.zeros(d_k)
                key = key + row_table[i - row + block + halo - 1]
                key = key + col_table[j - col + block + halo - 1]
                logits.append(q[image, y, x, head] @ key / np.sqrt(d_k))
                values.append(v[image, i, j, head] if inside else np.zeros(v.shape[-1]))
        weights = np.exp(np.array(logits) - max(logits))
        out[image, y, x, head] = weights @ np.array(values) / weights.sum()
    return out


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize(("block", "halo", "stride"), [(4, 1, 1), (4, 3, 2), (2, 3, 1), (4, 0, 1)])
@pytest.mark.parametrize("implementation", ["reference", "xla_shift", "xla_rows"])
def test_follows_the_definition(implementation, block, halo, stride, border):
    rng = np.random.default_rng(block + 10 * halo)
    n, height, width, heads, d_k, d_v = 2, 2 * block, 3 * block, 2, 3, 5
    rows = 2 * block + 2 * halo - 1
    q = rng.normal(size=(n, height // stride, width // stride, heads, d_k))
    k = rng.normal(size=(n, height, width, heads, d_k))
    v = rng.normal(size=(n, height, width, heads, d_v))
    tables = rng.normal(size=(2, rows, d_k))
    options = {"block": block, "halo": halo, "stride": stride, "border": border}
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (q, k, v, *tables)]
        ours = halo_attention(*arrays, **options, implementation=implementation)
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, loop(q, k, v, *tables, **options), rtol=0, atol=1e-12)

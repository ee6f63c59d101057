"""Halo attention, dense and slow: the definition of correct.

Every query is compared with every position of the image and of a border around it, and a mask keeps
those that lie in the window of the query's block. Nothing here is meant to be fast.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


def halo_attention_reference(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    row_table: Float[Array, "rows d_k"],
    col_table: Float[Array, "rows d_k"],
    *,
    block: int,
    halo: int,
    stride: int,
    border: str,
) -> Float[Array, "n h_q w_q heads d_v"]:
    """Computes halo attention from its definition; see `halo_attention` for the arguments.

    Works in float32, or in float64 if that is the dtype of `q`. Memory grows with the square of the
    number of pixels.
    """
    dtype, d_k = q.dtype, q.shape[-1]
    wide = jnp.promote_types(dtype, jnp.float32)
    q, k, v, row_table, col_table = (x.astype(wide) for x in (q, k, v, row_table, col_table))

    around = ((0, 0), (halo, halo), (halo, halo), (0, 0), (0, 0))
    k, v = jnp.pad(k, around), jnp.pad(v, around)
    row_offset, row_seen = _axis(q.shape[1], k.shape[1], block, halo, stride, border)
    col_offset, col_seen = _axis(q.shape[2], k.shape[2], block, halo, stride, border)

    # Letters: y, x of the query; i, j of the key; a head; d channel.
    dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    logits = dot("nyxad,nijad->nayxij", q, k)
    logits += dot("nyxad,yid->nayxi", q, row_table[row_offset])[..., :, None]
    logits += dot("nyxad,xjd->nayxj", q, col_table[col_offset])[..., None, :]
    seen = row_seen[:, None, :, None] & col_seen[None, :, None, :]
    logits = jnp.where(seen[None, None], logits * d_k**-0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=(-2, -1))
    return dot("nayxij,nijad->nyxad", weights, v).astype(dtype)


def _axis(
    queries: int, padded: int, block: int, halo: int, stride: int, border: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns, along one axis, each (query, key) pair's table row and whether the query sees it."""
    query = stride * np.arange(queries)[:, None]
    key = np.arange(padded)[None, :] - halo
    start = query // block * block
    seen = (start - halo <= key) & (key < start + block + halo)
    if border == "mask":
        seen &= (key >= 0) & (key < padded - 2 * halo)
    # Pairs that are not seen have no row of their own; any will do.
    return np.where(seen, key - query + block + halo - 1, 0), seen

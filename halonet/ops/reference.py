"""Halo attention, dense and slow: the definition of correct.

Every query is compared with every position of the image and of a border around it, and a mask keeps
those that lie in the window of the query's block. Nothing here is meant to be fast.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from halonet.ops.geometry import Spec
from halonet.ops.spatial import ROWS


def halo_attention_reference(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    row_table: Float[Array, "rows d_k"],
    col_table: Float[Array, "rows d_k"],
    spec: Spec,
) -> Float[Array, "n h_q w_q heads d_v"]:
    """Computes halo attention from its definition; see `halo_attention` for the arguments.

    Works in float32, or in float64 if that is the dtype of `q`. Memory grows with the square of the
    number of pixels.
    """
    dtype, scale, halo = q.dtype, q.shape[-1] ** -0.5, spec.halo
    wide = jnp.promote_types(dtype, jnp.float32)
    q, k, v, row_table, col_table = (x.astype(wide) for x in (q, k, v, row_table, col_table))

    # Of the neighbours' rows, where there are any, as many stay as the halo has.
    above = halo - spec.strips * spec.block
    around = ((0, 0, 0), (above, above, 0), (halo, halo, 0), (0, 0, 0), (0, 0, 0))
    k, v = (lax.pad(x, jnp.zeros((), wide), around) for x in (k, v))
    first = lax.axis_index(ROWS) * q.shape[1] * spec.stride if spec.row_devices > 1 else 0
    row_offset, row_seen = _axis(q.shape[1], k.shape[1], spec.height, spec, first)
    col_offset, col_seen = _axis(q.shape[2], k.shape[2], spec.width, spec)

    # Letters: y, x of the query; i, j of the key; a head; d channel.
    dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    content = dot("nyxad,nijad->nayxij", q, k) * scale
    rows = dot("nyxad,yid->nayxi", q, row_table[row_offset])[..., :, None]
    cols = dot("nyxad,xjd->nayxj", q, col_table[col_offset])[..., None, :]
    logits = content + (rows + cols) * (scale if spec.scale_positions else 1)
    seen = row_seen[:, None, :, None] & col_seen[None, :, None, :]
    logits = jnp.where(seen[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=(-2, -1))
    return dot("nayxij,nijad->nyxad", weights, v).astype(dtype)


def _axis(
    queries: int, padded: int, size: int, spec: Spec, first: int | Int[Array, ""] = 0
) -> tuple[np.ndarray, Bool[Array | np.ndarray, "queries padded"]]:
    """Returns, along one axis, each (query, key) pair's table row and whether the query sees it.

    There are `padded` keys: those of whole blocks, of which the image has `size`, and two halos.
    The queries begin at pixel `first` of the image.
    """
    block, halo = spec.block, spec.halo
    query = spec.stride * np.arange(queries)[:, None]
    key = np.arange(padded)[None, :] - halo
    start = query // block * block
    seen = (start - halo <= key) & (key < start + block + halo)
    if spec.positions == "exact":
        row = key - query + block + halo - 1
    else:
        nth_query, nth_key = (query - start) // spec.stride, key - (start - halo)
        row = nth_key - nth_query + block + 2 * halo - 1
    # Pairs that are not seen have no row of their own; any will do.
    row = np.where(seen, row, 0)
    if spec.border == "mask":
        seen = seen & (key + first >= 0) & (key + first < size)
    return row, seen

"""Halo attention in portable JAX: every block at once.

XLA partitions this form over the rows and the batch, and knows its derivatives of every order.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from halonet.ops.geometry import Spec
from halonet.ops.spatial import ROWS


def halo_attention_shift(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    row_table: Float[Array, "offsets d_k"],
    col_table: Float[Array, "offsets d_k"],
    spec: Spec,
) -> Float[Array, "n h_q w_q heads d_v"]:
    """Computes all images and rows of blocks at once; see `halo_attention` for the arguments."""
    attend = partial(_attend_strip, row_table=row_table, col_table=col_table, spec=spec)
    # Images and rows stay axes of their own: merged, XLA would gather them to partition them.
    attend = jax.vmap(jax.vmap(attend), in_axes=(0, 0, None))
    return attend(*_strips(q, k, v, spec)).reshape(*q.shape[:-1], v.shape[-1])


def _strips(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    spec: Spec,
) -> tuple[
    Float[Array, "n rows side w_q heads d_k"],
    Float[Array, "n rows window w heads d_kv"],
    Bool[Array | np.ndarray, "rows window"],
]:
    """Cuts images into rows of blocks: queries, keys and values with halo, what is inside."""
    queries = q.reshape(q.shape[0], q.shape[1] // spec.side, spec.side, *q.shape[2:])
    return queries, row_windows(jnp.concatenate([k, v], -1), spec), rows_inside(spec)


def _attend_strip(
    q: Float[Array, "side w_q heads d_k"],
    keys_values: Float[Array, "window w heads d_kv"],
    row_inside: Bool[Array, " window"],
    *,
    row_table: Float[Array, "offsets d_k"],
    col_table: Float[Array, "offsets d_k"],
    spec: Spec,
) -> Float[Array, "side w_q heads d_v"]:
    """Computes the attention of one row of blocks."""
    side, w_q, heads, d_k = q.shape
    window, width = keys_values.shape[:2]
    d_v, cols = keys_values.shape[-1] - d_k, width // spec.block
    dtype = q.dtype

    # Axes: c column of blocks; a head; y, x query in its block; i, j key in its window; d channel;
    # q and k the query and the key as one flat axis each.
    q_ycxad = (q * d_k**-0.5).reshape(side, cols, side, heads, d_k)
    positional = q_ycxad if spec.scale_positions else q.reshape(q_ycxad.shape)
    index = spec.table_index()
    row_logits = dot("ycxad,yid->cayxi", positional, row_table[index])
    col_logits = dot("ycxad,xjd->cayxj", positional, col_table[index])
    if spec.border == "mask":
        # Small enough to weigh nothing, and two of them still a finite number.
        nothing = jnp.finfo(dtype).min / 4
        col_inside = spec.inside(spec.width)[:, None, None, None, :]
        row_logits = jnp.where(row_inside[None, None, None, None, :], row_logits, nothing)
        col_logits = jnp.where(col_inside, col_logits, nothing)

    # Position logits enter through the product: queries carry theirs as further channels, and keys
    # a one-hot row and column that pick them. A broadcast sum would have axes of `window` elements,
    # which accelerators pad to a whole tile.
    q_cayxd = q_ycxad.transpose(1, 3, 0, 2, 4)
    q_cayxd = jnp.concatenate([q_cayxd, row_logits.astype(dtype), col_logits.astype(dtype)], -1)
    q_caqd = q_cayxd.reshape(cols, heads, side * side, d_k + 2 * window)
    kv_icjad = with_halo(keys_values, 1, spec.block, spec.halo)
    kv_cakd = kv_icjad.transpose(1, 3, 0, 2, 4).reshape(cols, heads, window * window, d_k + d_v)
    picks = np.eye(window)
    picks = np.concatenate([np.repeat(picks, window, 0), np.tile(picks, (window, 1))], -1)
    picks = jnp.broadcast_to(jnp.asarray(picks, dtype), (cols, heads, *picks.shape))
    k_cakd = jnp.concatenate([kv_cakd[..., :d_k], picks], -1)
    logits_caqk = dot("caqd,cakd->caqk", q_caqd, k_cakd)

    # A softmax that divides after the second product, where there is less to divide. The largest
    # logit cancels, so it needs no gradient.
    largest = lax.stop_gradient(logits_caqk.max(-1, keepdims=True))
    weights_caqk = jnp.exp(logits_caqk - largest)
    total = weights_caqk.sum(-1, keepdims=True)
    out_caqd = dot("caqk,cakd->caqd", weights_caqk.astype(dtype), kv_cakd[..., d_k:]) / total
    out_cayxd = out_caqd.astype(dtype).reshape(cols, heads, side, side, d_v)
    return out_cayxd.transpose(2, 0, 3, 1, 4).reshape(side, w_q, heads, d_v)


def dot(subscripts: str, x: Array, y: Array) -> Array:
    """An einsum that is exact to the dtype, and summed in float32 where that is narrower."""
    return jnp.einsum(
        subscripts,
        x,
        y,
        # The default of XLA on TPU multiplies float32 as bfloat16.
        precision=lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )


def row_windows(x: Float[Array, "n h w *c"], spec: Spec) -> Float[Array, "n rows window w *c"]:
    """Cuts images into rows of blocks, each with its halo above and below."""
    windows = with_halo(x, 1, spec.block, spec.halo)
    return windows[:, spec.strips : windows.shape[1] - spec.strips]


def rows_inside(spec: Spec) -> Bool[Array | np.ndarray, "rows window"]:
    """Which rows of the window of each row of blocks lie inside the image."""
    inside = spec.inside(spec.height)
    if spec.row_devices == 1:
        return inside
    first = lax.axis_index(ROWS) * spec.blocks[0]
    return lax.dynamic_slice_in_dim(jnp.asarray(inside), first, spec.blocks[0])


def with_halo(x: Array, axis: int, block: int, halo: int, length: int | None = None) -> Array:
    """Splits `axis` into blocks, each with its halo: two axes (blocks, block + 2 * halo).

    A `length` takes the place of the second: windows then reach further at their end.

    Shifts by whole blocks and concatenates: the one form that XLA partitions over devices by
    passing halos to neighbours instead of gathering everything. Zeros lie outside the image.
    """
    blocks = x.shape[axis] // block
    x = x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])
    end = block + halo if length is None else length - halo
    pieces = []
    for shift in range(-halo // block, -(-end // block)):
        # What the block `shift` places further on gives to this block's window.
        first, last = max(-halo, shift * block), min(end, (shift + 1) * block)
        piece = lax.slice_in_dim(x, first - shift * block, last - shift * block, axis=axis + 1)
        pieces.append(_shift(piece, axis, shift))
    return lax.concatenate(pieces, axis + 1)


def _shift(x: Array, axis: int, by: int) -> Array:
    """Returns y with y[i] = x[i + by] along `axis`, and zeros where there is no such i."""
    size = x.shape[axis]
    by = max(-size, min(size, by))
    kept = lax.slice_in_dim(x, max(by, 0), size + min(by, 0), axis=axis)
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (max(-by, 0), max(by, 0), 0)
    return lax.pad(kept, np.zeros((), x.dtype), padding)

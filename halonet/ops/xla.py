"""Halo attention in portable JAX."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from halonet.ops import geometry


def halo_attention_shift(
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
    """Computes all blocks at once; see `halo_attention` for the arguments."""
    n, height, width, heads, d_k = k.shape
    d_v = v.shape[-1]
    rows, cols, side, win = height // block, width // block, block // stride, block + 2 * halo
    dtype, wide = q.dtype, jnp.promote_types(q.dtype, jnp.float32)
    precision = lax.Precision.HIGHEST if dtype.itemsize >= 4 else lax.Precision.DEFAULT

    def dot(spec, a, b):
        return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=wide)

    # Letters: n image; r, c row and column of blocks; a head; y, x query; i, j key; d, e channel.
    q = q.reshape(n, rows, side, cols, side, heads, d_k) * d_k**-0.5
    index = geometry.table_index(block, halo, stride)
    row_logits = dot("nrycxad,yid->nrcayxi", q, row_table[index])
    col_logits = dot("nrycxad,xjd->nrcayxj", q, col_table[index])
    if border == "mask":
        never = jnp.finfo(dtype).min / 8
        seen = geometry.inside_image(height, block, halo)[None, :, None, None, None, None, :]
        row_logits = jnp.where(seen, row_logits, never)
        seen = geometry.inside_image(width, block, halo)[None, None, :, None, None, None, :]
        col_logits = jnp.where(seen, col_logits, never)
    q = q.transpose(0, 1, 3, 5, 2, 4, 6)
    q = jnp.concatenate([q, row_logits.astype(dtype), col_logits.astype(dtype)], -1)
    q = q.reshape(n, rows, cols, heads, side * side, d_k + 2 * win)

    kv = jnp.concatenate([k, v], -1)
    kv = _with_halo(_with_halo(kv, 1, block, halo), 3, block, halo)
    kv = kv.transpose(0, 1, 3, 5, 2, 4, 6).reshape(n, rows, cols, heads, win * win, d_k + d_v)
    position = np.concatenate([np.eye(win).repeat(win, 0), np.tile(np.eye(win), (win, 1))], -1)
    position = jnp.broadcast_to(jnp.asarray(position, dtype), (*kv.shape[:-1], 2 * win))
    k = jnp.concatenate([kv[..., :d_k], position], -1)
    logits = dot("nrcaqd,nrcakd->nrcaqk", q, k)
    weights = jax.nn.softmax(logits).astype(dtype)
    out = dot("nrcaqk,nrcake->nrcaqe", weights, kv[..., d_k:]).astype(dtype)
    out = out.reshape(n, rows, cols, heads, side, side, d_v).transpose(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(n, height // stride, width // stride, heads, d_v)


def _with_halo(x: Array, axis: int, block: int, halo: int) -> Array:
    """Splits `axis` into blocks, and each block with its halo: (blocks, block + 2 * halo).

    Shifts by whole blocks and concatenates, the one form that XLA partitions over devices by
    passing halos to neighbours instead of gathering everything. Zeros lie outside the image.
    """
    blocks = x.shape[axis] // block
    x = x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :])
    reach = -(-halo // block)
    pieces = []
    for shift in range(-reach, reach + 1):
        # The pixels that the block `shift` places further on gives to this block's window.
        first, last = max(-halo, shift * block), min(block + halo, (shift + 1) * block)
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

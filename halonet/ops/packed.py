"""Halo attention in portable JAX for TPUs, whose arrays are 128 lanes wide: heads lie side by side.

A TPU pads the last axis of every array to 128 elements. Where a head has 16 channels, seven of
eight lanes would hold nothing. So as many heads as fit share the lanes here, and one product serves
them all: the queries of each head are zero in the lanes of the others.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from halonet.ops.geometry import Spec
from halonet.ops.xla import dot, row_windows, rows_inside, with_halo

LANES = 128
# Rows of a tile in bfloat16. Windows of as many columns, or twice as many, merge with the rows of
# the window into one axis without moving data.
TILE_ROWS = 16


def halo_attention_packed(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    row_table: Float[Array, "offsets d_k"],
    col_table: Float[Array, "offsets d_k"],
    spec: Spec,
) -> Float[Array, "n h_q w_q heads d_v"]:
    """Computes all images and blocks at once, several heads a product; see `halo_attention`."""
    n, height, width, heads, d_k = k.shape
    d_v, side, window = v.shape[-1], spec.side, spec.window
    rows, cols = spec.blocks
    packed = max(p for p in range(1, heads + 1) if heads % p == 0 and fits(p, max(d_k, d_v)))
    groups = heads // packed
    columns = -(-window // TILE_ROWS) * TILE_ROWS
    dtype, wide = q.dtype, jnp.promote_types(q.dtype, jnp.float32)

    # Axes: n image; r, c row and column of blocks; g group of heads, a head in it; y, x query of a
    # block; i, j key in its window; q and k the query (of some head) and the key as one flat axis
    # each; l the channels of all heads of a group; C c and g, B also a. Images and rows stay axes
    # of their own: merged, XLA would gather them to partition them. The others are merged, for
    # XLA's CPU backend crashes where arrays around a product have eight axes (jaxlib 0.10.2).
    blocks = (n, rows, cols)
    q_nrycxhd = q.reshape(n, rows, side, cols, side, heads, d_k)
    q_nrByxd = q_nrycxhd.transpose(0, 1, 3, 5, 2, 4, 6).reshape(n, rows, -1, side, side, d_k)
    scaled = q_nrByxd * d_k**-0.5
    positional = scaled if spec.scale_positions else q_nrByxd
    index = spec.table_index()
    row_logits = dot("nrByxd,yid->nrByxi", positional, row_table[index])
    col_logits = dot("nrByxd,xjd->nrByxj", positional, col_table[index])
    # Small enough to weigh nothing, and two of them still a finite number.
    nothing = jnp.finfo(dtype).min / 4
    if spec.border == "mask":
        inside = rows_inside(spec)[None, :, None, None, None]
        row_logits = jnp.where(inside, row_logits, nothing)
        inside = np.repeat(spec.inside(spec.width), heads, 0)[None, None, :, None, None]
        col_logits = jnp.where(inside, col_logits, nothing)
    # The columns beyond the window are nothing, too.
    beyond = [(0, 0)] * 5 + [(0, columns - window)]
    col_logits = jnp.pad(col_logits, beyond, constant_values=nothing)

    # Position logits enter through the product, as in `halonet.ops.xla`.
    q_nrycxgl = (q * d_k**-0.5).reshape(n, rows, side, cols, side, groups, packed * d_k)
    q_nrcgyxl = q_nrycxgl.transpose(0, 1, 3, 5, 2, 4, 6)
    q_nrCaql = q_nrcgyxl.reshape(n, rows, -1, 1, side * side, packed * d_k)
    q_nrCaql = q_nrCaql * _lanes_of_heads(packed, d_k, dtype)
    positions = jnp.concatenate([row_logits, col_logits], -1).astype(dtype)
    flat = (*blocks, groups, packed * side * side)
    q_nrcgql = jnp.concatenate([q_nrCaql.reshape(*flat, -1), positions.reshape(*flat, -1)], -1)

    def windows(x: Float[Array, "n h w heads d"]) -> Float[Array, "n r c g keys lanes"]:
        x = x.reshape(n, height, width, -1)
        x = row_windows(x, spec)
        x = with_halo(x, 3, spec.block, spec.halo, columns)
        x_nrcijl = x.transpose(0, 1, 3, 2, 4, 5)
        x = x_nrcijl.reshape(*blocks, window * columns, groups, -1)
        return x.transpose(0, 1, 2, 4, 3, 5)

    k_nrcgkl, v_nrcgkl = windows(k), windows(v)
    picks = np.concatenate(
        [np.repeat(np.eye(window), columns, 0), np.tile(np.eye(columns), (window, 1))], -1
    )
    picks = jnp.broadcast_to(jnp.asarray(picks, dtype), (*k_nrcgkl.shape[:4], *picks.shape))
    k_nrcgkl = jnp.concatenate([k_nrcgkl, picks], -1)
    logits_nrcgqk = dot("nrcgql,nrcgkl->nrcgqk", q_nrcgql, k_nrcgkl)

    # As in `halonet.ops.xla`: divided after the second product, and the largest logit cancels.
    largest = lax.stop_gradient(logits_nrcgqk.max(-1, keepdims=True))
    weights_nrcgqk = jnp.exp(logits_nrcgqk - largest)
    total = weights_nrcgqk.sum(-1, keepdims=True)
    out_nrcgql = dot("nrcgqk,nrcgkl->nrcgql", weights_nrcgqk.astype(dtype), v_nrcgkl) / total
    # Each head keeps what its weights made of its own values.
    out_nrCaql = out_nrcgql.reshape(n, rows, -1, packed, side * side, packed * d_v)
    out_nrCql = (out_nrCaql * _lanes_of_heads(packed, d_v, wide)).sum(3).astype(dtype)
    out_nrcgyxl = out_nrCql.reshape(*blocks, groups, side, side, packed * d_v)
    return out_nrcgyxl.transpose(0, 1, 4, 2, 5, 3, 6).reshape(*q.shape[:-1], d_v)


def fits(heads: int, channels: int) -> bool:
    """Whether so many heads of so many channels share the lanes; one always does."""
    return heads == 1 or heads * channels <= LANES


def _lanes_of_heads(
    heads: int, channels: int, dtype: jax.typing.DTypeLike
) -> Float[Array, "1 1 1 heads 1 lanes"]:
    """One in the lanes that belong to a head, zero in those of the others."""
    own = np.kron(np.eye(heads), np.ones(channels))
    return jnp.asarray(own[None, None, None, :, None], dtype)

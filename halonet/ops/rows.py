"""Halo attention for a CPU: a few rows of blocks at a time, with a backward pass of its own.

Logits exist for so many blocks only as stay in the cache, in either pass. Of the forward pass the
backward one keeps the output and, for each query, the logarithm of its sum of weights.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from halonet.ops.geometry import Spec
from halonet.ops.xla import dot, row_windows, rows_inside, with_halo

# Logits, keys and values that exist at a time, in elements. In float32 these are 2.5 MiB, about the
# second-level caches of two cores; times change by a tenth between half and twice as many.
ELEMENTS_PER_STEP = 5 * 2**17

# Axes: n image; r, c row and column of blocks; a head; b one head of one block; y, x query in its
# block; i, j key in its window; d channel; q and k the query and the key as one flat axis each.
# Queries are the last axis of all that is large: position logits are added along whole vectors,
# sums over keys add vectors, and no product transposes more than queries or outputs.


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def halo_attention_rows(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    row_table: Float[Array, "offsets d_k"],
    col_table: Float[Array, "offsets d_k"],
    spec: Spec,
) -> Float[Array, "n h_q w_q heads d_v"]:
    """Computes a few images, or a few rows of blocks, at a time; see `halo_attention`.

    The loop runs over the batch: on several devices that share the batch, it would gather it.
    Reverse-mode derivatives of first order only; "xla_shift" has all.
    """
    return _forward(q, k, v, row_table, col_table, spec)[0]


def _forward(q, k, v, row_table, col_table, spec):
    few_images = partial(_attend, row_table=row_table, col_table=col_table, spec=spec)
    out, log_total = _map(few_images, (q, k, v), _steps(k, v, spec)[0])
    return out, (q, k, v, row_table, col_table, out, log_total)


def _backward(spec, residuals, d_out):
    q, k, v, row_table, col_table, out, log_total = residuals
    few_images = partial(_attend_vjp, row_table=row_table, col_table=col_table, spec=spec)
    arrays = (q, k, v, out, d_out, log_total)
    d_q, d_k, d_v, *d_tables = _map(few_images, arrays, _steps(k, v, spec)[0])
    return d_q, d_k, d_v, *(d.sum(0).astype(q.dtype) for d in d_tables)


halo_attention_rows.defvjp(_forward, _backward)


def _attend(arrays, *, row_table, col_table, spec):
    """Returns the output for a few images, and of each query log(sum(exp(logits)))."""
    q, k, v = arrays
    heads, scale = k.shape[3], k.shape[-1] ** -0.5
    positions = _position_logits(q, row_table, col_table, spec)

    def few_rows(arrays):
        q_bdq, k_riwad, v_riwad, row_biq, col_bjq = arrays
        k_bkd, v_bkd = _windows(k_riwad, spec), _windows(v_riwad, spec)
        logits_bijq = _logits(q_bdq, k_bkd, row_biq, col_bjq)
        largest_bq = logits_bijq.max((1, 2))
        weights_bijq = jnp.exp(logits_bijq - largest_bq[:, None, None])
        total_bq = weights_bijq.sum((1, 2))
        weights_bkq = weights_bijq.astype(v.dtype).reshape(*v_bkd.shape[:2], -1)
        # Divided after the product, where there is less to divide.
        out_bdq = dot("bkd,bkq->bdq", v_bkd, weights_bkq) / total_bq[:, None]
        return _joined(out_bdq.astype(v.dtype), heads, spec), largest_bq + jnp.log(total_bq)

    arrays = (_blocks(q, spec) * scale, _rows(k, spec), _rows(v, spec), *positions)
    out, log_total = _map(few_rows, arrays, _steps(k, v, spec)[1])
    return out.reshape(*q.shape[:-1], v.shape[-1]), log_total


def _attend_vjp(arrays, *, row_table, col_table, spec):
    """Returns the derivatives for a few images: of q, k, v and, with an axis before, the tables."""
    q, k, v, out, d_out, log_total = arrays
    heads, scale, wide = k.shape[3], k.shape[-1] ** -0.5, log_total.dtype
    position_logits = partial(_position_logits, spec=spec)
    positions, positions_vjp = jax.vjp(position_logits, q, row_table, col_table)
    (k_riwad, v_riwad), rows_vjp = jax.vjp(lambda k, v: (_rows(k, spec), _rows(v, spec)), k, v)
    # What each weight's derivative loses because the weights sum to one.
    shared = (out.astype(wide) * d_out.astype(wide)).sum(-1, keepdims=True)

    def few_rows(arrays):
        q_bdq, k_riwad, v_riwad, row_biq, col_bjq, d_out_bdq, shared_b1q, log_total_bq = arrays
        (k_bkd, v_bkd), windows_vjp = jax.vjp(
            lambda k, v: (_windows(k, spec), _windows(v, spec)), k_riwad, v_riwad
        )
        logits_bijq = _logits(q_bdq, k_bkd, row_biq, col_bjq)
        weights_bijq = jnp.exp(logits_bijq - log_total_bq[:, None, None])
        d_weights_bijq = dot("bkd,bdq->bkq", v_bkd, d_out_bdq).reshape(weights_bijq.shape)
        d_logits_bijq = weights_bijq * (d_weights_bijq - shared_b1q[:, None])
        d_row_biq, d_col_bjq = d_logits_bijq.sum(2), d_logits_bijq.sum(1)

        flat = (*k_bkd.shape[:2], -1)
        weights_bkq = weights_bijq.astype(q.dtype).reshape(flat)
        d_logits_bkq = d_logits_bijq.astype(q.dtype).reshape(flat)
        d_v_bkd = dot("bkq,bqd->bkd", weights_bkq, d_out_bdq.swapaxes(1, 2)).astype(q.dtype)
        d_k_bkd = dot("bkq,bqd->bkd", d_logits_bkq, q_bdq.swapaxes(1, 2)).astype(q.dtype)
        d_q_bdq = dot("bkd,bkq->bdq", k_bkd, d_logits_bkq) * scale
        d_q = _joined(d_q_bdq.astype(q.dtype), heads, spec)
        return d_q, *windows_vjp((d_k_bkd, d_v_bkd)), d_row_biq, d_col_bjq

    arrays = (_blocks(q, spec) * scale, k_riwad, v_riwad, *positions)
    arrays = (*arrays, _blocks(d_out, spec), _blocks(shared, spec), log_total)
    d_q, d_k, d_v, *d_positions = _map(few_rows, arrays, _steps(k, v, spec)[1])
    by_positions, *d_tables = positions_vjp(tuple(d_positions))
    d_q = d_q.reshape(q.shape) + by_positions
    return d_q, *rows_vjp((d_k, d_v)), *(d[None].astype(wide) for d in d_tables)


def _position_logits(
    q: Float[Array, "n h_q w_q heads d"],
    row_table: Float[Array, "offsets d"],
    col_table: Float[Array, "offsets d"],
    spec: Spec,
) -> tuple[Float[Array, "b window queries"], Float[Array, "b window queries"]]:
    """Computes for every query what each row and each column of its window adds to its logits.

    For a few images at once: made where they are used, XLA would not write them down but look each
    one up, against the order of memory, several times.
    """
    q_bdyx = _blocks(q, spec).reshape(-1, q.shape[-1], spec.side, spec.side)
    if spec.scale_positions:
        q_bdyx = q_bdyx * q.shape[-1] ** -0.5
    index = spec.table_index()
    row_biyx = dot("bdyx,yid->biyx", q_bdyx, row_table[index])
    col_bjyx = dot("bdyx,xjd->bjyx", q_bdyx, col_table[index])
    if spec.border == "mask":
        # Small enough to weigh nothing, and two of them still a finite number.
        nothing = jnp.finfo(row_biyx.dtype).min / 4
        of_block = (q.shape[0], *spec.blocks, q.shape[3], *row_biyx.shape[1:])  # n r c a window y x
        inside = rows_inside(spec)[:, None, None, :, None, None]
        row_biyx = jnp.where(inside, row_biyx.reshape(of_block), nothing)
        inside = spec.inside(spec.width)[:, None, :, None, None]
        col_bjyx = jnp.where(inside, col_bjyx.reshape(of_block), nothing)
    shape = (q_bdyx.shape[0], spec.window, spec.side**2)
    return row_biyx.reshape(shape), col_bjyx.reshape(shape)


def _logits(
    q: Float[Array, "b d queries"],
    k: Float[Array, "b keys d"],
    row_logits: Float[Array, "b window queries"],
    col_logits: Float[Array, "b window queries"],
) -> Float[Array, "b window window queries"]:
    """Sums what keys, rows and columns of the window say to each query."""
    window, queries = row_logits.shape[1:]
    content = dot("bkd,bdq->bkq", k, q).reshape(-1, window, window, queries)
    return content + row_logits[:, :, None] + col_logits[:, None]


def _rows(x: Float[Array, "n h w heads d"], spec: Spec) -> Float[Array, "r window w heads d"]:
    """Cuts images into rows of blocks, each with its halo above and below."""
    x = row_windows(x, spec)
    return x.reshape(-1, *x.shape[2:])


def _windows(x: Float[Array, "r window w heads d"], spec: Spec) -> Float[Array, "b keys d"]:
    """Cuts rows of blocks into the windows of the blocks, one for each head."""
    x_ricjad = with_halo(x, 2, spec.block, spec.halo)
    return x_ricjad.transpose(0, 2, 4, 1, 3, 5).reshape(-1, spec.window**2, x.shape[-1])


def _blocks(x: Float[Array, "n h_q w_q heads d"], spec: Spec) -> Float[Array, "b d queries"]:
    """Cuts queries, or what there is of each, into blocks, one for each head."""
    (rows, cols), side, (*_, heads, d) = spec.blocks, spec.side, x.shape
    x_nrycxad = x.reshape(-1, rows, side, cols, side, heads, d)
    return x_nrycxad.transpose(0, 1, 3, 5, 6, 2, 4).reshape(-1, d, side**2)


def _joined(
    x: Float[Array, "b d queries"], heads: int, spec: Spec
) -> Float[Array, "r side w_q heads d"]:
    """Puts blocks together again, to rows of them."""
    side, cols, d = spec.side, spec.blocks[1], x.shape[1]
    x_rcadyx = x.reshape(-1, cols, heads, d, side, side)
    return x_rcadyx.transpose(0, 4, 1, 5, 2, 3).reshape(-1, side, cols * side, heads, d)


def _steps(
    k: Float[Array, "n h w heads d_k"], v: Float[Array, "n h w heads d_v"], spec: Spec
) -> tuple[int, int]:
    """Returns in how many steps to go through the images, and through the rows of one such step."""
    images, (rows, cols) = k.shape[0], spec.blocks
    keys = cols * k.shape[3] * spec.window**2  # of a row of blocks
    fitting = ELEMENTS_PER_STEP // (keys * (spec.side**2 + k.shape[-1] + v.shape[-1]))  # rows
    if rows <= fitting:
        return images // _divisor(images, fitting // rows), 1
    return images, rows // _divisor(rows, fitting)


def _divisor(n: int, most: int) -> int:
    """Returns the largest divisor of `n` that is at most `most`, or 1."""
    return next(d for d in range(max(1, min(n, most)), 0, -1) if n % d == 0)


def _map(function: Callable, arrays: tuple[Array, ...], steps: int) -> tuple[Array, ...]:
    """Applies `function` to each of `steps` equal parts of the arrays' first axes, one by one."""
    if steps == 1:
        return function(arrays)
    parts = [x.reshape(steps, -1, *x.shape[1:]) for x in arrays]
    return tuple(x.reshape(-1, *x.shape[2:]) for x in lax.map(function, parts))

"""Halo attention as one fused TPU kernel, forward and backward.

A grid step computes a row of blocks, a "strip", of one image. It is given the strip's keys and
values and those of the strips above and below, and puts the window of each block together in
registers: neither haloed copies nor logits exist in HBM. What happens inside a step is written in
`pallas_tpu_kernels`; here is what goes in and comes out.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from halonet.ops.geometry import Spec
from halonet.ops.pallas_tpu_kernels import SUBLANES, Layout, backward_kernel, forward_kernel
from halonet.ops.spatial import ROWS

VMEM = 12 * 2**20  # bytes to plan with: v4 has 16 MiB, and the compiler needs some for itself


def halo_attention_pallas_tpu(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    row_table: Float[Array, "offsets d_k"],
    col_table: Float[Array, "offsets d_k"],
    spec: Spec,
) -> Float[Array, "n h_q w_q heads d_v"]:
    """Computes halo attention in a fused kernel; see `halo_attention` for the arguments.

    Where there is no TPU the kernel is interpreted: right, and slow.

    Raises:
      NotImplementedError: what the kernel has no code for, naming a form that has.
    """
    reason = unsupported(spec, k, v)
    if reason:
        raise NotImplementedError(f"pallas_tpu has no {reason}; implementation='xla_packed' has")
    return _attend_in_groups(spec, q, k, v, row_table, col_table)


def unsupported(spec: Spec, k: Array, v: Array) -> str:
    """Names what a call needs and the kernel does not have, or returns ""."""
    if spec.positions != "exact":
        return f"{spec.positions} positions"
    if not spec.scale_positions:
        return "unscaled positions"
    if spec.halo > spec.block:
        return f"halo {spec.halo} wider than block {spec.block}"
    if k.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{k.dtype}"
    if Layout.of(spec, k, v, heads=1).vmem > VMEM:
        return f"room for rows of {k.shape[2] // spec.block} blocks of {spec.block}"
    return ""


def _attend_in_groups(spec, q, k, v, row_table, col_table):
    """Computes so many heads at a time as VMEM has room for: all of them but in H5 to H7."""
    n, *_, heads, _ = k.shape
    sizes = [size for size in range(1, heads + 1) if heads % size == 0]
    size = max(size for size in sizes if Layout.of(spec, k, v, heads=size).vmem <= VMEM)

    def images(x: Float[Array, "n h w heads d"]) -> Float[Array, "images h w size d"]:
        x = x.reshape(*x.shape[:3], heads // size, size, -1)
        return jnp.moveaxis(x, 3, 1).reshape(-1, *x.shape[1:3], size, x.shape[-1])

    if size == heads:
        return _attend(spec, q, k, v, row_table, col_table)
    # Heads share nothing but the tables, so that groups of them can be further images.
    out = _attend(spec, images(q), images(k), images(v), row_table, col_table)
    out = jnp.moveaxis(out.reshape(n, heads // size, *out.shape[1:]), 1, 3)
    return out.reshape(*q.shape[:-1], v.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, k, v, row_table, col_table):
    return _attend_forward(spec, q, k, v, row_table, col_table)[0]


def _attend_forward(spec, q, k, v, row_table, col_table):
    layout = Layout.of(spec, k, v)
    arguments = (q, k, v, row_table, col_table)
    inputs = (*_to_blocks(layout, *arguments), *_first_row(layout))
    blocks, sums = _on_tpu_or_interpreted(_call_forward, layout, *inputs)
    return _join_queries(layout, blocks, v.shape[-1]), (*arguments, sums)


def _attend_backward(spec, residuals, d_out):
    q, k, v, row_table, col_table, sums = residuals
    layout = Layout.of(spec, k, v)
    inputs = (*_to_blocks(layout, q, k, v, row_table, col_table), _cut_queries(layout, d_out))
    inputs = (*inputs, sums, *_first_row(layout))
    dq, d_kv, d_tables = _on_tpu_or_interpreted(_call_backward, layout, *inputs)
    dk, dv = jnp.split(d_kv.reshape(*k.shape[:3], -1), [layout.c_k], -1)
    d_tables = d_tables.sum(0)[:, : layout.c_k].reshape(2, layout.offsets, layout.heads, -1)
    d_tables = d_tables.sum(2)[:, : row_table.shape[0]].astype(row_table.dtype)
    dq = _join_queries(layout, dq, layout.d_k)
    return dq, dk.reshape(k.shape), dv.reshape(v.shape), *d_tables


_attend.defvjp(_attend_forward, _attend_backward)


def _to_blocks(layout: Layout, q, k, v, row_table, col_table) -> tuple[Array, ...]:
    """The queries by block, keys and values side by side by column of blocks, and both tables.

    Where blocks are of whole registers nothing moves in HBM but to join keys and values, which XLA
    leaves out if they were one array. Tables are repeated for all heads.
    """
    n, height, *_ = k.shape
    kv = jnp.concatenate([x.reshape(*x.shape[:3], -1) for x in (k, v)], -1)
    kv = kv.reshape(n, height, layout.cols, layout.spec.block, layout.channels)
    padding = ((0, layout.offsets - row_table.shape[0]), (0, 0))
    tables = jnp.concatenate([jnp.pad(table, padding) for table in (row_table, col_table)])
    tables = jnp.tile(tables, (1, layout.heads))
    tables = jnp.pad(tables, ((0, 0), (0, layout.channels - layout.c_k)))
    return _cut_queries(layout, q), kv, tables


def _first_row(layout: Layout) -> list[Int[Array, " one"]]:
    """The row of blocks at which a device's part of the image begins, if it has a part."""
    if layout.spec.row_devices == 1:
        return []
    return [lax.axis_index(ROWS)[None] * layout.rows]


def _cut_queries(layout: Layout, x: Float[Array, "n h w heads d"]) -> Float[Array, "n r cols y c"]:
    """Cuts an image of queries into blocks, of `Layout.pieces` in the third last and last axes."""
    (n, *_, heads, d), side = x.shape, layout.spec.side
    if side % SUBLANES == 0:
        return x.reshape(n, -1, layout.cols, side, heads * d)
    x = x.reshape(n, layout.rows, side, layout.cols, side, heads * d).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(n, layout.rows, layout.cols, side**2, heads * d)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, layout.queries - side**2), (0, 0)))


def _join_queries(layout: Layout, x: Float[Array, "n r cols y c"], d: int) -> Array:
    """The inverse of `_cut_queries`."""
    n, side, (rows, cols) = x.shape[0], layout.spec.side, (layout.rows, layout.cols)
    if side % SUBLANES:
        x = x[:, :, :, : side**2].reshape(n, rows, cols, side, side, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * side, cols * side, layout.heads, d)


def _on_tpu_or_interpreted(call, layout: Layout, *arrays: Array):
    """Decided when the program is lowered, so that any machine can compile for a TPU."""
    return lax.platform_dependent(
        *arrays,
        tpu=functools.partial(call, layout, interpret=False),
        default=functools.partial(call, layout, interpret=True),
    )


def _call_forward(layout: Layout, q, kv, tables, *first, interpret: bool):
    """Returns the attended values, in blocks, and the logarithms of the sums of the softmax."""
    sums = (q.shape[0], layout.rows, layout.cols, len(layout.units), layout.lanes)
    out = (*q.shape[:-1], layout.channels - layout.c_k)
    return pl.pallas_call(
        functools.partial(forward_kernel, layout),
        grid=(q.shape[0], layout.rows),
        in_specs=[*_inputs(layout), *_scalars(first)],
        out_specs=[_strip_of_queries(layout, out[-1]), _strip_of_sums(layout)],
        out_shape=[jax.ShapeDtypeStruct(out, q.dtype), jax.ShapeDtypeStruct(sums, jnp.float32)],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="halo_attention_forward",
    )(q, kv, kv, kv, tables, *first)


def _call_backward(layout: Layout, q, kv, tables, d_out, sums, *first, interpret: bool):
    """Returns the gradients of q, of keys and values, and for each image those of the tables."""
    d_tables = (q.shape[0], *tables.shape)
    window_sums = (3, layout.spec.block, layout.cols, layout.window_cols, layout.channels)
    return pl.pallas_call(
        functools.partial(backward_kernel, layout),
        grid=(q.shape[0], layout.rows + 1 + layout.spec.strips),
        in_specs=[
            *_inputs(layout),
            _strip_of_queries(layout, d_out.shape[-1]),
            _strip_of_sums(layout),
            *_scalars(first),
        ],
        out_specs=[
            _strip_of_queries(layout, layout.c_k),
            _strip(layout, -1),
            pl.BlockSpec((1, *tables.shape), lambda n, i: (n, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(kv.shape, kv.dtype),
            jax.ShapeDtypeStruct(d_tables, jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM(window_sums, jnp.float32)],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="halo_attention_backward",
    )(q, kv, kv, kv, tables, d_out, sums, *first)


# What a grid step reads and writes. The backward pass has one step more than there are strips, one
# more yet where the strip below the last is a neighbour's, and so clamps to the last.


def _inputs(layout: Layout) -> list[pl.BlockSpec]:
    tables = pl.BlockSpec((2 * layout.offsets, layout.channels), lambda n, i: (0, 0))
    around = [_strip(layout, shift) for shift in (-1, 0, 1)]
    return [_strip_of_queries(layout, layout.c_k), *around, tables]


def _strip(layout: Layout, shift: int) -> pl.BlockSpec:
    """Keys and values of the strip that is `shift` below that of the step."""
    shape = (1, layout.spec.block, layout.cols, layout.spec.block, layout.channels)
    # The neighbours' strips, one above and one below, where there are any.
    shift, last = shift + layout.spec.strips, layout.rows + 2 * layout.spec.strips - 1
    return pl.BlockSpec(shape, lambda n, i: (n, jnp.clip(i + shift, 0, last), 0, 0, 0))


def _scalars(arrays: tuple[Array, ...]) -> list[pl.BlockSpec]:
    return [pl.BlockSpec(memory_space=pltpu.SMEM) for _ in arrays]


def _strip_of_queries(layout: Layout, channels: int) -> pl.BlockSpec:
    side, last = layout.spec.side, layout.rows - 1
    piece = (side, layout.cols, side) if side % SUBLANES == 0 else (1, layout.cols, layout.queries)
    return pl.BlockSpec((1, *piece, channels), lambda n, i: (n, jnp.minimum(i, last), 0, 0, 0))


def _strip_of_sums(layout: Layout) -> pl.BlockSpec:
    shape, last = (1, 1, layout.cols, len(layout.units), layout.lanes), layout.rows - 1
    return pl.BlockSpec(shape, lambda n, i: (n, jnp.minimum(i, last), 0, 0, 0))


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))

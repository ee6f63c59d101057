"""Halo attention as one fused TPU kernel, forward and backward.

A grid step computes a row of blocks, a "strip", of one image. It is given the strip's keys and
values and those of the strips above and below, and puts the window of each block together in
registers: neither haloed copies nor logits exist in HBM.

Inside, keys lie on sublanes and queries on lanes, those of a few heads side by side. The softmax
then reduces over sublanes, by adding whole registers, and a window of 14 columns costs nothing to
pad to 16. Heads are not cut apart, as 16 to 64 channels would not be aligned with the 128 lanes of
a register: a head's queries are zero in the channels of all others. The rows of the relative tables
are appended to the keys as further keys, so that one product gives content and position logits.

The backward pass computes the logits again from the saved logarithm of their sums. A window reaches
into the strips above and below, so gradients of keys and values are summed in VMEM while strips go
by from top to bottom: those of a strip are complete, and written, one step later. There are no
atomic operations, and the result does not depend on scheduling.

Each statement of the kernels is a list with an entry for each unit of heads: the compiler's
scheduler fills the waiting of one unit with the work of another only where they stand together
(half the cycles of a loop over units).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from halonet.ops.geometry import Spec

LANES, SUBLANES = 128, 8  # of a register
# Weighs nothing in a softmax, and the sum of two is finite.
NOTHING = -1e30
VMEM_LIMIT = 100 * 2**20  # bytes; the compiler's own limit of 16 MiB is too small for H5 to H7


def halo_attention_pallas_tpu(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    row_table: Float[Array, "offsets d_k"],
    col_table: Float[Array, "offsets d_k"],
    spec: Spec,
) -> Float[Array, "n h_q w_q heads d_v"]:
    """Computes halo attention in a fused kernel; see `halo_attention` for the arguments.

    Where there is no TPU the kernel is interpreted: right, and slow. Under a mesh (`jax.set_mesh`)
    the batch is split over all devices if they divide it, else each computes all of it.

    Raises:
      NotImplementedError: what the kernel has no code for, naming a form that has.
    """
    reason = unsupported(spec, q.dtype)
    if reason:
        raise NotImplementedError(f"pallas_tpu has no {reason}; implementation='xla_packed' has")
    attend = functools.partial(_attend, spec)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and not mesh.manual_axes:
        # XLA cannot partition a kernel. Images are independent, so nothing is exchanged.
        images = PartitionSpec(None if q.shape[0] % mesh.size else mesh.axis_names)
        specs = (images, images, images, PartitionSpec(), PartitionSpec())
        attend = jax.shard_map(attend, in_specs=specs, out_specs=images, check_vma=False)
    return attend(q, k, v, row_table, col_table)


def unsupported(spec: Spec, dtype: jnp.dtype) -> str:
    """Names what a call needs and the kernel does not have, or returns ""."""
    if spec.positions != "exact":
        return f"{spec.positions} positions"
    if not spec.scale_positions:
        return "unscaled positions"
    if spec.halo > spec.block:
        return f"halo {spec.halo} wider than block {spec.block}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"{dtype}"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, k, v, row_table, col_table):
    return _attend_forward(spec, q, k, v, row_table, col_table)[0]


def _attend_forward(spec, q, k, v, row_table, col_table):
    arguments = (q, k, v, row_table, col_table)
    layout = Layout.of(spec, k, v)
    out, sums = _on_tpu_or_interpreted(_call_forward, layout, *_to_blocks(layout, *arguments))
    return out.reshape(*q.shape[:-1], v.shape[-1]), (*arguments, sums)


def _attend_backward(spec, residuals, d_out):
    *arguments, sums = residuals
    layout = Layout.of(spec, *arguments[1:3])
    d_out = d_out.reshape(layout.block_shape(d_out, spec.side))
    blocks = _to_blocks(layout, *arguments)
    *gradients, d_tables = _on_tpu_or_interpreted(_call_backward, layout, *blocks, d_out, sums)
    gradients = [x.reshape(like.shape) for x, like in zip(gradients, arguments[:3], strict=True)]
    table = arguments[3]
    d_tables = d_tables.reshape(-1, 2, layout.offsets, layout.heads, layout.d_k).sum((0, 3))
    return (*gradients, *d_tables[:, : table.shape[0]].astype(table.dtype))


_attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes that the kernels work with; `rows` and `cols` count blocks."""

    spec: Spec
    rows: int
    cols: int
    heads: int
    d_k: int
    d_v: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, spec: Spec, k: Array, v: Array) -> Layout:
        _, height, width, heads, d_k = k.shape
        rows, cols = height // spec.block, width // spec.block
        return cls(spec, rows, cols, heads, d_k, v.shape[-1], k.dtype)

    @property
    def queries(self) -> int:
        """Of a block and a head, padded to whole registers."""
        return _round_up(self.spec.side**2, SUBLANES)

    @property
    def window_cols(self) -> int:
        """Columns of a window, padded to whole registers."""
        return _round_up(self.spec.window, SUBLANES)

    @property
    def offsets(self) -> int:
        """Rows of a relative table, padded to whole registers."""
        return _round_up(2 * (self.spec.block + self.spec.halo) - 1, SUBLANES)

    @property
    def units(self) -> list[range]:
        """Heads that share matrix products: as many as fill the lanes with their queries."""
        fitting = max(1, LANES // self.queries)
        size = math.gcd(self.heads, 2 ** (fitting.bit_length() - 1))
        return [range(head, head + size) for head in range(0, self.heads, size)]

    @property
    def lanes(self) -> int:
        """Queries of a unit."""
        return len(self.units[0]) * self.queries

    def channels(self, d: int) -> list[slice]:
        """Of each unit, the whole registers that hold the `d` channels of its heads."""
        starts = [unit.start * d // LANES * LANES for unit in self.units]
        stops = [min(_round_up(unit.stop * d, LANES), self.heads * d) for unit in self.units]
        return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]

    def block_shape(self, x: Array, side: int) -> tuple[int, ...]:
        n, height, _, heads, d = x.shape
        return n, height, self.cols, side, heads * d


def _to_blocks(layout: Layout, q, k, v, row_table, col_table) -> tuple[Array, ...]:
    """Cuts columns into blocks, (n, h, w, heads, d) to (n, h, cols, side, channels).

    Nothing moves in HBM where blocks are of whole registers. The tables become one, each padded to
    whole registers and repeated for all heads.
    """
    sides = (layout.spec.side, layout.spec.block, layout.spec.block)
    images = [
        x.reshape(layout.block_shape(x, side)) for x, side in zip((q, k, v), sides, strict=True)
    ]
    padding = ((0, layout.offsets - row_table.shape[0]), (0, 0))
    tables = jnp.concatenate([jnp.pad(table, padding) for table in (row_table, col_table)])
    return (*images, jnp.tile(tables, (1, layout.heads)))


def _on_tpu_or_interpreted(call, layout: Layout, *arrays: Array):
    """Decided when the program is lowered, so that any machine can compile for a TPU."""
    return lax.platform_dependent(
        *arrays,
        tpu=functools.partial(call, layout, interpret=False),
        default=functools.partial(call, layout, interpret=True),
    )


def _call_forward(layout: Layout, q, k, v, tables, *, interpret: bool):
    """Returns the attended values, in blocks, and the logarithms of the sums of the softmax."""
    n, side, (c_k, c_v) = q.shape[0], layout.spec.side, (k.shape[-1], v.shape[-1])
    sums = (n, layout.rows, layout.cols, len(layout.units), layout.lanes)
    return pl.pallas_call(
        functools.partial(_forward_kernel, layout),
        grid=(n, layout.rows),
        in_specs=_inputs(layout, c_k, c_v),
        out_specs=[_strip(layout, side, c_v), _strip_of_sums(layout)],
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:-1], c_v), q.dtype),
            jax.ShapeDtypeStruct(sums, jnp.float32),
        ],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="halo_attention_forward",
    )(q, *[k] * 3, *[v] * 3, tables)


def _call_backward(layout: Layout, q, k, v, tables, d_out, sums, *, interpret: bool):
    """Returns the gradients of q, k and v, in blocks, and those of the tables for each image."""
    n, (c_k, c_v), spec = q.shape[0], (k.shape[-1], v.shape[-1]), layout.spec
    of_tables = pl.BlockSpec((1, *tables.shape), lambda n, i: (n, 0, 0))
    window_sums = (2 * spec.block + spec.halo, layout.cols, layout.window_cols)
    return pl.pallas_call(
        functools.partial(_backward_kernel, layout),
        grid=(n, layout.rows + 1),
        in_specs=[
            *_inputs(layout, c_k, c_v),
            _strip(layout, spec.side, c_v),
            _strip_of_sums(layout),
        ],
        out_specs=[
            _strip(layout, spec.side, c_k),
            _strip(layout, spec.block, c_k, late=True),
            _strip(layout, spec.block, c_v, late=True),
            of_tables,
        ],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
            jax.ShapeDtypeStruct((n, *tables.shape), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((*window_sums, c), jnp.float32) for c in (c_k, c_v)],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="halo_attention_backward",
    )(q, *[k] * 3, *[v] * 3, tables, d_out, sums)


def _inputs(layout: Layout, c_k: int, c_v: int) -> list[pl.BlockSpec]:
    """Queries, keys and values with their neighbours, tables."""
    tables = pl.BlockSpec((2 * layout.offsets, c_k), lambda n, i: (0, 0))
    around = [
        _strip(layout, layout.spec.block, c, shift) for c in (c_k, c_v) for shift in (-1, 0, 1)
    ]
    return [_strip(layout, layout.spec.side, c_k), *around, tables]


def _strip(layout: Layout, side: int, c: int, shift: int = 0, late: bool = False) -> pl.BlockSpec:
    """A strip of an image: that of the grid step, one `shift` further on, or that of the last step.

    The backward pass has one step more than there are strips; all clamp to those that there are.
    """
    last = layout.rows - 1

    def index(n, i):
        i = jnp.maximum(i - 1, 0) if late else jnp.minimum(i, last)
        return n, jnp.clip(i + shift, 0, last), 0, 0, 0

    return pl.BlockSpec((1, side, layout.cols, side, c), index)


def _strip_of_sums(layout: Layout) -> pl.BlockSpec:
    shape, last = (1, 1, layout.cols, len(layout.units), layout.lanes), layout.rows - 1
    return pl.BlockSpec(shape, lambda n, i: (n, jnp.minimum(i, last), 0, 0, 0))


def _compiler_params() -> pltpu.CompilerParams:
    order = ("parallel", "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_LIMIT)


def _forward_kernel(layout: Layout, q_ref, *refs):
    k_refs, v_refs, (tables_ref, out_ref, sums_ref) = refs[:3], refs[3:6], refs[6:]
    k_channels, v_channels = layout.channels(layout.d_k), layout.channels(layout.d_v)
    strip = pl.program_id(1)

    @_for_each_block(layout)
    def _(col):
        k_window = jnp.concatenate([tables_ref[...], _window(layout, k_refs, strip, col)])
        v_window = _window(layout, v_refs, strip, col)
        queries = _read_rows(layout, q_ref, col) * layout.d_k**-0.5
        q_units = _to_units(layout, queries, layout.d_k)
        products = [
            _dot(layout, k_window[:, c], q, 1, 1) for c, q in zip(k_channels, q_units, strict=True)
        ]
        logits = [_to_logits(layout, x, strip, col) for x in products]
        largest = [x.max(0, keepdims=True) for x in logits]
        weights = [jnp.exp(x - m) for x, m in zip(logits, largest, strict=True)]
        totals = [x.sum(0, keepdims=True) for x in weights]
        attended = [
            _dot(layout, v_window[:, c], w, 0, 0) * (1 / t)
            for c, w, t in zip(v_channels, weights, totals, strict=True)
        ]
        _write_rows(layout, out_ref, col, _from_units(layout, attended, layout.d_v))
        for unit, (m, t) in enumerate(zip(largest, totals, strict=True)):
            sums_ref[0, 0, col, unit, :] = (m + jnp.log(t))[0]


def _backward_kernel(layout: Layout, q_ref, *refs):
    k_refs, v_refs, (tables_ref, d_out_ref, sums_ref, *refs) = refs[:3], refs[3:6], refs[6:]
    dq_ref, dk_ref, dv_ref, d_tables_ref, dk_sums, dv_sums = refs
    k_channels, v_channels = layout.channels(layout.d_k), layout.channels(layout.d_v)
    spec, strip, tables = layout.spec, pl.program_id(1), 2 * layout.offsets
    # The sums begin with the strip before; its upper rows are in no window of this one.
    window_rows = slice(spec.block - spec.halo, 2 * spec.block + spec.halo)
    window = (spec.window, layout.window_cols, -1)

    @pl.when(strip == 0)
    def _():
        for ref in (dk_sums, dv_sums, d_tables_ref):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(strip < layout.rows)
    def _():
        @_for_each_block(layout)
        def _(col):
            k_window = jnp.concatenate([tables_ref[...], _window(layout, k_refs, strip, col)])
            v_window = _window(layout, v_refs, strip, col)
            queries = _read_rows(layout, q_ref, col) * layout.d_k**-0.5
            q_units = _to_units(layout, queries, layout.d_k)
            d_units = _to_units(layout, _read_rows(layout, d_out_ref, col), layout.d_v)
            products = [
                _dot(layout, k_window[:, c], q, 1, 1)
                for c, q in zip(k_channels, q_units, strict=True)
            ]
            d_weights = [
                _dot(layout, v_window[:, c], d, 1, 1)
                for c, d in zip(v_channels, d_units, strict=True)
            ]
            logits = [_to_logits(layout, x, strip, col) for x in products]
            weights = [
                jnp.exp(x - sums_ref[0, 0, col, unit, :][None]) for unit, x in enumerate(logits)
            ]
            shares = [w * d for w, d in zip(weights, d_weights, strict=True)]
            d_logits = [
                x - w * x.sum(0, keepdims=True) for x, w in zip(shares, weights, strict=True)
            ]
            for c, w, d in zip(v_channels, weights, d_units, strict=True):
                dv_sums[window_rows, col, :, c] += _dot(layout, w, d, 1, 0).reshape(window)
            d_products = [_to_products(layout, x) for x in d_logits]
            d_queries = []
            for c, x, q in zip(k_channels, d_products, q_units, strict=True):
                d_keys = _dot(layout, x, q, 1, 0)
                d_tables_ref[0, :, c] += d_keys[:tables]
                dk_sums[window_rows, col, :, c] += d_keys[tables:].reshape(window)
                d_queries.append(_dot(layout, k_window[:, c], x, 0, 0))
            dq = _from_units(layout, d_queries, layout.d_k) * layout.d_k**-0.5
            _write_rows(layout, dq_ref, col, dq)

    for sums, ref in ((dk_sums, dk_ref), (dv_sums, dv_ref)):

        @pl.loop(0, layout.cols)
        def _(col, sums=sums, ref=ref):
            ref[0, :, col] = _from_windows(layout, sums, col).astype(ref.dtype)

        # The next strip is the one before from now on.
        sums[: spec.block + spec.halo] = sums[spec.block :]
        sums[spec.block + spec.halo :] = jnp.zeros((spec.block, *sums.shape[1:]), jnp.float32)


def _for_each_block(layout: Layout):
    """A loop over the blocks of a strip, two at a time: more for the scheduler to choose from."""
    return pl.loop(0, layout.cols, unroll=2 if layout.cols % 2 == 0 else 1)


def _window(layout: Layout, refs, strip, col) -> Float[Array, "keys c"]:
    """The window of a block, with zeros outside the image and in the padding."""
    block, halo, last = layout.spec.block, layout.spec.halo, (layout.rows - 1, layout.cols - 1)
    above, here, below = refs

    def column(col):
        """A block's rows with those above and below; float32, which moves freely over sublanes."""
        rows = here[0, :, col].astype(jnp.float32)
        if not halo:
            return rows
        before = above[0, block - halo :, col].astype(jnp.float32)
        after = below[0, :halo, col].astype(jnp.float32)
        before = jnp.where(strip > 0, before, 0.0)
        return jnp.concatenate([before, rows, jnp.where(strip < last[0], after, 0.0)])

    parts = [column(col)]
    if halo:
        before = column(jnp.maximum(col - 1, 0))[:, block - halo :]
        after = column(jnp.minimum(col + 1, last[1]))[:, :halo]
        parts = [jnp.where(col > 0, before, 0.0), *parts, jnp.where(col < last[1], after, 0.0)]
    if layout.window_cols > layout.spec.window:
        shape = (layout.spec.window, layout.window_cols - layout.spec.window, here.shape[-1])
        parts.append(jnp.zeros(shape, jnp.float32))
    return jnp.concatenate(parts, 1).reshape(-1, here.shape[-1]).astype(layout.dtype)


def _from_windows(layout: Layout, sums, col) -> Float[Array, "block block2 c"]:
    """Adds up what the windows of a block and of those beside it hold for its pixels."""
    block, halo, last = layout.spec.block, layout.spec.halo, layout.cols - 1
    total = sums[:block, col, halo : halo + block, :]
    if not halo:
        return total
    left = sums[:block, jnp.maximum(col - 1, 0), halo + block : block + 2 * halo, :]
    right = sums[:block, jnp.minimum(col + 1, last), :halo, :]
    between = jnp.zeros((block, block - halo, total.shape[-1]), jnp.float32)
    total += jnp.concatenate([jnp.where(col > 0, left, 0.0), between], 1)
    return total + jnp.concatenate([between, jnp.where(col < last, right, 0.0)], 1)


def _read_rows(layout: Layout, ref, col) -> Float[Array, "queries c"]:
    """The queries of a block one below the other, padded with zeros."""
    rows = [ref[0, row, col].astype(jnp.float32) for row in range(layout.spec.side)]
    padding = layout.queries - layout.spec.side**2
    if padding:
        rows.append(jnp.zeros((padding, ref.shape[-1]), jnp.float32))
    return jnp.concatenate(rows)


def _write_rows(layout: Layout, ref, col, rows: Float[Array, "queries c"]) -> None:
    """The inverse of `_read_rows`."""
    side = layout.spec.side
    for row in range(side):
        ref[0, row, col] = rows[row * side : (row + 1) * side].astype(ref.dtype)


def _to_units(layout: Layout, rows: Float[Array, "queries c"], d: int) -> list[Array]:
    """Of each unit: its registers of `rows`, once for each head, zero in the channels of others."""
    return [
        jnp.concatenate(
            [jnp.where(_is_of_head(head, d, c), rows[:, c], 0.0) for head in unit]
        ).astype(layout.dtype)
        for unit, c in zip(layout.units, layout.channels(d), strict=True)
    ]


def _from_units(layout: Layout, units: list[Array], d: int) -> Float[Array, "queries c"]:
    """The adjoint of `_to_units`, of arrays (channels, lanes)."""
    registers: dict[int, Array] = {}
    for x, unit, c in zip(units, layout.units, layout.channels(d), strict=True):
        heads = jnp.split(x.T, len(unit))
        rows = sum(
            jnp.where(_is_of_head(head, d, c), y, 0.0) for head, y in zip(unit, heads, strict=True)
        )
        for start in range(c.start, c.stop, LANES):
            part = rows[:, start - c.start : min(start + LANES, c.stop) - c.start]
            registers[start] = registers[start] + part if start in registers else part
    return jnp.concatenate([registers[start] for start in sorted(registers)], 1)


def _is_of_head(head: int, d: int, channels: slice) -> Bool[Array, "1 c"]:
    shape = (1, channels.stop - channels.start)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1) + channels.start
    return (channel >= head * d) & (channel < (head + 1) * d)


def _to_logits(
    layout: Layout, products: Float[Array, "products lanes"], strip, col
) -> Float[Array, "keys lanes"]:
    """The sum of content and position logits, `NOTHING` in the padding and under a mask."""
    spec = layout.spec
    row, column, content = jnp.split(products, [layout.offsets, 2 * layout.offsets])
    row, column = _by_offset_to_by_key(layout, row, 0), _by_offset_to_by_key(layout, column, 1)
    if spec.border == "mask":
        row = jnp.where(_inside(spec, strip, spec.height), row, NOTHING)
        column = jnp.where(_inside(spec, col, spec.width), column, NOTHING)
    padding = layout.window_cols - spec.window
    if padding:
        nothing = jnp.full((padding, layout.lanes), NOTHING, jnp.float32)
        column = jnp.concatenate([column, nothing])
    content = content.reshape(spec.window, layout.window_cols, layout.lanes)
    return (content + row[:, None] + column[None]).reshape(-1, layout.lanes)


def _to_products(
    layout: Layout, d_logits: Float[Array, "keys lanes"]
) -> Float[Array, "products lanes"]:
    """The adjoint of `_to_logits`."""
    window = layout.spec.window
    by_key = d_logits.reshape(window, layout.window_cols, layout.lanes)
    row = _by_key_to_by_offset(layout, by_key.sum(1), 0)
    column = _by_key_to_by_offset(layout, by_key.sum(0)[:window], 1)
    return jnp.concatenate([row, column, d_logits]).astype(layout.dtype)


def _inside(spec: Spec, number, size: int) -> Bool[Array, "window 1"]:
    """Which pixels of the window of a block lie in the image, along one axis."""
    pixel = lax.broadcasted_iota(jnp.int32, (spec.window, 1), 0) + number * spec.block - spec.halo
    return (pixel >= 0) & (pixel < size)


def _by_offset_to_by_key(
    layout: Layout, x: Float[Array, "offsets lanes"], axis: int
) -> Float[Array, "window lanes"]:
    """Moves each lane by the position of its query: key j of query i has offset j - stride * i."""
    position, out = _position(layout, axis), None
    for query, first in enumerate(_first_offsets(layout.spec)):
        moved = x[first : first + layout.spec.window]
        out = moved if out is None else jnp.where(position == query, moved, out)
    return out


def _by_key_to_by_offset(
    layout: Layout, x: Float[Array, "window lanes"], axis: int
) -> Float[Array, "offsets lanes"]:
    """The adjoint of `_by_offset_to_by_key`."""
    position, out = _position(layout, axis), jnp.zeros((layout.offsets, layout.lanes), jnp.float32)
    for query, first in enumerate(_first_offsets(layout.spec)):
        ends = (first, layout.offsets - first - layout.spec.window)
        above, below = (jnp.zeros((rows, layout.lanes), jnp.float32) for rows in ends)
        parts = [part for part in (above, x, below) if part.shape[0]]
        out = jnp.where(position == query, jnp.concatenate(parts), out)
    return out


def _first_offsets(spec: Spec) -> list[int]:
    """Of each query along one axis, the table row of the window's first key."""
    return spec.table_index()[:, 0].tolist()


def _position(layout: Layout, axis: int) -> Int[Array, "1 lanes"]:
    """Of the query in each lane, its row or column in the block."""
    query = lax.broadcasted_iota(jnp.int32, (1, layout.lanes), 1) % layout.queries
    return query // layout.spec.side if axis == 0 else query % layout.spec.side


def _dot(layout: Layout, a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contracts two axes, in the dtype of the images and with sums in float32."""
    # The default would multiply float32 as bfloat16.
    exact = layout.dtype == jnp.float32
    return lax.dot_general(
        a.astype(layout.dtype),
        b.astype(layout.dtype),
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

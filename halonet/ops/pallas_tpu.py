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
from jaxtyping import Array, Bool, Float

from halonet.ops.geometry import Spec

LANES, SUBLANES = 128, 8  # of a register
# Weighs nothing in a softmax, and the sum of two is finite.
NOTHING = -1e30
UNITS_AT_ONCE = 8  # that the scheduler is given; see the end of the text above
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
    layout = Layout.of(spec, k, v)
    arguments = (q, k, v, row_table, col_table)
    blocks, sums = _on_tpu_or_interpreted(_call_forward, layout, *_to_blocks(layout, *arguments))
    return _join_queries(layout, blocks, v.shape[-1]), (*arguments, sums)


def _attend_backward(spec, residuals, d_out):
    q, k, v, row_table, col_table, sums = residuals
    layout = Layout.of(spec, k, v)
    inputs = (*_to_blocks(layout, q, k, v, row_table, col_table), _cut_queries(layout, d_out))
    dq, d_kv, d_tables = _on_tpu_or_interpreted(_call_backward, layout, *inputs, sums)
    dk, dv = jnp.split(d_kv.reshape(*k.shape[:3], -1), [layout.c_k], -1)
    d_tables = d_tables.sum(0)[:, : layout.c_k].reshape(2, layout.offsets, layout.heads, -1)
    d_tables = d_tables.sum(2)[:, : row_table.shape[0]].astype(row_table.dtype)
    dq = _join_queries(layout, dq, layout.d_k)
    return dq, dk.reshape(k.shape), dv.reshape(v.shape), *d_tables


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
    def c_k(self) -> int:
        """Channels of the keys; those of the values follow."""
        return self.heads * self.d_k

    @property
    def channels(self) -> int:
        return self.heads * (self.d_k + self.d_v)

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

    def registers(self, first: int, d: int) -> list[slice]:
        """Of each unit, the registers that hold its heads, of `d` channels each from `first` on."""
        starts = [(first + unit.start * d) // LANES * LANES for unit in self.units]
        stops = [_round_up(first + unit.stop * d, LANES) for unit in self.units]
        ends = [min(stop, self.channels) for stop in stops]
        return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


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


def _call_forward(layout: Layout, q, kv, tables, *, interpret: bool):
    """Returns the attended values, in blocks, and the logarithms of the sums of the softmax."""
    sums = (q.shape[0], layout.rows, layout.cols, len(layout.units), layout.lanes)
    out = (*q.shape[:-1], layout.channels - layout.c_k)
    return pl.pallas_call(
        functools.partial(_forward_kernel, layout),
        grid=(q.shape[0], layout.rows),
        in_specs=_inputs(layout),
        out_specs=[_strip_of_queries(layout, out[-1]), _strip_of_sums(layout)],
        out_shape=[jax.ShapeDtypeStruct(out, q.dtype), jax.ShapeDtypeStruct(sums, jnp.float32)],
        compiler_params=_compiler_params(),
        interpret=interpret,
        name="halo_attention_forward",
    )(q, kv, kv, kv, tables)


def _call_backward(layout: Layout, q, kv, tables, d_out, sums, *, interpret: bool):
    """Returns the gradients of q, of keys and values, and for each image those of the tables."""
    d_tables = (q.shape[0], *tables.shape)
    window_sums = (3, layout.spec.block, layout.cols, layout.window_cols, layout.channels)
    return pl.pallas_call(
        functools.partial(_backward_kernel, layout),
        grid=(q.shape[0], layout.rows + 1),
        in_specs=[
            *_inputs(layout),
            _strip_of_queries(layout, d_out.shape[-1]),
            _strip_of_sums(layout),
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
    )(q, kv, kv, kv, tables, d_out, sums)


# What a grid step reads and writes. The backward pass has one step more than there are strips, and
# so clamps to the last.


def _inputs(layout: Layout) -> list[pl.BlockSpec]:
    tables = pl.BlockSpec((2 * layout.offsets, layout.channels), lambda n, i: (0, 0))
    around = [_strip(layout, shift) for shift in (-1, 0, 1)]
    return [_strip_of_queries(layout, layout.c_k), *around, tables]


def _strip(layout: Layout, shift: int) -> pl.BlockSpec:
    """Keys and values of the strip that is `shift` below that of the step."""
    shape, last = (
        (1, layout.spec.block, layout.cols, layout.spec.block, layout.channels),
        layout.rows - 1,
    )
    return pl.BlockSpec(shape, lambda n, i: (n, jnp.clip(i + shift, 0, last), 0, 0, 0))


def _strip_of_queries(layout: Layout, channels: int) -> pl.BlockSpec:
    side, last = layout.spec.side, layout.rows - 1
    piece = (side, layout.cols, side) if side % SUBLANES == 0 else (1, layout.cols, layout.queries)
    return pl.BlockSpec((1, *piece, channels), lambda n, i: (n, jnp.minimum(i, last), 0, 0, 0))


def _strip_of_sums(layout: Layout) -> pl.BlockSpec:
    shape, last = (1, 1, layout.cols, len(layout.units), layout.lanes), layout.rows - 1
    return pl.BlockSpec(shape, lambda n, i: (n, jnp.minimum(i, last), 0, 0, 0))


def _compiler_params() -> pltpu.CompilerParams:
    order = ("parallel", "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_LIMIT)


def _forward_kernel(layout: Layout, q_ref, above, here, below, tables_ref, out_ref, sums_ref):
    strip, of_keys, of_values = pl.program_id(1), (0, layout.d_k), (layout.c_k, layout.d_v)
    k_registers, v_registers = layout.registers(*of_keys), layout.registers(*of_values)

    @_for_each_block(layout)
    def _(col):
        window = _window(layout, (above, here, below), strip, col)
        with_tables = jnp.concatenate([tables_ref[...], window])
        q_units = _to_units(layout, _read_rows(q_ref, col) * layout.d_k**-0.5, *of_keys)
        products = [
            _dot(layout, with_tables[:, c], q, 1, 1)
            for c, q in zip(k_registers, q_units, strict=True)
        ]
        logits = [_to_logits(layout, x, strip, col) for x in products]
        largest = [x.max(0, keepdims=True) for x in logits]
        weights = [jnp.exp(x - m) for x, m in zip(logits, largest, strict=True)]
        totals = [x.sum(0, keepdims=True) for x in weights]
        attended = [
            _dot(layout, window[:, c], w, 0, 0) * (1 / t)
            for c, w, t in zip(v_registers, weights, totals, strict=True)
        ]
        _write_rows(out_ref, col, _from_units(layout, attended, *of_values))
        for unit, (m, t) in enumerate(zip(largest, totals, strict=True)):
            sums_ref[0, 0, col, unit, :] = (m + jnp.log(t))[0]


def _backward_kernel(
    layout: Layout, q_ref, above, here, below, tables_ref, d_out_ref, sums_ref, *refs
):
    dq_ref, d_kv_ref, d_tables_ref, d_windows = refs
    strip, of_keys, of_values = pl.program_id(1), (0, layout.d_k), (layout.c_k, layout.d_v)
    k_registers, v_registers = layout.registers(*of_keys), layout.registers(*of_values)
    tables = 2 * layout.offsets

    @pl.when(strip == 0)
    def _():
        d_windows[...] = jnp.zeros_like(d_windows)
        d_tables_ref[...] = jnp.zeros_like(d_tables_ref)

    @pl.when(strip < layout.rows)
    def _():
        @_for_each_block(layout)
        def _(col):
            window = _window(layout, (above, here, below), strip, col)
            with_tables = jnp.concatenate([tables_ref[...], window])
            q_units = _to_units(layout, _read_rows(q_ref, col) * layout.d_k**-0.5, *of_keys)
            d_units = _to_units(layout, _read_rows(d_out_ref, col), *of_values)
            products = [
                _dot(layout, with_tables[:, c], q, 1, 1)
                for c, q in zip(k_registers, q_units, strict=True)
            ]
            d_weights = [
                _dot(layout, window[:, c], d, 1, 1)
                for c, d in zip(v_registers, d_units, strict=True)
            ]
            logits = [_to_logits(layout, x, strip, col) for x in products]
            weights = [
                jnp.exp(x - sums_ref[0, 0, col, unit, :][None]) for unit, x in enumerate(logits)
            ]
            shares = [w * d for w, d in zip(weights, d_weights, strict=True)]
            d_logits = [
                x - w * x.sum(0, keepdims=True) for x, w in zip(shares, weights, strict=True)
            ]
            for c, w, d in zip(v_registers, weights, d_units, strict=True):
                _add_window(layout, d_windows, strip, col, c, _dot(layout, w, d, 1, 0))
            d_products = [_to_products(layout, x) for x in d_logits]
            d_queries = []
            for c, x, q in zip(k_registers, d_products, q_units, strict=True):
                d_keys = _dot(layout, x, q, 1, 0)
                d_tables_ref[0, :, c] += d_keys[:tables]
                _add_window(layout, d_windows, strip, col, c, d_keys[tables:])
                d_queries.append(_dot(layout, with_tables[:, c], x, 0, 0))
            dq = _from_units(layout, d_queries, *of_keys) * layout.d_k**-0.5
            _write_rows(dq_ref, col, dq)

    # The strip above is complete; its room is that of the strip after the next one.
    done = (strip + 2) % 3

    @pl.loop(0, layout.cols)
    def _(col):
        d_kv_ref[0, :, col] = _from_windows(layout, d_windows, done, col).astype(d_kv_ref.dtype)

    d_windows[done] = jnp.zeros_like(d_windows[done])


def _for_each_block(layout: Layout):
    """A loop over the blocks of a strip, a few at a time: more for the scheduler to choose from."""
    fitting = max(1, UNITS_AT_ONCE // len(layout.units))
    unroll = max(n for n in range(1, min(fitting, 4) + 1) if layout.cols % n == 0)
    return pl.loop(0, layout.cols, unroll=unroll)


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


def _add_window(layout: Layout, d_windows, strip, col, registers: slice, x) -> None:
    """Adds to the sums of a window's rows, which are of three strips with a room each."""
    block, halo = layout.spec.block, layout.spec.halo
    x = x.reshape(layout.spec.window, layout.window_cols, -1)
    d_windows[strip % 3, :, col, :, registers] += x[halo : halo + block]
    if halo:
        d_windows[(strip + 2) % 3, block - halo :, col, :, registers] += x[:halo]
        d_windows[(strip + 1) % 3, :halo, col, :, registers] += x[halo + block :]


def _from_windows(layout: Layout, d_windows, room, col) -> Float[Array, "block block2 c"]:
    """Adds up what the windows of a block and of those beside it hold for its pixels."""
    block, halo, last = layout.spec.block, layout.spec.halo, layout.cols - 1
    total = d_windows[room, :, col, halo : halo + block, :]
    if not halo:
        return total
    left = d_windows[room, :, jnp.maximum(col - 1, 0), halo + block : block + 2 * halo, :]
    right = d_windows[room, :, jnp.minimum(col + 1, last), :halo, :]
    between = jnp.zeros((block, block - halo, total.shape[-1]), jnp.float32)
    total += jnp.concatenate([jnp.where(col > 0, left, 0.0), between], 1)
    return total + jnp.concatenate([between, jnp.where(col < last, right, 0.0)], 1)


def _read_rows(ref, col) -> Float[Array, "queries c"]:
    """The queries of a block one below the other."""
    return jnp.concatenate([ref[0, row, col].astype(jnp.float32) for row in range(ref.shape[1])])


def _write_rows(ref, col, rows: Float[Array, "queries c"]) -> None:
    """The inverse of `_read_rows`."""
    for row, piece in enumerate(jnp.split(rows, ref.shape[1])):
        ref[0, row, col] = piece.astype(ref.dtype)


def _to_units(
    layout: Layout, rows: Float[Array, "queries c"], first: int, d: int
) -> list[Float[Array, "lanes c2"]]:
    """Of each unit: the rows once for each head, zero in the channels of other heads.

    Head h of `rows` goes to the `d` channels from `first + h * d` on, in whole registers.
    """
    ends = (first, layout.channels - first - rows.shape[1])
    before, after = (jnp.zeros((rows.shape[0], channels), jnp.float32) for channels in ends)
    rows = jnp.concatenate([x for x in (before, rows, after) if x.shape[1]], 1)
    return [
        jnp.concatenate(
            [jnp.where(_is_of_head(head, first, d, c), rows[:, c], 0.0) for head in unit]
        ).astype(layout.dtype)
        for unit, c in zip(layout.units, layout.registers(first, d), strict=True)
    ]


def _from_units(
    layout: Layout, units: list[Array], first: int, d: int
) -> Float[Array, "queries c"]:
    """The adjoint of `_to_units`, of arrays (channels, lanes)."""
    registers: dict[int, Array] = {}
    for x, unit, c in zip(units, layout.units, layout.registers(first, d), strict=True):
        heads = jnp.split(x.T, len(unit))
        rows = sum(
            jnp.where(_is_of_head(head, first, d, c), y, 0.0)
            for head, y in zip(unit, heads, strict=True)
        )
        for start in range(c.start, c.stop, LANES):
            part = rows[:, start - c.start : min(start + LANES, c.stop) - c.start]
            registers[start] = registers[start] + part if start in registers else part
    rows = jnp.concatenate([registers[start] for start in sorted(registers)], 1)
    begin = first - min(registers)
    return rows[:, begin : begin + layout.heads * d]


def _is_of_head(head: int, first: int, d: int, channels: slice) -> Bool[Array, "1 c"]:
    shape = (1, channels.stop - channels.start)
    channel = lax.broadcasted_iota(jnp.int32, shape, 1) + channels.start
    return (channel >= first + head * d) & (channel < first + (head + 1) * d)


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
    """Moves each lane up by the table row of its query and the window's first key."""
    for digit, moves in _digits(layout, axis):
        x = jnp.where(moves, jnp.concatenate([x[digit:], x[:digit]]), x)
    return x[: layout.spec.window]


def _by_key_to_by_offset(
    layout: Layout, x: Float[Array, "window lanes"], axis: int
) -> Float[Array, "offsets lanes"]:
    """The adjoint of `_by_offset_to_by_key`."""
    x = jnp.concatenate([x, jnp.zeros((layout.offsets - x.shape[0], x.shape[1]), jnp.float32)])
    for digit, moves in _digits(layout, axis):
        x = jnp.where(moves, jnp.concatenate([x[-digit:], x[:-digit]]), x)
    return x


def _digits(layout: Layout, axis: int) -> list[tuple[int, Bool[Array, "1 lanes"]]]:
    """The table row of each lane's query and the window's first key, along one axis, in binary."""
    side, spec = layout.spec.side, layout.spec
    query = lax.broadcasted_iota(jnp.int32, (1, layout.lanes), 1) % layout.queries
    position = query // side if axis == 0 else query % side
    row = jnp.maximum(spec.block - 1 - spec.stride * position, 0)  # what pads the queries has none
    return [(1 << n, (row >> n) & 1 == 1) for n in range((spec.block - 1).bit_length())]


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

"""What the fused TPU kernel does inside a grid step, with one strip of one image.

Keys lie on sublanes and queries on lanes, those of a few heads side by side. The softmax then
reduces over sublanes, by adding whole registers, and a window of 14 columns costs nothing to pad to
16. Heads are not cut apart, as 16 to 64 channels would not be aligned with the 128 lanes of a
register: a head's queries are zero in the channels of all others. The rows of the relative tables
stand before the keys as further keys, so that one product gives content and position logits.

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
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from halonet.ops.geometry import Spec

LANES, SUBLANES = 128, 8  # of a register
# Weighs nothing in a softmax, and the sum of two is finite.
NOTHING = -1e30
UNITS_AT_ONCE = 8  # that the scheduler is given
BLOCKS_AT_ONCE = 2  # at most, or else the program would be too long


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
    def of(cls, spec: Spec, k: Array, v: Array, heads: int = 0) -> Layout:
        """For keys and values of whole blocks, or for some of their heads."""
        rows, cols = spec.blocks
        return cls(spec, rows, cols, heads or k.shape[3], k.shape[4], v.shape[4], k.dtype)

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
        return round_up(self.spec.side**2, SUBLANES)

    @property
    def window_cols(self) -> int:
        """Columns of a window, padded to whole registers."""
        return round_up(self.spec.window, SUBLANES)

    @property
    def offsets(self) -> int:
        """Rows of a relative table, padded to whole registers."""
        return round_up(2 * (self.spec.block + self.spec.halo) - 1, SUBLANES)

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

    @property
    def vmem(self) -> int:
        """Bytes that the backward pass, which needs more, has in VMEM."""
        spec, size = self.spec, self.dtype.itemsize
        c_k, c = round_up(self.c_k, LANES), round_up(self.channels, LANES)
        c_v = round_up(self.channels - self.c_k, LANES)
        pixels = spec.block * self.cols * round_up(spec.block, 8 if spec.block == 8 else 16)
        queries = self.cols * round_up(self.queries, SUBLANES)
        windows = 3 * spec.block * self.cols * self.window_cols * c * 4
        # Of what is read or written, a second one is on its way.
        return windows + 2 * size * (4 * pixels * c + queries * (2 * c_k + c_v))

    def registers(self, first: int, d: int) -> list[slice]:
        """Of each unit, the registers that hold its heads, of `d` channels each from `first` on."""
        starts = [(first + unit.start * d) // LANES * LANES for unit in self.units]
        stops = [round_up(first + unit.stop * d, LANES) for unit in self.units]
        ends = [min(stop, self.channels) for stop in stops]
        return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def forward_kernel(layout: Layout, q_ref, above, here, below, tables_ref, *refs):
    *first, out_ref, sums_ref = refs
    strip, of_keys, of_values = pl.program_id(1), (0, layout.d_k), (layout.c_k, layout.d_v)

    @_for_each_block(layout)
    def _(col):
        window = _window(layout, (above, here, below), strip, col)
        with_tables = jnp.concatenate([tables_ref[...], window])
        q_units = _to_units(layout, _read_rows(q_ref, col) * layout.d_k**-0.5, *of_keys)
        products = [
            _dot(layout, with_tables[:, c], q, 1, 1)
            for c, q in zip(layout.registers(*of_keys), q_units, strict=True)
        ]
        logits = [_to_logits(layout, x, _row(strip, first), col) for x in products]
        largest = [x.max(0, keepdims=True) for x in logits]
        weights = [jnp.exp(x - m) for x, m in zip(logits, largest, strict=True)]
        totals = [x.sum(0, keepdims=True) for x in weights]
        values = window.T
        attended = [
            _dot(layout, _unit_rows(values, unit, *of_values), w, 1, 0) * (1 / t)
            for unit, w, t in zip(layout.units, weights, totals, strict=True)
        ]
        _write_rows(out_ref, col, _from_units(layout, attended, layout.d_v))
        for unit, (m, t) in enumerate(zip(largest, totals, strict=True)):
            sums_ref[0, 0, col, unit, :] = (m + jnp.log(t))[0]


def backward_kernel(
    layout: Layout, q_ref, above, here, below, tables_ref, d_out_ref, sums_ref, *refs
):
    *first, dq_ref, d_kv_ref, d_tables_ref, d_windows = refs
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
            logits = [_to_logits(layout, x, _row(strip, first), col) for x in products]
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
            keys, d_queries = with_tables.T, []
            for unit, c, x, q in zip(layout.units, k_registers, d_products, q_units, strict=True):
                d_keys = _dot(layout, x, q, 1, 0)
                d_tables_ref[0, :, c] += d_keys[:tables]
                _add_window(layout, d_windows, strip, col, c, d_keys[tables:])
                d_queries.append(_dot(layout, _unit_rows(keys, unit, *of_keys), x, 1, 0))
            dq = _from_units(layout, d_queries, layout.d_k) * layout.d_k**-0.5
            _write_rows(dq_ref, col, dq)

    # The strip above is complete; its room is that of the strip after the next one.
    done = (strip + 2) % 3

    @pl.loop(0, layout.cols)
    def _(col):
        d_kv_ref[0, :, col] = _from_windows(layout, d_windows, done, col).astype(d_kv_ref.dtype)

    d_windows[done] = jnp.zeros_like(d_windows[done])


def _row(strip, first: list):
    """The row of blocks of a strip in the whole image, of which the device may have a part."""
    return strip + first[0][0] if first else strip


def _for_each_block(layout: Layout):
    """A loop over the blocks of a strip, a few at a time: more for the scheduler to choose from."""
    fitting = max(1, UNITS_AT_ONCE // len(layout.units))
    unroll = max(n for n in range(1, min(fitting, BLOCKS_AT_ONCE) + 1) if layout.cols % n == 0)
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
        if not layout.spec.strips:
            before = jnp.where(strip > 0, before, 0.0)
            after = jnp.where(strip < last[0], after, 0.0)
        return jnp.concatenate([before, rows, after])

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


def _unit_rows(x: Float[Array, "c n"], unit: range, first: int, d: int) -> Float[Array, "c2 n"]:
    """The channels of a unit's heads."""
    start, stop = first + unit.start * d, first + unit.stop * d
    if start % (2 * SUBLANES) or stop % (2 * SUBLANES):
        # Two rows of bfloat16 share a sublane; not all of these begin with the first.
        return x.astype(jnp.float32)[start:stop].astype(x.dtype)
    return x[start:stop]


def _from_units(layout: Layout, units: list[Array], d: int) -> Float[Array, "queries c"]:
    """Of each unit's (channels, lanes), what is of a head in both; all heads side by side."""
    heads = [
        x[n * d : (n + 1) * d, n * layout.queries : (n + 1) * layout.queries]
        for x, unit in zip(units, layout.units, strict=True)
        for n in range(len(unit))
    ]
    return jnp.concatenate(heads).T


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


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit

"""The public op: checks its arguments, pads to whole blocks and picks the implementation."""

from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from halonet.ops import geometry, measured, packed, pallas_tpu, reference, rows, spatial, xla

# Each takes (q, k, v, row_table, col_table, spec). The images are padded to whole blocks; `spec`
# has their true size.
IMPLEMENTATIONS = {
    "reference": reference.halo_attention_reference,
    "xla_shift": xla.halo_attention_shift,
    "xla_rows": rows.halo_attention_rows,
    "xla_packed": packed.halo_attention_packed,
    "pallas_tpu": pallas_tpu.halo_attention_pallas_tpu,
}


@no_type_check  # The checks below name the argument, its value and what would do.
def halo_attention(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    row_table: Float[Array, "rows d_k"],
    col_table: Float[Array, "rows d_k"],
    *,
    block: int,
    halo: int,
    stride: int = 1,
    border: str = "zeros",
    positions: str = "exact",
    scale_positions: bool = True,
    pad_to_blocks: bool = False,
    implementation: str | None = None,
) -> Float[Array, "n h_q w_q heads d_v"]:
    """Blocked local self-attention with halos and relative positions, of HaloNet.

    The image is cut into blocks of `block` x `block` pixels. Every query of a block attends to the
    same window, the block and `halo` pixels around it, with

        logits = (q . (k + row_table[dy] + col_table[dx])) * d_k**-0.5

    where (dy, dx) is the offset key - query in input pixels, exact for every stride. The softmax is
    taken in float32, or in float64 where that is the dtype.

    Args:
      q: queries, already projected; h_q = h / stride and w_q = w / stride, rounded up. Query (y, x)
        sits at pixel (stride * y, stride * x) of the keys.
      k: keys. h and w must be multiples of `block`, or else `pad_to_blocks` be True.
      v: values.
      row_table: learned vectors of the vertical offset, shared over heads: 2 * block + 2 * halo - 1
        rows, of which row r holds the offset r - (block + halo - 1); see also `positions`.
      col_table: the same for the horizontal offset.
      block: side of a block, in input pixels.
      halo: pixels that the window adds on each side; 0 is plain blocked attention.
      stride: 1, or the step at which queries were taken from the image; it must divide `block`.
      border: what lies outside the image. "zeros": keys and values of zero that take part in the
        softmax with their position logits, as in the paper; "mask": nothing, no weight.
      positions: "exact", as above; or "contiguous", as timm and MindCV count: the i-th query of a
        block and the j-th key of its window have row j - i + block + 2 * halo - 1 of tables of
        2 * (block + 2 * halo) - 1 rows, as though queries `stride` pixels apart were neighbours.
      scale_positions: whether d_k**-0.5 multiplies the position logits too. If False (timm and
        MindCV) it multiplies q . k only.
      pad_to_blocks: takes images of any size: they are padded at the bottom and on the right with
        zeros up to whole blocks, and the output is cropped. `border` governs the padding as well.
      implementation: a name in `IMPLEMENTATIONS`, or None to choose by platform and shape. A name
        never falls back to another.

    Returns:
      The attended values, in the dtype of `q`. Products of float32 and float64 operands are exact
      to that precision on every platform (`lax.Precision.HIGHEST`: the default on TPU is bfloat16);
      narrower operands are multiplied as they are and summed in float32.

    Under a mesh (`jax.set_mesh`) with an axis "rows" the devices along it share the rows of the
    images, in whole blocks, and lend each other halos; the batch is split over the other axes.

    Raises:
      ValueError: arguments that do not fit together, each named with what would do.
      NotImplementedError: what the implementation named cannot do, with one that can.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones,
    2021, arXiv 2103.12731.
    """
    arrays = {"q": q, "k": k, "v": v, "row_table": row_table, "col_table": col_table}
    _check_arrays(arrays)
    height, width = k.shape[1:3]
    devices = spatial.row_devices()
    spec = geometry.Spec(
        block=block,
        halo=halo,
        stride=stride,
        border=border,
        positions=positions,
        scale_positions=scale_positions,
        height=height,
        width=width,
        row_devices=devices,
    )
    if devices > 1 and (height == 0 or height % (devices * block)):
        raise ValueError(
            f"{devices} devices (mesh.rows) cannot share height {height} in blocks of {block}, "
            f"padded or not; the nearest that they can: "
            f"{max(1, round(height / (devices * block))) * devices * block}"
        )
    for size, what in ((height, "height"), (width, "width")):
        if size == 0 or not pad_to_blocks:
            geometry.check_blocks(size, block, what)
    _check_shapes(arrays, spec)
    if implementation is None:
        # What is compiled ahead of time is for the platform of the default device.
        target = jax.config.jax_default_device
        platform = getattr(target, "platform", None) or jax.default_backend()
        implementation = default_implementation(platform, jax.device_count(), spec, k, v)
    elif implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(
            f"implementation {implementation!r} is unknown; the known ones are {known}"
        )
    if not pad_to_blocks:
        return _run(implementation, (q, k, v), (row_table, col_table), spec)
    k, v = _pad(k, spec, spec.block), _pad(v, spec, spec.block)
    out = _run(implementation, (_pad(q, spec, spec.side), k, v), (row_table, col_table), spec)
    return out[:, : q.shape[1], : q.shape[2]]


def default_implementation(
    platform: str,
    devices: int,
    spec: geometry.Spec,
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
) -> str:
    """Returns the implementation that `halo_attention` takes when none is named.

    On a TPU the fused kernel, where it has code for the call and knows how the batch lies on the
    devices; else the form that packs heads into lanes (docs/tpu_kernels.txt). On one CPU what
    `halonet.ops.measured` says. Elsewhere "xla_shift": "xla_rows" would gather a batch that several
    devices share, and leave an accelerator idle.

    Args:
      platform: "cpu", "gpu" or "tpu".
      devices: how many of them the program runs on, in all its processes.
      spec: the rest of the call.
      k, v: keys and values, or their shapes.
    """
    if platform == "tpu":
        placed = devices == 1 or not jax.sharding.get_abstract_mesh().empty
        fused = placed and not pallas_tpu.unsupported(spec, k, v)
        return "pallas_tpu" if fused else "xla_packed"
    if devices > 1:
        return "xla_shift"
    rows, cols = spec.blocks
    logits = k.shape[0] * k.shape[3] * rows * cols * spec.side**2 * spec.window**2
    forms = measured.FASTEST.get(platform, [(0, "xla_shift")])
    return [form for least, form in forms if logits >= least][-1]


def _run(implementation, maps, tables, spec) -> Float[Array, "n h_q w_q heads d_v"]:
    """Computes whole blocks, on each device by itself where XLA could not partition it as well."""
    run, mesh = IMPLEMENTATIONS[implementation], jax.sharding.get_abstract_mesh()

    def part(q, k, v, row_table, col_table):
        if spec.row_devices > 1:
            k, v = _with_strips(k, v, spec)
        return run(q, k, v, row_table, col_table, spec)

    # A kernel, XLA cannot partition at all.
    alone = mesh.size < 2 or mesh.manual_axes
    if alone or (spec.row_devices == 1 and implementation != "pallas_tpu"):
        return part(*maps, *tables)
    return spatial.on_each_device(part, maps, tables)


def _with_strips(
    k: Float[Array, "n h w heads d_k"], v: Float[Array, "n h w heads d_v"], spec: geometry.Spec
) -> tuple[Float[Array, "n h2 w heads d_k"], Float[Array, "n h2 w heads d_v"]]:
    """A device's keys and values between `Spec.strips` rows of blocks, of which halos are filled.

    Beyond the image are zeros.
    """
    # One exchange for both; as a layer's projection makes them, they are one array anyway.
    flat = [x.reshape(*x.shape[:3], -1) for x in (k, v)]
    kv = spatial.with_neighbours(jnp.concatenate(flat, -1), spec.halo, spec.halo)
    beyond = spec.strips * spec.block - spec.halo
    kv = jnp.pad(kv, ((0, 0), (beyond, beyond), (0, 0), (0, 0)))
    parts = jnp.split(kv, [flat[0].shape[-1]], -1)
    return tuple(
        part.reshape(*part.shape[:3], *x.shape[3:]) for part, x in zip(parts, (k, v), strict=True)
    )


def _pad(
    x: Float[Array, "n h w heads d"], spec: geometry.Spec, side: int
) -> Float[Array, "n h2 w2 heads d"]:
    """Appends zeros at the bottom and on the right, up to whole blocks of `side` elements."""
    rows, cols = spec.row_devices * spec.blocks[0] * side, spec.blocks[1] * side
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, cols - x.shape[2]), (0, 0), (0, 0)))


@no_type_check
def _check_arrays(arrays) -> None:
    """Raises the ValueError that names the first array of other dimensions or another dtype."""
    dtype = arrays["q"].dtype
    for name, array in arrays.items():
        dims = "(rows, d_k)" if "table" in name else "(n, height, width, heads, channels)"
        if array.ndim != dims.count(",") + 1:
            raise ValueError(f"{name} has shape {array.shape}; it needs dimensions {dims}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; it needs a floating one")
        if array.dtype != dtype:
            raise ValueError(
                f"{name} has dtype {array.dtype} but q has {dtype}; cast one with .astype"
            )


@no_type_check
def _check_shapes(arrays, spec) -> None:
    """Raises the ValueError that names the first array whose shape does not fit that of k."""
    n, height, width, heads, d_k = arrays["k"].shape
    table = (geometry.table_size(spec.block, spec.halo, spec.positions), d_k)
    needed = {
        "q": (n, -(-height // spec.stride), -(-width // spec.stride), heads, d_k),
        "v": (n, height, width, heads, arrays["v"].shape[-1]),
        "row_table": table,
        "col_table": table,
    }
    for name, shape in needed.items():
        if arrays[name].shape != shape:
            kind = "" if spec.positions == "exact" else f" for {spec.positions} positions"
            raise ValueError(
                f"{name} has shape {arrays[name].shape}; with k of shape {arrays['k'].shape}, "
                f"block {spec.block}, halo {spec.halo} and stride {spec.stride} it needs {shape}"
                f"{kind if 'table' in name else ''}"
            )

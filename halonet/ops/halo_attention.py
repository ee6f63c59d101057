"""The public op: checks its arguments and picks the implementation."""

from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from halonet.ops import geometry, reference, xla

IMPLEMENTATIONS = {
    "reference": reference.halo_attention_reference,
    "xla_shift": xla.halo_attention_shift,
    "xla_rows": xla.halo_attention_rows,
}
BORDERS = ("zeros", "mask")


@no_type_check  # The checks below name the argument, its value and what would do.
def halo_attention(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    v: Float[Array, "n h w heads d_v"],
    row_table: Float[Array, "2*block+2*halo-1 d_k"],
    col_table: Float[Array, "2*block+2*halo-1 d_k"],
    *,
    block: int,
    halo: int,
    stride: int = 1,
    border: str = "zeros",
    implementation: str | None = None,
) -> Float[Array, "n h_q w_q heads d_v"]:
    """Blocked local self-attention with halos and relative positions, of HaloNet.

    The image is cut into blocks of `block` x `block` pixels. Every query of a block attends to the
    same window, the block and `halo` pixels around it, with

        logits = (q . (k + row_table[dy] + col_table[dx])) * d_k**-0.5

    where (dy, dx) is the offset key - query in input pixels, exact for every stride. The softmax is
    taken in float32, or in float64 where that is the dtype.

    Args:
      q: queries, already projected; h_q = h / stride and w_q = w / stride. Query (y, x) sits at
        pixel (stride * y, stride * x) of the keys.
      k: keys. h and w must be multiples of `block`.
      v: values.
      row_table: learned vectors of the vertical offset, shared over heads: row r holds the offset
        r - (block + halo - 1).
      col_table: the same for the horizontal offset.
      block: side of a block, in input pixels.
      halo: pixels that the window adds on each side; 0 is plain blocked attention.
      stride: 1, or the step at which queries were taken from the image; it must divide `block`.
      border: what lies outside the image. "zeros": keys and values of zero that take part in the
        softmax with their position logits, as in the paper; "mask": nothing, no weight.
      implementation: a name in `IMPLEMENTATIONS`, or None to choose by platform and shape. A name
        never falls back to another.

    Returns:
      The attended values, in the dtype of `q`. Products of float32 and float64 operands are exact
      to that precision on every platform (`lax.Precision.HIGHEST`: the default on TPU is bfloat16);
      narrower operands are multiplied as they are and summed in float32.

    Raises:
      ValueError: arguments that do not fit together, each named with what would do.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones,
    2021, arXiv 2103.12731.
    """
    _check(q, k, v, row_table, col_table, block, halo, stride, border)
    if implementation is None:
        implementation = default_implementation(jax.default_backend(), jax.device_count())
    elif implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(
            f"implementation {implementation!r} is unknown; the known ones are {known}"
        )
    run = IMPLEMENTATIONS[implementation]
    return run(q, k, v, row_table, col_table, block=block, halo=halo, stride=stride, border=border)


def default_implementation(platform: str, devices: int) -> str:
    """Returns the implementation that `halo_attention` takes when none is named.

    On one CPU, a few rows of blocks at a time: the logits stay in the cache. Training measures
    mostly 0.4 to 0.9 of the time of all at once where there is much to compute, and the same where
    there is little (`python -m experiments.bench_attention`). Elsewhere all at once: the loop of
    the other would gather a batch that several devices share, and leave an accelerator idle.

    Args:
      platform: "cpu", "gpu" or "tpu".
      devices: how many of them the program runs on, in all its processes.
    """
    return "xla_rows" if platform == "cpu" and devices == 1 else "xla_shift"


@no_type_check
def _check(q, k, v, row_table, col_table, block, halo, stride, border) -> None:
    """Raises the ValueError that names the first argument that does not fit."""
    if block < 1:
        raise ValueError(f"block {block} is not positive; HaloNet uses 8 to 14")
    if halo < 0:
        raise ValueError(f"halo {halo} is negative; 0 means no halo")
    if stride < 1 or block % stride:
        good = ", ".join(str(s) for s in range(1, block + 1) if block % s == 0)
        raise ValueError(f"stride {stride} does not divide block {block}; these do: {good}")
    if border not in BORDERS:
        raise ValueError(f"border {border!r} is unknown; the known ones are {', '.join(BORDERS)}")

    arrays = {"q": q, "k": k, "v": v, "row_table": row_table, "col_table": col_table}
    for name, array in arrays.items():
        dims = "(rows, d_k)" if "table" in name else "(n, height, width, heads, channels)"
        if array.ndim != dims.count(",") + 1:
            raise ValueError(f"{name} has shape {array.shape}; it needs dimensions {dims}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; it needs a floating one")
        if array.dtype != q.dtype:
            raise ValueError(
                f"{name} has dtype {array.dtype} but q has {q.dtype}; cast one with .astype"
            )

    n, height, width, heads, d_k = k.shape
    geometry.check_blocks(height, block, "height")
    geometry.check_blocks(width, block, "width")
    rows = geometry.table_size(block, halo)
    needed = {
        "q": (n, height // stride, width // stride, heads, d_k),
        "v": (n, height, width, heads, v.shape[-1]),
        "row_table": (rows, d_k),
        "col_table": (rows, d_k),
    }
    for name, shape in needed.items():
        if arrays[name].shape != shape:
            raise ValueError(
                f"{name} has shape {arrays[name].shape}; with k of shape {k.shape}, block {block}, "
                f"halo {halo} and stride {stride} it needs {shape}"
            )

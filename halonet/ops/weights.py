"""What one query looks at: the weights that `halo_attention` does not return."""

from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from halonet.ops.geometry import Spec


@no_type_check  # As of `halo_attention`, whose caller has passed its checks.
def attention_weights(
    q: Float[Array, "n h_q w_q heads d_k"],
    k: Float[Array, "n h w heads d_k"],
    row_table: Float[Array, "rows d_k"],
    col_table: Float[Array, "rows d_k"],
    *,
    query: tuple[int, int],
    block: int,
    halo: int,
    stride: int = 1,
    border: str = "zeros",
    positions: str = "exact",
    scale_positions: bool = True,
) -> Float[Array, "n heads window window"]:
    """The weights with which one query of `halo_attention` sums the values of its window.

    Args:
      q: as of `halo_attention`, like all that is not explained here; any height and width.
      k: keys.
      row_table: of the vertical offset.
      col_table: of the horizontal offset.
      query: row and column in `q`.
      block: side of a block, in pixels of the keys.
      halo: pixels that the window adds on each side.
      stride: of the queries.
      border: "zeros" or "mask".
      positions: "exact" or "contiguous".
      scale_positions: whether d_k**-0.5 multiplies the position logits too.

    Returns:
      Weights in float32 (float64 where that is the dtype of `q`), that sum to 1 over a window of
      `block + 2 * halo` pixels a side. It begins `halo` pixels above and left of the query's block,
      so that it may reach out of the image; with `border="zeros"` what lies there has weight, too.

    Raises:
      ValueError: for a query that is not in `q`, and for options that do not fit together.
    """
    spec = Spec(block, halo, stride, border, positions, scale_positions, *k.shape[1:3])
    if not all(0 <= at < size for at, size in zip(query, q.shape[1:3], strict=True)):
        raise ValueError(f"query {query} is not among the {q.shape[1]} x {q.shape[2]} queries")
    wide, scale = jnp.promote_types(q.dtype, jnp.float32), q.shape[-1] ** -0.5
    # The place of the query in its block, and of the block among all.
    (row_block, row), (col_block, col) = (divmod(at, spec.side) for at in query)
    index, window = spec.table_index(), spec.window

    ends = [spec.blocks[axis] * block - k.shape[1 + axis] for axis in range(2)]
    around = ((0, 0), *((halo, halo + end) for end in ends), (0, 0), (0, 0))
    start = (0, row_block * block, col_block * block, 0, 0)
    size = (k.shape[0], window, window, *k.shape[3:])
    keys = lax.dynamic_slice(jnp.pad(k, around), start, size).astype(wide)

    def dot(text: str, *arrays: Array) -> Array:
        return jnp.einsum(text, *arrays, precision=lax.Precision.HIGHEST)

    # Letters: i, j of the key; a head; d channel.
    q = q[:, query[0], query[1]].astype(wide)
    rows = dot("nad,id->nai", q, row_table[index[row]].astype(wide))[..., :, None]
    cols = dot("nad,jd->naj", q, col_table[index[col]].astype(wide))[..., None, :]
    logits = dot("nad,nijad->naij", q, keys) * scale
    logits = logits + (rows + cols) * (scale if scale_positions else 1)
    if border == "mask":
        inside = spec.inside(spec.height)[row_block][:, None] & spec.inside(spec.width)[col_block]
        logits = jnp.where(inside[None, None], logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=(-2, -1))

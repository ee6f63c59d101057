"""Halo attention as a layer: projections, relative-position tables, the op."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from halonet.models.layers import (
    Conv1x1,
    Kernel1x1,
    average_pool,
    matmul_precision,
    product1x1,
)
from halonet.ops import POSITIONS, halo_attention, table_size

DOWNSAMPLES = ("queries", "pool")
LAYER_POSITIONS = (*POSITIONS, "none")


class HaloAttention(nn.Module):
    """Blocked local self-attention with halos, for anyone's network.

    Maps (N, H, W, C) to (N, H/stride, W/stride, out_features). The map is cut into blocks of
    `block_size` pixels square; the queries of a block attend to the keys of the block and of a ring
    of `halo_size` pixels around it. Relative positions are learned, one table for rows and one for
    columns, shared by the heads.

    Attributes:
      block_size, halo_size: in pixels of the input map; H and W must be multiples of `block_size`,
        unless `pad_to_blocks`.
      heads: number of attention heads.
      head_dim: width of a head's queries and keys.
      value_head_dim: width of a head's values; None means `head_dim`.
      out_features: channels of the output; None means C, the input's own.
      out_projection: whether a dense layer maps the heads to `out_features`. Without it the output
        has heads * value_head_dim channels (inside HaloNet the block's last convolution mixes the
        heads).
      stride: 2 halves the map in each direction (odd sizes are rounded up).
      downsample: how a stride does so. "queries" keeps every second query, HaloNet's downsampling;
        "pool" averages squares of the outputs of all queries, as blocks of odd size need it.
      positions: see `halonet.halo_attention`; or "none": no tables, a query knows what its keys
        are and not where.
      border, scale_positions, pad_to_blocks, implementation: see `halonet.halo_attention`.

    Source: Vaswani et al. 2021, arXiv 2103.12731.

    Raises:
      ValueError: for sizes that `block_size` does not divide, and for what the op refuses.
    """

    block_size: int
    halo_size: int
    heads: int
    head_dim: int
    value_head_dim: int | None = None
    out_features: int | None = None
    out_projection: bool = True
    stride: int = 1
    downsample: str = "queries"
    border: str = "zeros"
    positions: str = "exact"
    scale_positions: bool = True
    pad_to_blocks: bool = False
    implementation: str | None = None
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        value_head_dim = self.head_dim if self.value_head_dim is None else self.value_head_dim
        if self.out_features is not None and not self.out_projection:
            raise ValueError(
                f"out_features={self.out_features} without a projection; leave one of them out"
            )

        if self.downsample not in DOWNSAMPLES:
            raise ValueError(
                f"downsample {self.downsample!r} is unknown; there are: {', '.join(DOWNSAMPLES)}"
            )
        pool = self.downsample == "pool" and self.stride > 1
        stride = 1 if pool else self.stride

        weights = {"kernel_init": self.kernel_init, "param_dtype": self.param_dtype}
        key_width, value_width = self.heads * self.head_dim, self.heads * value_head_dim
        query = Conv1x1(key_width, stride=stride, dtype=self.dtype, name="query", **weights)(x)
        # Keys and values in one product: the input is read once, and they lie side by side as the
        # fused kernel takes them.
        kernels = [
            Kernel1x1(width, name=name, **weights)(x.shape[-1])
            for name, width in (("key", key_width), ("value", value_width))
        ]
        keys_values = product1x1(x.astype(self.dtype), jnp.concatenate(kernels, 1))
        query, key, value = (
            y.reshape(*y.shape[:3], self.heads, -1)
            for y in (query, *jnp.split(keys_values, [key_width], -1))
        )
        # For `halonet.models.attention_map`; nothing where "intermediates" is not asked for.
        self.sow("intermediates", "queries_keys", (query, key))

        row_table, col_table, positions = self._tables()
        y = halo_attention(
            query,
            key,
            value,
            row_table.astype(self.dtype),
            col_table.astype(self.dtype),
            block=self.block_size,
            halo=self.halo_size,
            stride=stride,
            border=self.border,
            positions=positions,
            scale_positions=self.scale_positions,
            pad_to_blocks=self.pad_to_blocks,
            implementation=self.implementation,
        )
        y = y.reshape(*y.shape[:3], self.heads * value_head_dim)
        if pool:
            y = average_pool(y, self.stride)
        if not self.out_projection:
            return y
        return nn.Dense(
            self.out_features or x.shape[-1],
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=matmul_precision(self.dtype),
            name="out",
        )(y)

    @nn.nowrap  # what it returns is no array
    def _tables(self) -> tuple[Array, Array, str]:
        """The relative tables of rows and of columns, and how the op shall index them."""
        if self.positions == "none":
            zeros = jnp.zeros((table_size(self.block_size, self.halo_size), self.head_dim))
            return zeros, zeros, "exact"
        rows = table_size(self.block_size, self.halo_size, self.positions)
        # The standard deviation that the BoTNet authors meant: their code passed it as the mean.
        init = nn.initializers.normal(self.head_dim**-0.5)
        settings = (init, (rows, self.head_dim), self.param_dtype)
        row_table, col_table = (self.param(it, *settings) for it in ("row_table", "col_table"))
        return row_table, col_table, self.positions

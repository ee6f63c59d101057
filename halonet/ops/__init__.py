"""The attention of HaloNet: pure JAX, no Flax, no configuration."""

from halonet.ops.geometry import check_blocks, table_size
from halonet.ops.halo_attention import IMPLEMENTATIONS, halo_attention

__all__ = ["IMPLEMENTATIONS", "check_blocks", "halo_attention", "table_size"]

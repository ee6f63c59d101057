"""The attention of HaloNet: pure JAX, no Flax, no configuration."""

from halonet.ops.geometry import BORDERS, POSITIONS, check_blocks, table_size
from halonet.ops.halo_attention import IMPLEMENTATIONS, halo_attention
from halonet.ops.spatial import on_each_device, row_devices, with_neighbours
from halonet.ops.weights import attention_weights

__all__ = [
    "BORDERS",
    "IMPLEMENTATIONS",
    "POSITIONS",
    "attention_weights",
    "check_blocks",
    "halo_attention",
    "on_each_device",
    "row_devices",
    "table_size",
    "with_neighbours",
]

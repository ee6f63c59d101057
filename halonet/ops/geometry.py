"""Blocks, halos and relative offsets: integers and numpy only.

An image axis of `size` pixels is cut into blocks of `block` pixels. The queries of a block see its
window: the block and `halo` more pixels on either side, `block + 2 * halo` in all. With a stride,
only every `stride`-th pixel of a block is a query.
"""

import numpy as np


def check_blocks(size: int, block: int, what: str = "size") -> int:
    """Returns how many blocks `size` pixels hold, or raises the ValueError that users read.

    Args:
      size: pixels along one axis, at the resolution of the keys.
      block: pixels along one side of a block.
      what: the name that the message gives to the size, such as "height".

    Raises:
      ValueError: `size` is not a positive multiple of `block`; it names the nearest that are.
    """
    blocks, rest = divmod(size, block)
    if rest == 0 and blocks > 0:
        return blocks
    below, above = blocks * block, (blocks + 1) * block
    nearest = f"that work are {below} and {above}" if below > 0 else f"that works is {above}"
    raise ValueError(f"{what} {size} is not a multiple of block {block}; the nearest {nearest}")


def window_size(block: int, halo: int) -> int:
    """Returns the pixels along one side of a block's window."""
    return block + 2 * halo


def table_size(block: int, halo: int) -> int:
    """Returns the rows of a relative table: one for each offset that a query and a key can have."""
    return 2 * block + 2 * halo - 1


def table_index(block: int, halo: int, stride: int = 1) -> np.ndarray:
    """Returns the table row of every (query, key) pair along one axis of a block.

    Query i sits at pixel `stride * i` of the block and key j at pixel `j - halo`; row r of a table
    holds the offset key - query = r - (block + halo - 1). The same for every block.

    Returns:
      An int32 array (block // stride, block + 2 * halo).
    """
    queries = stride * np.arange(block // stride, dtype=np.int32)
    keys = np.arange(window_size(block, halo), dtype=np.int32) - halo
    return keys[None, :] - queries[:, None] + (block + halo - 1)


def inside_image(size: int, block: int, halo: int) -> np.ndarray:
    """Returns which positions of each block's window lie inside the image, along one axis.

    Returns:
      A bool array (size // block, block + 2 * halo).
    """
    starts = block * np.arange(size // block)
    pixels = starts[:, None] + np.arange(window_size(block, halo))[None, :] - halo
    return (pixels >= 0) & (pixels < size)

"""Blocks, halos, padding and relative offsets: integers and numpy only.

An image axis of `size` pixels is cut into blocks of `block` pixels; the last block may reach over
the end of the image. The queries of a block see its window: the block and `halo` more pixels on
either side, `block + 2 * halo` in all. With a stride, only every `stride`-th pixel of a block is a
query.
"""

import dataclasses

import numpy as np

BORDERS = ("zeros", "mask")
POSITIONS = ("exact", "contiguous")


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


def table_size(block: int, halo: int, positions: str = "exact") -> int:
    """Returns the rows of a relative table.

    "exact" has one for each offset in pixels that a query and a key of its window can have,
    "contiguous" one for each offset between two positions of a window.
    """
    if positions not in POSITIONS:
        raise ValueError(
            f"positions {positions!r} is unknown; the known ones are {', '.join(POSITIONS)}"
        )
    return 2 * (block + halo) - 1 if positions == "exact" else 2 * (block + 2 * halo) - 1


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one call of the op computes, apart from its arrays; see `halo_attention`.

    `height` and `width` are those of the image in pixels, without padding. Where `row_devices`
    share its rows, an implementation computes one part of them, and keys and values come with
    `strips` more rows of blocks above and below: those of the neighbours as far as the halo
    reaches, and zeros.

    Raises:
      ValueError: an option that is unknown or does not fit, with what would do.
    """

    block: int
    halo: int
    stride: int
    border: str
    positions: str
    scale_positions: bool
    height: int
    width: int
    row_devices: int = 1

    def __post_init__(self):
        block, stride = self.block, self.stride
        if block < 1:
            raise ValueError(f"block {block} is not positive; HaloNet uses 8 to 14")
        if self.halo < 0:
            raise ValueError(f"halo {self.halo} is negative; 0 means no halo")
        if stride < 1 or block % stride:
            good = ", ".join(str(s) for s in range(1, block + 1) if block % s == 0)
            raise ValueError(f"stride {stride} does not divide block {block}; these do: {good}")
        if self.border not in BORDERS:
            known = ", ".join(BORDERS)
            raise ValueError(f"border {self.border!r} is unknown; the known ones are {known}")
        table_size(block, self.halo, self.positions)

    @property
    def side(self) -> int:
        """Queries along one side of a block."""
        return self.block // self.stride

    @property
    def window(self) -> int:
        """Keys along one side of a block's window."""
        return self.block + 2 * self.halo

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of blocks that cover the image, or a device's part of it."""
        rows, cols = -(-self.height // self.block), -(-self.width // self.block)
        return rows // self.row_devices, cols

    @property
    def strips(self) -> int:
        """Rows of blocks that keys and values have above, and below, those of the queries."""
        return -(-self.halo // self.block) if self.row_devices > 1 else 0

    def table_index(self) -> np.ndarray:
        """Returns the table row of every (query, key) pair along one axis, the same in each block.

        "exact": query i sits at pixel `stride * i` of the block and key j at pixel `j - halo`; row
        r of a table holds the offset key - query = r - (block + halo - 1). "contiguous": row r
        holds j - i = r - (window - 1), whatever the stride.

        Returns:
          An int32 array (side, window).
        """
        queries = np.arange(self.side, dtype=np.int32)[:, None]
        keys = np.arange(self.window, dtype=np.int32)[None, :]
        if self.positions == "contiguous":
            return keys - queries + (self.window - 1)
        return (keys - self.halo) - self.stride * queries + (self.block + self.halo - 1)

    def inside(self, size: int) -> np.ndarray:
        """Returns which positions of each block's window lie inside an axis of `size` pixels.

        Returns:
          A bool array (blocks, window), of as many blocks as cover the axis.
        """
        starts = np.arange(0, size, self.block)
        pixels = starts[:, None] + np.arange(self.window)[None, :] - self.halo
        return (pixels >= 0) & (pixels < size)

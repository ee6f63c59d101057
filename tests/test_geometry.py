"""Blocks, windows and relative offsets."""

import numpy as np
import pytest

from halonet.ops import check_blocks, geometry


def test_check_blocks_counts_blocks():
    assert [check_blocks(size, 8) for size in (8, 16, 56)] == [1, 2, 7]


@pytest.mark.parametrize(
    ("size", "block", "message"),
    [
        (30, 8, r"^height 30 is not a multiple of block 8; the nearest that work are 24 and 32$"),
        (5, 8, r"^height 5 is not a multiple of block 8; the nearest that works is 8$"),
        (0, 8, r"^height 0 is not a multiple of block 8; the nearest that works is 8$"),
    ],
)
def test_check_blocks_names_the_nearest_sizes(size, block, message):
    with pytest.raises(ValueError, match=message):
        check_blocks(size, block, "height")


@pytest.mark.parametrize(("block", "halo", "stride"), [(4, 1, 1), (4, 0, 2), (8, 3, 2), (2, 5, 1)])
def test_table_index_holds_true_offsets_and_fits_the_table(block, halo, stride):
    index = geometry.table_index(block, halo, stride)
    assert index.shape == (block // stride, geometry.window_size(block, halo))
    for i in range(index.shape[0]):
        for j in range(index.shape[1]):
            assert index[i, j] - (block + halo - 1) == (j - halo) - stride * i
    assert index.min() >= 0
    assert index.max() == geometry.table_size(block, halo) - 1
    # Stride 1 uses every row of the table; there is none to spare.
    assert stride > 1 or set(index.flat) == set(range(geometry.table_size(block, halo)))


def test_inside_image():
    inside = geometry.inside_image(size=6, block=2, halo=1).astype(int)
    np.testing.assert_array_equal(inside, [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    # A halo that reaches over the whole image.
    np.testing.assert_array_equal(
        geometry.inside_image(2, 2, 3).astype(int), [[0] * 3 + [1] * 2 + [0] * 3]
    )

"""Blocks, windows and relative offsets."""

import numpy as np
import pytest

from halonet.ops import check_blocks, geometry, table_size


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


def spec(block, halo, stride=1, positions="exact", height=8, width=8):
    return geometry.Spec(block, halo, stride, "zeros", positions, True, height, width)


SHAPES = pytest.mark.parametrize(
    ("block", "halo", "stride"), [(4, 1, 1), (4, 0, 2), (8, 3, 2), (2, 5, 1), (9, 2, 3)]
)


@SHAPES
def test_exact_rows_hold_true_offsets_and_fit_the_table(block, halo, stride):
    index, rows = spec(block, halo, stride).table_index(), table_size(block, halo)
    assert index.shape == (block // stride, block + 2 * halo)
    for i in range(index.shape[0]):
        for j in range(index.shape[1]):
            assert index[i, j] - (block + halo - 1) == (j - halo) - stride * i
    assert index.min() >= 0
    assert index.max() == rows - 1
    # Stride 1 uses every row of the table; there is none to spare.
    assert stride > 1 or set(index.flat) == set(range(rows))


@SHAPES
def test_contiguous_rows_count_within_the_window(block, halo, stride):
    index = spec(block, halo, stride, "contiguous").table_index()
    window = block + 2 * halo
    rows = table_size(block, halo, "contiguous")
    assert index.shape == (block // stride, window)
    assert rows == 2 * window - 1
    # The middle row is that of the first query and the first key.
    assert index[0, 0] == window - 1 == rows // 2
    assert (np.diff(index, axis=0) == -1).all()
    assert (np.diff(index, axis=1) == 1).all()
    assert index.min() >= 0
    assert index.max() == rows - 1


def test_positions_agree_at_stride_1_up_to_rows_without_use():
    exact, contiguous = (spec(4, 1, 1, name).table_index() for name in geometry.POSITIONS)
    np.testing.assert_array_equal(contiguous, exact + 2)
    exact, contiguous = (spec(4, 1, 2, name).table_index() for name in geometry.POSITIONS)
    assert len(np.unique(contiguous - exact)) > 1


@pytest.mark.parametrize("call", [lambda: table_size(4, 1, "true"), lambda: spec(4, 1, 1, "true")])
def test_unknown_positions_are_refused(call):
    message = r"^positions 'true' is unknown; the known ones are exact, contiguous$"
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("size", "block", "halo", "inside"),
    [
        (6, 2, 1, [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]),
        # A halo that reaches over the whole image.
        (2, 2, 3, [[0] * 3 + [1] * 2 + [0] * 3]),
        # The last block reaches over the end.
        (5, 2, 1, [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]),
        (1, 4, 1, [[0, 1, 0, 0, 0, 0]]),
    ],
)
def test_inside(size, block, halo, inside):
    np.testing.assert_array_equal(spec(block, halo).inside(size).astype(int), inside)


def test_blocks_cover_the_image():
    assert spec(4, 1, height=8, width=9).blocks == (2, 3)
    assert spec(4, 1, height=1, width=4).blocks == (1, 1)


def test_equal_specs_are_one_static_argument():
    assert hash(spec(4, 1)) == hash(spec(4, 1))
    assert spec(4, 1) == spec(4, 1) != spec(4, 2)

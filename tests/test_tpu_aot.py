"""What is read from libtpu's dump of a kernel's instructions. Nothing is compiled for a TPU."""

import pytest

from experiments import tpu_aot

# A grid of 12 steps (and two to fill and drain its pipeline), a loop of 7 and one of 5 inside.
BUNDLES = """\
= control target key start
LB: loop body
     0   :  { %s9_s0 = smov 0  ;;  %s20_s2 = smov (!%p2), 0 /* copy for cssa */ }
   0x1 LB: > { %s15_s17 = sphi %s9_s0, %s12_s17 /* phi copy :: iteration index, stage = 0 */ }
   0x2   : > { %s12_s17 = sadd.s32 1, %s15_s17 }
   0x3   :  {}
   0x4 LB: >> { %s30_s11 = smov 1  ;;  %s16_s9 = sphi %s20_s2, %s28_s9 /* phi copy */ }
   0x5 LB: >>> { %s30_s1 = sadd.s32 2, %s17_s1  ;;  %s17_s1 = sphi %s30_s11, %s30_s1 /* phi */ }
   0x6   : >>> { %p1 = scmp.ge.s32.totalorder %s30_s1, 11 /* loop exit test */ ;; vdelay 3 }
   0x7   : >>> { %s28_s9 = sadd.s32 (%p1), 1, %s16_s9 }
   0x8   : >>> { %p2 = scmp.ge.s32.totalorder (%p1), %s28_s9, 7 /* loop exit test */ }
   0x9   : >> { %v1 = vadd.f32 %v1, %v2 }
   0xa   : > { %p3 = scmp.ge.s32.totalorder %s12_s17, 14 /* loop exit test */ }
   0xb   :  { %v3 = vadd.f32 %v1, %v2 }
"""


def test_bundles_count_once_for_each_trip():
    once, grid, outer, inner = 2, 4, 2, 4 + 3
    assert tpu_aot.bundles(BUNDLES) == once + 12 * (grid + 7 * (outer + 5 * inner))


def test_bundles_of_an_outer_loop_within_an_inner_one_are_the_inner_ones():
    moved = BUNDLES.replace(
        "   0x7   : >>> {",
        "  0x60   :  {}\n  0x61   : > { %v1 = vadd.f32 %v1, %v2 }\n   0x7   : >>> {",
    )
    assert tpu_aot.bundles(moved) == tpu_aot.bundles(BUNDLES) + 12 * 7 * 5 * 2


def test_an_outer_loop_may_test_for_its_end_before_an_inner_one():
    grid = "0xa   : > { %p3 = scmp.ge.s32.totalorder %s12_s17, 14 /* loop exit test */ }"
    moved = BUNDLES.replace(grid, "0xa   : > { %v1 = vadd.f32 %v1, %v2 }")
    moved = moved.replace(
        "0x6   : >>> {", "0x6   : >>> {" + grid.split("{")[1].strip(" }") + "  ;; "
    )
    assert tpu_aot.bundles(moved) == tpu_aot.bundles(BUNDLES)


# The counters of the grid and of the innermost loop are put into memory and read back.
SPILLED = (
    BUNDLES.replace(
        "{ %v1 = vadd.f32 %v1, %v2 }\n",
        "{ %7 = sst [smem:[#allocation9_spill]] %s15_s17  ;;  %v1 = vadd.f32 %v1, %v2 }\n",
        1,
    )
    .replace(
        "{ %s12_s17 = sadd.s32 1, %s15_s17 }",
        "{ %s8_s2 = sld [smem:[#allocation9_spill]]  ;;  %s12_s17 = sadd.s32 1, %s8_s2 }",
    )
    .replace(
        "  ;;  %s17_s1 = sphi %s30_s11, %s30_s1 /* phi */ }",
        "  ;;  %8 = sst [smem:[#allocation3_spill]] (%p9), %s30_s1"
        "  ;;  %s17_s1 = sphi %s30_s11, %s99_s5  ;;  %s99_s5 = sld [smem:[#allocation3_spill]] }",
    )
    .replace("%s30_s1, 11", "%s99_s5, 11")
)


def test_counters_are_found_that_went_through_memory():
    assert SPILLED.count("spill") == 4
    assert tpu_aot.bundles(SPILLED) == tpu_aot.bundles(BUNDLES)


def test_a_counter_of_unknown_step_is_refused():
    unknown = SPILLED.replace(
        "] %s15_s17", "] %s15_s17  ;;  %9 = sst [smem:[#allocation3_spill]] %s4_s4"
    )
    with pytest.raises(
        NotImplementedError, match="no step is known of the kernel.s counter s99_s5"
    ):
        tpu_aot.bundles(unknown)


def test_a_kernel_loop_of_unknown_length_is_refused():
    with pytest.raises(NotImplementedError, match="a loop of the kernel"):
        tpu_aot.bundles(BUNDLES.replace("%s12_s17, 14", "%s12_s17, %s3_s3"))

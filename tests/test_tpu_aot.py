"""What is read from the texts of XLA and libtpu. Nothing is compiled for a TPU here."""

import importlib.util

import pytest

from experiments import tpu_aot

HLO = """\
HloModule jit_f, is_scheduled=true

%fused (p: bf16[16,64]) -> bf16[16,64] {
  %p = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %sine = bf16[16,64]{1,0:T(8,128)(2,1)} sine(%p), backend_config={"estimated_cycles":"999"}
}

%body (state: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %state = (s32[], bf16[16,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %it = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %fusion.1 = bf16[16,64]{1,0:T(8,128)(2,1)} fusion(%it), calls=%fused, metadata={op_name="jit(f)/sin"}, backend_config={"estimated_cycles":"70"}
  ROOT %out = (s32[], bf16[16,64]{1,0:T(8,128)(2,1)}) tuple(%it, %fusion.1)
}

%condition (state: (s32[], bf16[16,64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(11)
  %state = (s32[], bf16[16,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (x: bf16[16,64]) -> bf16[16,64] {
  %x = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} copy(%x), backend_config={"estimated_cycles":"5"}
  %copy-start.4 = (bf16[16,64]{1,0:T(8,128)(2,1)S(1)}, bf16[16,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done.4 = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.4)
  %slice-start.5 = ((bf16[16,64]{1,0:T(8,128)(2,1)}), bf16[4,64]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x)
  %halo.2 = bf16[16,64]{1,0:T(8,128)(2,1)} custom-call(%near), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/halo"}
  %while = (s32[], bf16[16,64]{1,0:T(8,128)(2,1)}) while(%halo.2), condition=%condition, body=%body
  ROOT %all-reduce.3 = f32[10,2]{1,0:T(8,128)} all-reduce(%halo.2), to_apply=%body
}
"""  # noqa: E501
TILED = 16 * 128 * 2  # bytes: 64 columns are padded to 128


def operations(hlo=HLO):
    return {op.name: op for op in tpu_aot.operations(hlo, kernels={"halo.2": 1234})}


def test_operations_are_those_that_run():
    found = operations()
    assert list(found) == [
        "near",
        "copy-start.4",
        "slice-start.5",
        "halo.2",
        "fusion.1",
        "all-reduce.3",
    ]
    assert (found["fusion.1"].times, found["fusion.1"].cycles) == (11, 70)
    assert found["fusion.1"].op_name == "jit(f)/sin"
    assert (found["halo.2"].kind, found["halo.2"].cycles) == ("kernel", 1234)


def test_bytes_are_those_of_hbm_with_the_padding_of_tiles():
    found = operations()
    assert found["near"].bytes == TILED  # read; what it makes lies in the chip's own memory
    assert found["halo.2"].bytes == TILED
    assert found["fusion.1"].bytes == 2 * TILED
    assert found["copy-start.4"].bytes == 16 * 64 * 2
    assert found["slice-start.5"].bytes == 4 * 64 * 2


def test_sums_of_a_program():
    program = tpu_aot.Program(None, tpu_aot.CHIPS["v5e"], tuple(operations().values()), {})
    assert program.xla_cycles == 5 + 11 * 70
    assert program.kernel_cycles == 1234
    assert program.collectives == {"all-reduce": (1, 80)}
    clock = 197e12 / (4 * 2 * 128 * 128)
    assert tpu_aot.CHIPS["v5e"].gigahertz == pytest.approx(clock / 1e9)
    # The loop waits for memory: 819 GB/s.
    in_loop = 11 * 2 * TILED / 819e9 * clock
    assert program.roofline_cycles(operations()["fusion.1"]) == pytest.approx(max(in_loop, 770))


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(NotImplementedError, match="the loop while does not run a constant number"):
        operations(HLO.replace("constant(11)", "add(%state)"))


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


def test_unknown_topologies_are_refused():
    with pytest.raises(ValueError, match=r"'v9:2x2' is of no known TPU; there are: v2, v3, v4"):
        tpu_aot.topology("v9:2x2")


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"`pip install -e \.\[tpu-aot\]` installs it"):
        tpu_aot.topology.__wrapped__("v5e:2x2")

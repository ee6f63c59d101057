"""What is read from the text of a compiled program. Nothing is compiled here."""

import pytest

from halonet import hlo

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


def operations(text=HLO):
    return {op.name: op for op in hlo.operations(text)}


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
    assert (found["halo.2"].kind, found["halo.2"].cycles) == ("kernel", 0)


def test_bytes_are_those_of_hbm_with_the_padding_of_tiles():
    found = operations()
    assert found["near"].bytes == TILED  # read; what it makes lies in the chip's own memory
    assert found["halo.2"].bytes == TILED
    assert found["fusion.1"].bytes == 2 * TILED
    assert found["copy-start.4"].bytes == 16 * 64 * 2
    assert found["slice-start.5"].bytes == 4 * 64 * 2


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(NotImplementedError, match="the loop while does not run a constant number"):
        operations(HLO.replace("constant(11)", "add(%state)"))


def test_a_loop_of_known_length_needs_no_counter():
    known = HLO.replace("constant(11)", "add(%state)").replace(
        "body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}\n'
    )
    assert operations(known)["fusion.1"].times == 7


@pytest.mark.parametrize(
    ("line", "kind", "found"),
    [
        ("f32[10,2]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}", "all-reduce", (1, 80, 2)),
        ("f32[10,2]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8]", "all-reduce", (1, 80, 4)),
        ("f32[10,2]{1,0} all-reduce-start(%x), to_apply=%f", "all-reduce", (1, 80, 0)),
        # These hold what goes in, too.
        (
            "(f32[5,2]{1,0}, f32[10,2]{1,0}) all-gather-start(%x), replica_groups=[4,2]<=[8]",
            "all-gather",
            (1, 80, 2),
        ),
        (
            "(f32[10,2]{1,0}, f32[10,2]{1,0}) collective-permute-start(%x)",
            "collective-permute",
            (1, 80, 0),
        ),
    ],
)
def test_collectives_are_counted_with_their_bytes_and_groups(line, kind, found):
    text = f"ENTRY %main (x: f32[10,2]) -> f32[10,2] {{\n  ROOT %it = {line}\n}}\n"
    assert hlo.collectives(tuple(hlo.operations(text))) == {kind: [found]}

"""What the estimator of steps on TPUs says of a program. Nothing is compiled for a TPU here."""

import json
import types

import pytest

from experiments import tpu_cost
from halonet import aot, hlo, tpu_kernels


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/jvp(HaloNet)/HaloNet._stem/stem_conv1/conv_general_dilated", "stem"),
        ("jit(train_step)/jvp(HaloNet)/HaloNet._stem/stem_bn1/reduce_sum", "norm"),
        ("jit(train_step)/transpose(jvp(HaloNet))/HaloNet._stem/select_and_scatter", "pool"),
        ("jit(train_step)/jvp(HaloNet)/stage1_block1/conv3/dot_general", "convolutions"),
        ("jit(train_step)/jvp(HaloNet)/stage1_block1/shortcut_conv/dot_general", "convolutions"),
        ("jit(train_step)/jvp(HaloNet)/stage1_block1/bn2/mul", "norm"),
        (
            "jit(train_step)/jvp(HaloNet)/stage1_block1/stage1_block1._mix/attention/key/dot",
            "projections",
        ),
        (
            "jit(train_step)/jvp(HaloNet)/stage1_block1/stage1_block1._mix/attention/jvp/call",
            "attention",
        ),
        ("jit(train_step)/jvp(HaloNet)/stage1_block1/jit(relu)/max", "activations and sums"),
        ("jit(train_step)/jvp(HaloNet)/head/dot_general", "head"),
        ("jit(train_step)/add", "loss and optimizer"),
        ("", "copies"),
    ],
)
def test_parts_of_a_network(op_name, part):
    assert tpu_cost.part_of(op_name) == part


def operation(name, cycles, moved=0, kind="fusion"):
    return hlo.Operation(name, kind, 1, cycles, moved, f"jit(train_step)/{name}", "f32[]")


def step():
    memory = {"argument": 1e6, "temp": 2e6, "output": 3e6, "generated_code": 4e6}
    sizes = {f"{name}_size_in_bytes": size for name, size in memory.items()}
    operations = (
        operation("jvp(HaloNet)/stage1_block1/bn1/mul", 600_000),
        operation("transpose(jvp(HaloNet))/stage1_block1/bn1/mul", 0, 819_000_000),
        operation("jvp(HaloNet)/stage1_block1/attention/halo", 902_893, kind="kernel"),
    )
    compiled = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes))
    return aot.Program(compiled, aot.CHIPS["v5e"], operations)


def test_report():
    """A millisecond each for memory and for the cycles of the other two: 2 ms."""
    found = tpu_cost.report(tpu_cost.Setup("resnet50", 224, 10, "v5e:2x2"), step())
    assert found["milliseconds"] == pytest.approx(2, rel=1e-3)
    assert found["images_per_second"] == pytest.approx(5000, rel=1e-3)
    assert found["memory_mb"]["temporaries"] == 2
    assert found["million_cycles"] == {"xla": 0.6, "kernels": 0.902893}
    # 4.09e9 multiply-adds an image (He et al. 2016, table 1, its stride in the 3x3 convolutions).
    assert found["model_teraflop"] == pytest.approx(6 * 4.09e9 * 10 / 1e12, rel=0.01)
    assert found["mfu"] == pytest.approx(found["model_teraflop"] / 2e-3 / 197, rel=1e-3)
    norm = found["profile_million_cycles"]["norm"]
    assert norm == {"forward": 0.6, "backward": pytest.approx(1.503, rel=1e-3)}


@pytest.mark.parametrize(
    ("topology", "turns"), [("v5e:2x2", 16), ("v6e:2x2", 16), ("v5p:2x2x1", 8)]
)
def test_cycles_of_a_kernel_are_those_of_its_turns(topology, turns):
    """Two cores of a v5p share out the images; it is one of them that computes a single image."""
    name, where = "halo_attention_backward.3", "jit(f)/HaloNet/stage1_block1/attention/halo"
    kernel = hlo.Operation(name, "kernel", 1, 0, 0, where, "(bf16[16,8,8,64,48]{4,3,2,1,0})")
    setup = tpu_cost.Setup("halonet_h0", 256, 16, topology)
    record = json.loads(tpu_kernels.RECORD.read_text())["layers"]
    one = record["H0 stage 1 (64x64, b8 h3, 4 x 16, d_v 16)"][topology.partition(":")[0]][
        "backward_cycles"
    ]
    assert tpu_cost.with_kernel_cycles(kernel, setup).cycles == turns * one


def test_heads_in_groups_are_shared_out_too():
    where, shape = "jit(f)/HaloNet/stage1_block1/attention/halo", "(bf16[32,8,14,196,112]{4})"
    kernel = hlo.Operation("halo_attention_forward", "kernel", 1, 0, 0, where, shape)
    setup = tpu_cost.Setup("halonet_h5", 448, 16, "v5p:2x2x1")
    record = json.loads(tpu_kernels.RECORD.read_text())["layers"]
    one = record["H5 stage 1 (112x112, b14 h2, 4 x 16, d_v 40)"]["v5p"]["forward_cycles"]
    assert tpu_cost.with_kernel_cycles(kernel, setup).cycles == 16 * one


def test_errors_stand_beside_every_estimate(monkeypatch, tmp_path, capsys):
    setup = tpu_cost.Setup("resnet50", 224, 10, "v5e:2x2")
    monkeypatch.setattr(tpu_cost, "RECORD", tmp_path / "record.txt")
    tpu_cost.show(tpu_cost.report(setup, step()), step(), top=1)
    assert "never compared with a measurement" in capsys.readouterr().out
    published = tpu_cost.Published(setup, 3e-3, "a page")
    monkeypatch.setattr(tpu_cost, "PUBLISHED", {"theirs": published})
    monkeypatch.setattr(tpu_cost, "compile_step", lambda setup: step())
    tpu_cost.calibrate("")
    tpu_cost.show(tpu_cost.report(setup, step()), step(), top=1)
    assert "1.50 x measured = 3.0 ms over 2.0 ms estimated: theirs" in capsys.readouterr().out

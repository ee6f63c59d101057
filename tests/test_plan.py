"""Plans: what they say, and what they refuse before anything compiles."""

import importlib.util
import json
import math
import re

import jax
import pytest

from configs import imagenet, mnist
from halonet import aot, fit, plan, plan_report
from halonet.config import ConfigError
from halonet.data.errors import DataError
from halonet.models import create_model

ROOT = plan.files.epath.Path(__file__).parent.parent
KEYS = {
    *("estimates", "model", "image_size", "batch_size", "settings", "topology", "data", "fits"),
    *("images_per_device", "trials", "largest_batch", "memory", "input", "flops", "mfu"),
    *("seconds", "collectives", "images_per_second", "schedule", "versions", "plan_seconds"),
}


def tiny(**overrides):
    """The smallest step there is, of configs/mnist.py."""
    config = mnist.get_config()
    settings = {"data.batch_size": 16, "model.bn_group": 2, "train.steps": 10}
    config.update_from_flattened_dict(settings | overrides)
    return config


@pytest.fixture(autouse=True)
def quick_input(monkeypatch):
    whole = plan.images_per_core_second
    monkeypatch.setattr(plan, "images_per_core_second", lambda config: whole(config, 0.01))


@pytest.fixture
def one_block(monkeypatch):
    """A model of one block of attention, compiled in a hurry."""

    def build(config, *, num_classes):
        fields = {"depths": (1,), "plan": "h", "widths": (16,), "heads": (2,)}
        fields["bn_group"] = config.model.bn_group
        return create_model("halonet_tiny", num_classes=num_classes, **fields)

    whole = jax.stages.Lowered.compile
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: whole(self, options))
    monkeypatch.setattr(plan.config_lib, "build_model", build)


@pytest.mark.usefixtures("one_block")
def test_a_plan_for_cpus(tmp_path, capsys):
    out = tmp_path / "plan.json"
    found = plan.plan(tiny(), topology="cpu:8", out=out)
    text = capsys.readouterr().out
    assert json.loads(out.read_text()) == found
    assert found.keys() == KEYS
    assert found["topology"] == {
        "name": "cpu:8",
        "chips": 0,
        "devices": 8,
        "devices_per_chip": 0,
        "mesh": {"data": 8, "fsdp": 1, "rows": 1},
    }
    # One all-reduce, of all gradients and batch statistics, and the sums of the metrics.
    memory, exchanged = found["memory"], found["collectives"]
    assert exchanged.keys() == {"all-reduce"}
    held = memory["parameters"] + memory["batch_statistics"]
    assert exchanged["all-reduce"]["count"] == 1
    assert held < exchanged["all-reduce"]["bytes"] < 1.3 * held
    assert memory["averages"] == held
    assert memory["optimizer"] > 2 * memory["parameters"]  # two moments
    assert memory["batch"] == 2 * (32 * 32 * 3 + 4)
    kinds = set(memory) - {"total", "limit"}
    assert memory["total"] == sum(memory[kind] for kind in kinds)
    assert found["flops"]["per_step"] == 16 * found["flops"]["per_image"]
    assert found["input"]["images_per_core_second"] > 0
    # Nobody knows what a CPU takes, and no figure is made up.
    nothing = ("fits", "mfu", "seconds", "images_per_second", "largest_batch")
    assert {found[name] for name in nothing} == {None}
    assert "there is no estimate for CPUs" in text
    assert "every figure is an estimate" in text


class Compiled:
    """What libtpu might have made of a step: one operation, and memory for each image."""

    def __init__(self, images):
        self.images = images

    def memory_analysis(self):
        return type("Memory", (), dict.fromkeys(
            [f"{name}_size_in_bytes" for name in ("argument", "output", "alias", "generated_code")],
            0,
        ) | {"temp_size_in_bytes": self.images * 2**30})  # fmt: skip

    def as_text(self):
        return (
            "ENTRY %main (x: bf16[16,64]) -> bf16[16,64] {\n"
            "  %x = bf16[16,64]{1,0} parameter(0)\n"
            "  %fusion = bf16[16,64]{1,0} fusion(%x), calls=%f, "
            f'backend_config={{"estimated_cycles":"{self.images * 1_000_000}"}}\n'
            "  ROOT %all-reduce.3 = f32[250000]{0} all-reduce(%fusion), "
            "replica_groups=[1,8]<=[8], to_apply=%g\n}\n"
        )


@pytest.fixture
def compiled(monkeypatch):
    """Plans for v5e:2x4 from eight CPU devices and a compiler that needs 1 GiB an image."""
    target = plan.Target("v5e:2x4", jax.devices(), aot.CHIPS["v5e"])
    monkeypatch.setattr(plan.Target, "of", lambda name: target)
    monkeypatch.setattr(plan.importlib.metadata, "version", lambda name: "0")
    asked = []

    def start(config, data, target, shares, images):
        asked.append(images)

        def compile_it():
            program = Compiled(images)
            memory = {
                "parameters": 2**30,
                "temporaries": program.memory_analysis().temp_size_in_bytes,
            }
            needed = sum(memory.values())
            if needed > target.limit:
                said = f"RESOURCE_EXHAUSTED: ({images}.00G) exceeds (15.75G)"
                return fit.Trial(images, fit.bytes_said(said), False, said=said)
            return fit.Trial(images, needed, True, memory, program)

        return compile_it

    monkeypatch.setattr(plan, "start_compiling", start)
    return asked


def test_a_plan_for_tpus(compiled, capsys):
    found = plan.plan(tiny(**{"data.batch_size": 64, "train.steps": 1000}), topology="v5e:2x4")
    text = capsys.readouterr().out
    assert found.keys() == KEYS
    assert sorted(compiled) == [4, 8]
    assert found["fits"] is True
    assert found["topology"]["chips"] == 8
    assert found["memory"]["total"] == 9 * 2**30
    assert found["memory"]["limit"] == 15.75 * 2**30
    # A GiB, one more for each image, and groups of two.
    assert found["largest_batch"] == {"images_per_device": 14, "batch_size": 112}
    clock = 197e12 / (4 * 2 * 128 * 128)
    # A megabyte, sent by two of the four links of 50 GB/s: neither axis is a ring.
    exchanged = 2 * 7 / 8 * 1e6 / 100e9
    seconds = found["seconds"]
    assert seconds["collectives"] == pytest.approx(exchanged)
    assert seconds["estimate"] == pytest.approx(8e6 / clock + exchanged, rel=1e-3)
    assert seconds["low"] == pytest.approx(0.78 * 8e6 / clock + exchanged, rel=1e-3)
    assert seconds["high"] == pytest.approx(0.91 * 8e6 / clock + exchanged, rel=1e-3)
    rate = found["images_per_second"]
    assert rate["estimate"] == pytest.approx(64 / seconds["estimate"])
    assert found["mfu"]["estimate"] == pytest.approx(
        rate["estimate"] * found["flops"]["per_image"] / (8 * 197e12)
    )
    assert found["schedule"]["days"]["estimate"] == pytest.approx(
        1000 * seconds["estimate"] / 86400
    )
    assert found["input"]["cores"] == pytest.approx(
        rate["high"] / found["input"]["images_per_core_second"]
    )
    assert "fits          yes, 8 images a device" in text
    assert "0.78 to 0.91 of such an estimate" in text


def test_what_does_not_fit_is_an_answer(compiled, capsys):
    found = plan.plan(tiny(**{"data.batch_size": 512}), topology="v5e:2x4")
    text = capsys.readouterr().out
    assert found["fits"] is False
    assert found["images_per_device"] == {"wanted": 64, "compiled": 6}
    assert [it["images_per_device"] for it in found["trials"]] == [2, 6, 64]
    assert found["largest_batch"]["images_per_device"] == 14
    assert "NO: 64 images a device; RESOURCE_EXHAUSTED: (64.00G) exceeds (15.75G)" in text
    assert "what follows is of 6 images a device" in text
    assert "--config.train.accumulate=8 makes the step" in text


def test_not_even_one_image_may_fit(compiled, monkeypatch, capsys):
    small = plan.dataclasses.replace(aot.CHIPS["v5e"], usable=0.5)
    target = plan.Target("v5e:2x4", jax.devices(), small)
    monkeypatch.setattr(plan.Target, "of", lambda name: target)
    found = plan.plan(tiny(), topology="v5e:2x4")
    assert found["fits"] is False
    assert found["largest_batch"]["images_per_device"] == 0
    assert found["seconds"] is None
    assert "nor does any smaller batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:3x3", r"v5e: 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16; and cpu:N$"),
        ("v9:2x2", r"there are v2: 2x2 .*; v6e: 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16; and cpu:N$"),
        ("v4:2x2", r"v4: 2x2x1 2x2x2 "),
        ("cpu:0", r"'cpu:0' is none that is known"),
        ("cpu:9", r"this process has 8 CPU devices$"),
        ("", r"--mode=plan needs --plan.topology: one of v2: 2x2 .* or cpu:N$"),
    ],
)
def test_topologies_that_are_refused(topology, message, monkeypatch):
    monkeypatch.setattr(plan, "start_compiling", None)
    with pytest.raises(ConfigError, match=message):
        plan.plan(tiny(), topology=topology)


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    aot.topology.cache_clear()
    with pytest.raises(ConfigError, match=r"v5e:2x4: compiling .* needs libtpu: `make tpu-aot`"):
        plan.plan(tiny(), topology="v5e:2x4")


def test_a_batch_that_the_devices_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="batch_size=12 cannot be shared by 8 devices"):
        plan.plan(tiny(**{"data.batch_size": 12}), topology="cpu:8")


@pytest.mark.parametrize(
    ("split", "examples"),
    [
        ("train", 1_281_167),
        ("train[:99%]", 1_268_355),
        ("train[99%:]", 12_812),
        ("train[1000:]", 1_280_167),
        ("validation", 50_000),
    ],
)
def test_the_sizes_of_imagenet_are_known(split, examples):
    config = imagenet.get_config()
    config.data.train_split = split
    data = plan.describe_data(config)
    assert (data.classes, data.examples) == (1000, examples)


def test_other_sizes_are_read_or_told():
    data = plan.describe_data(tiny(**{"data.name": "fake:640:7"}))
    assert (data.classes, data.examples) == (7, 640)
    absent = tiny(**{"data.name": "cifar100", "data.data_dir": "/nowhere", "train.epochs": 1})
    absent.train.steps = 0
    with pytest.raises(DataError, match=r"cifar100.*; without the data, --plan.classes=N and "):
        plan.describe_data(absent, classes=100)
    data = plan.describe_data(absent, classes=100, examples=50_000)
    assert (data.classes, data.examples) == (100, 50_000)
    absent.train.steps = 5  # the schedule asks for no examples
    assert plan.describe_data(absent, classes=100).classes == 100
    with pytest.raises(ConfigError, match=r"needs data_dir.*--plan.classes=N"):
        plan.describe_data(tiny(**{"data.name": "folder"}))


def test_the_calibration_is_that_of_the_record():
    record = (ROOT / "docs" / "tpu_calibration.txt").read_text()
    ratios = [float(ratio) for ratio in re.findall(r"^([\d.]+) x measured", record, re.MULTILINE)]
    assert (min(ratios), max(ratios)) == plan.MEASURED


def test_guessed_kernels_widen_the_range(compiled):
    found = plan.plan(tiny(**{"data.batch_size": 64}), topology="v5e:2x4")
    seconds = found["seconds"] | {"kernels_guessed": 0.002, "kernels_guessed_from": ["(a layer)"]}
    text = "\n".join(plan_report.lines(found | {"seconds": seconds}))
    assert "kernels of 2.0 ms are guessed from the layers most like theirs ((a layer))" in text


@pytest.mark.middle
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra tpu-aot")
def test_a_tiny_model_is_planned_for_a_tpu(monkeypatch, capsys):
    """The real compiler: it fits, the kernels' cycles are known, and it says nothing of its own."""
    found = plan.plan(tiny(**{"model.dtype": "bfloat16"}), topology="v5e:2x4")
    assert found.keys() == KEYS
    assert found["fits"] is True
    assert found["seconds"]["kernels"] > 0
    assert found["seconds"]["kernels_guessed"] == 0
    assert found["collectives"].keys() == {"all-reduce"}
    assert 0 < found["mfu"]["estimate"] < 1
    assert found["memory"]["code"] > 0
    assert not math.isinf(found["memory"]["limit"])
    assert capsys.readouterr().err == ""

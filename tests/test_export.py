"""Exports: they compute what the model does on real images, or there are none."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import halonet
from halonet import aot, export, exported
from halonet.checkpoint import CheckpointError
from halonet.config import ConfigError, load_config
from halonet.data.sources import open_source
from halonet.files import WriteError
from halonet.models import VARIANTS, create_model
from halonet.models.convert import weights
from halonet.models.convert.weights import UsageError
from tests.random_arrays import random_arrays
from tests.small_run import small_config
from tests.test_convert import make_run
from tests.test_golden_run import GOLDEN, STEP, registered

ROOT = pathlib.Path(__file__).parent.parent


def make(run, out, format="stablehlo", **settings):
    """Exports a run: the path and the metadata."""
    config = settings.pop("config", None) or load_config(run)
    return out, export.export_checkpoint(config, run, format=format, out=str(out), **settings)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """An export of the golden run, and its metadata; for reading only."""
    with pytest.MonkeyPatch.context() as patch:
        registered.__wrapped__(patch)
        return make(GOLDEN, tmp_path_factory.mktemp("exports") / "golden")


@pytest.fixture
def copy(golden, tmp_path):
    return pathlib.Path(shutil.copytree(golden[0], tmp_path / "golden"))


def digits(numbers):
    """Held-out digits, uint8 (N, 32, 32, 3)."""
    source = open_source("mnist5k", "test", data_dir="", image_size=32)
    return np.stack([source[number]["image"] for number in numbers])


def relative(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def of_model(run, images):
    """The logits of a restored run for images of its size."""
    apply = jax.jit(functools.partial(run.model.apply, train=False))
    return np.asarray(apply(run.variables, run.preprocess(images)))


def test_any_number_of_images_gives_the_logits_of_the_model(golden):
    """Eight and one when it was made, three here."""
    opened, images = halonet.load_export(golden[0]), digits((0, 300, 600))
    expected = of_model(halonet.load_run(GOLDEN), images)
    assert relative(opened.logits(images), expected) < export.BOUNDS["float32"]
    # And not because all are alike.
    assert relative(opened.logits(images[..., ::-1, :]), expected) > 1e-3


def test_it_says_what_it_is(golden):
    path, metadata = golden
    assert metadata == json.loads((path / "export.json").read_text())
    assert metadata == halonet.load_export(path).metadata
    run = halonet.load_run(GOLDEN)
    assert metadata["classes"] == list(run.classes)
    assert metadata["config"] == json.loads(json.dumps(run.config.to_dict()))
    assert metadata["input"] == {
        "name": "images",
        "shape": ["batch", 32, 32, 3],
        "dtype": "uint8",
    }
    assert metadata["output"]["shape"] == ["batch", 10]
    assert metadata["preprocessing"] == {
        "where": "inside",
        "image_size": 32,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": list(run.config.data.mean),
        "std": list(run.config.data.std),
    }
    assert metadata["checkpoint"] == {"workdir": str(GOLDEN), "step": STEP, "weights": "ema"}
    assert metadata["versions"]["jax"] == jax.__version__
    compared = metadata["compared"]
    assert (compared["images"], compared["of"]) == (export.IMAGES, "mnist5k/test")
    assert compared["same_top1"] == compared["images"]
    assert 0 <= compared["largest_difference"] <= compared["bound"] == export.BOUNDS["float32"]


def test_one_file_serves_every_platform(golden):
    program = jax.export.deserialize(bytearray((golden[0] / exported.PROGRAM).read_bytes()))
    assert program.platforms == export.PLATFORMS
    # Nothing in it is of one platform, or a kernel of ours: only the checks of shapes are calls.
    calls = {
        line.partition("custom_call")[2].split("(")[0].strip(" @")
        for line in program.mlir_module().splitlines()
        if "custom_call" in line
    }
    assert calls <= {"shape_assertion"}
    (images,) = program.in_avals
    assert [str(size) for size in images.shape] == ["batch", "32", "32", "3"]


@pytest.mark.middle
@pytest.mark.skipif(not aot.has_libtpu(), reason="libtpu is not installed (make tpu-aot)")
def test_it_compiles_for_a_tpu(golden):
    program = jax.export.deserialize(bytearray((golden[0] / exported.PROGRAM).read_bytes()))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8)
    assert aot.compile_for(program.call, images).xla_cycles > 0


FILES = ("export.json", "manifest.json", "program.stablehlo")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_export_is_refused(copy, file, share):
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[: int(share * len(data))])
    with pytest.raises(exported.ExportError, match=r" is damaged: ") as error:
        halonet.load_export(copy)
    assert error.value.exit_code == 4
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_refused(copy, file):
    data, rng = bytearray((copy / file).read_bytes()), np.random.default_rng(0)
    for bit in rng.integers(8 * len(data), size=40).tolist():
        data[bit // 8] ^= 1 << bit % 8
        (copy / file).write_bytes(data)
        with pytest.raises(exported.ExportError, match=r" is damaged: "):
            exported.verify(copy)
        data[bit // 8] ^= 1 << bit % 8
    (copy / file).write_bytes(data)
    assert exported.verify(copy)["model"] == "halonet_golden"


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_refused(copy, file):
    (copy / file).unlink()
    with pytest.raises(exported.ExportError, match=rf"{file}"):
        halonet.load_export(copy)


def test_what_is_no_export_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(exported.ExportError, match=r"is no export, .* no manifest\.json"):
            halonet.load_export(path)


def test_a_newer_format_is_refused(copy):
    metadata = json.loads((copy / "export.json").read_text())
    (copy / "export.json").write_text(json.dumps(metadata | {"format_version": 2}))
    exported.files.write_manifest(copy)
    with pytest.raises(exported.ExportError, match=r"format 'stablehlo' of version 2; .* update"):
        halonet.load_export(copy)


def test_the_command_says_what_is_whole_and_what_is_not(copy, capsys):
    exported.main([str(copy)])
    said = capsys.readouterr().out
    assert said.startswith(f"{copy} is whole\nstablehlo of halonet_golden, 10 classes: takes uint8")
    with (copy / exported.PROGRAM).open("ab") as file:
        file.write(b"!")
    with pytest.raises(SystemExit) as end:
        exported.main([str(copy)])
    assert end.value.code == 4
    assert capsys.readouterr().err == (
        f"error: {copy} is damaged: not as they were written: {exported.PROGRAM}\n"
    )


def test_the_command_runs_an_export(golden, tmp_path, capsys):
    images = digits((0, 300, 600))
    np.save(tmp_path / "images.npy", images)
    arguments = [f"--images={tmp_path / 'images.npy'}", f"--logits={tmp_path / 'logits.npy'}"]
    exported.main([str(golden[0]), *arguments])
    expected = of_model(halonet.load_run(GOLDEN), images)
    assert relative(np.load(tmp_path / "logits.npy"), expected) < export.BOUNDS["float32"]
    np.save(tmp_path / "images.npy", images[:, :28])
    with pytest.raises(SystemExit) as end:
        exported.main([str(golden[0]), *arguments])
    assert end.value.code == 2
    assert r"images are uint8[3, 28, 32, 3]; " in capsys.readouterr().err


def test_what_opens_an_export_imports_its_runtime_alone():
    code = (
        "import sys, halonet.exported; "
        "print(*{'jax', 'tensorflow', 'torch', 'orbax', 'flax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"out": ""}, ConfigError, r"no --export\.out: the folder to write"),
        ({"out": "gs://b/e"}, ConfigError, r"--export\.out=gs://b/e must be a folder of this"),
        ({"out": "."}, ConfigError, r"--export\.out=\. is there already; take another"),
        (
            {"format": "timm", "preprocess": "inside"},
            ConfigError,
            r"--export\.preprocess=inside: timm's models take normalised images",
        ),
        ({"format": "timm"}, UsageError, "'halonet_golden' is not one of timm's models; there are"),
        ({"step": "7"}, CheckpointError, "no checkpoint of step 7"),
        ({"weights": "best"}, ConfigError, "--mode=export: weights='best' are not in this run"),
        ({"checkpoint": "/nowhere"}, ConfigError, "/nowhere holds no run"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    tmp_path, settings, kind, message
):
    settings = {"format": "stablehlo", "out": str(tmp_path / "out"), **settings}
    with pytest.raises(kind, match=message) as error:
        export.export_checkpoint(load_config(GOLDEN), GOLDEN, **settings)
    assert error.value.exit_code in (2, 4)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_the_blocks_do_not_divide_is_refused(tmp_path):
    config = load_config(GOLDEN)
    config.data.image_size = 28
    with pytest.raises(ConfigError, match=r"config\.data\.image_size=28: .* nearest that work"):
        make(GOLDEN, tmp_path / "out", config=config, chosen=["data.image_size"])


@pytest.mark.parametrize("format", exported.RUNTIMES)
def test_a_missing_runtime_is_told(monkeypatch, format):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(exported.RuntimeMissingError, match=rf"^{format} needs .*: pip install "):
        exported.check_runtime(format)


LOGITS = np.linspace(-2, 4, 30, dtype=np.float32).reshape(3, 10)


@pytest.mark.parametrize(
    "found",
    [
        LOGITS + 4 * 2.1e-5,
        np.where(np.arange(10) == 3, np.nan, LOGITS),
        LOGITS[:, ::-1],
        LOGITS[:2],
    ],
    ids=["a little more than the bound", "no number", "other classes", "images are missing"],
)
def test_what_differs_from_the_model_is_refused(found):
    with pytest.raises(exported.ExportError, match=r"not kept: its logits .* the model's"):
        export._compare(found, LOGITS, 2e-5)


def test_what_differs_by_rounding_is_not():
    found = export._compare(LOGITS + 4 * 1e-5, LOGITS, 2e-5)
    assert (found["bound"], found["largest_logit"], found["same_top1"]) == (2e-5, 4.0, 3)
    np.testing.assert_allclose(found["largest_difference"], 1e-5, rtol=0.1)


def test_what_does_not_run_is_not_kept(tmp_path, monkeypatch):
    """In a process of its own indeed: the writer's file is no program."""
    monkeypatch.setitem(
        export._WRITERS, "stablehlo", lambda part, *_: (part / exported.PROGRAM).write_bytes(b"?")
    )
    with pytest.raises(exported.ExportError, match="does not run, and is not kept: "):
        make(GOLDEN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export._WRITERS, "stablehlo", full)
    with pytest.raises(WriteError, match=r"out cannot be written: No space left on device; "):
        make(GOLDEN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


COMPARED = {"bound": 1e-5, "largest_difference": 1e-7, "largest_logit": 1.0, "same_top1": 17}


def test_what_a_kill_left_goes_and_what_is_being_written_stays(tmp_path, monkeypatch):
    monkeypatch.setitem(export._WRITERS, "stablehlo", lambda part, *_: (part / "x").touch())
    monkeypatch.setattr(export, "_run_alone", lambda part, images: exported.verify(part))
    monkeypatch.setattr(export, "_compare", lambda found, *_: COMPARED)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = (f"out.{dead.pid}.part", f"out.{os.getppid()}.part", f"other.{dead.pid}.part", "mine")
    for name in names:
        (tmp_path / name).mkdir()
    _, metadata = make(GOLDEN, tmp_path / "out")
    assert metadata["compared"] == {"images": export.IMAGES, "of": "mnist5k/test", **COMPARED}
    assert {path.name for path in tmp_path.iterdir()} == {"out", *names[1:]}


def test_timm_is_told_the_architecture_and_what_it_sees(tmp_path):
    run = halonet.load_run(GOLDEN)
    # Numbers name nothing, and timm would take them for names.
    for classes, names in ((run.classes, None), (tuple("abcdefghij"), list("abcdefghij"))):
        export._write_timm(tmp_path, dataclasses.replace(run, classes=classes), run.config, False)
        found = json.loads((tmp_path / "config.json").read_text())
        assert found.pop("label_names", None) == names
        assert found == {
            "architecture": "halonet_golden",
            "num_classes": 10,
            "num_features": 16,
            "global_pool": "avg",
            "pretrained_cfg": {
                "custom_load": False,
                "fixed_input_size": False,
                "input_size": [3, 32, 32],
                "num_classes": 10,
                "interpolation": "bilinear",
                "crop_pct": 1.0,
                "crop_mode": "center",
                "mean": [0.1] * 3,
                "std": [0.275] * 3,
                "first_conv": "stem.conv",
                "classifier": "head.fc",
            },
        }
    arrays = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        arrays["head.fc.weight"].T, run.variables["params"]["head"]["kernel"]
    )


# Of halonet_tiny: what each format holds, and images that come normalised.
@pytest.mark.middle
@pytest.mark.parametrize(
    ("format", "preprocess"),
    [("stablehlo", "outside"), ("savedmodel", ""), ("savedmodel", "outside")],
)
def test_a_trained_run_agrees(undisturbed, tmp_path, format, preprocess):
    workdir, _ = undisturbed
    path, metadata = make(
        workdir, tmp_path / "out", format, config=small_config(), preprocess=preprocess
    )
    assert metadata["compared"]["of"] == "mnist5k/test"
    assert metadata["compared"]["largest_difference"] < 2e-6
    run, images = halonet.load_run(workdir), digits(range(0, 1000, 200))
    inside = metadata["preprocessing"]["where"] == "inside"
    assert inside == (preprocess == "")
    given = images if inside else run.preprocess(images)
    found = halonet.load_export(path).logits(given)
    assert relative(found, of_model(run, images)) < 2e-6


@pytest.mark.middle
@pytest.mark.parametrize("format", ["stablehlo", "savedmodel"])
def test_published_weights_agree_on_photographs(tmp_path, capsys, format):
    """Convolutions, attention that pools, and channel attention, with weights of timm's names."""
    name, size = "haloregnetz_b", 224
    model = create_model(name, num_classes=3)
    entries = weights.timm_entries(model)
    arrays = random_arrays({entry.theirs: entry.shape for entry in entries})
    variables, _ = weights.to_variables(arrays, entries, model)
    make_run(tmp_path / "run", name, size=size, **variables)
    config = small_config(**{"data.name": "imagenet2012", "data.data_dir": "/nowhere"})
    _, metadata = make(tmp_path / "run", tmp_path / "out", format, config=config)
    assert "is compared on scikit-learn's photographs" in capsys.readouterr().out
    assert metadata["compared"]["of"] == "scikit-learn's photographs"
    assert metadata["input"]["shape"] == ["batch", size, size, 3]
    assert metadata["compared"]["largest_difference"] < 5e-6


@pytest.mark.middle
def test_bfloat16_agrees_within_its_own_bound(undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed[0], tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["dtype"] = "bfloat16"
    (workdir / "config.json").write_text(json.dumps(config))
    _, metadata = make(workdir, tmp_path / "out", config=small_config())
    assert metadata["compared"]["bound"] == export.BOUNDS["bfloat16"]
    # In float32 it is less.
    assert metadata["compared"]["largest_difference"] > 2e-6


@pytest.mark.middle
def test_the_command_line_exports(tmp_path):
    """As a user calls it, and where the data set of the run is not there."""
    workdir = tmp_path / "run"
    shutil.copytree(GOLDEN, workdir)
    program = (
        "import sys, runpy; from tests.test_golden_run import FIELDS, NAME\n"
        "from halonet.models import VARIANTS; from halonet.models.registry import Variant\n"
        "VARIANTS[NAME] = Variant(32, 0, FIELDS, 'ours')\n"
        "sys.argv = ['main.py', *sys.argv[1:]]; runpy.run_path('main.py', run_name='__main__')"
    )
    command = [
        *(sys.executable, "-c", program, "--config=configs/mnist.py", f"--workdir={workdir}"),
        *("--mode=export", f"--export.out={tmp_path / 'out'}", "--config.data.image_size=64"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "takes uint8 images ['batch', 64, 64, 3], preprocessing inside" in done.stdout
    assert exported.verify(tmp_path / "out")["preprocessing"]["image_size"] == 64
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (
        2,
        f"error: --export.out={tmp_path / 'out'} is there already; take another, or remove it\n",
    )


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_model_takes_any_number_of_images(name):
    size = VARIANTS[name].image_size
    model = create_model(name, num_classes=10)
    (batch,) = jax.export.symbolic_shape("batch")
    function = export.program(model, mean=(0.5,) * 3, std=(0.5,) * 3, inside=True)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)
    variables = model.abstract_variables(size, size)
    made = jax.export.export(jax.jit(function), platforms=export.PLATFORMS)(variables, images)
    assert [str(it) for it in made.out_avals[0].shape] == ["batch", "10"]

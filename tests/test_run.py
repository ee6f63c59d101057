"""`load_run` and the evaluation of checkpoints, on a run of a few steps."""

import asyncio
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

import halonet
from halonet import checkpoint, evaluate, files, metrics, processes, sharding
from halonet.config import ConfigError, center_view
from halonet.data.errors import DataError
from halonet.run import load_run, resolve_step
from tests.small_run import small_config

CONFIG = small_config()


@pytest.fixture(scope="module")
def workdir(undisturbed, tmp_path_factory):
    """A run of which step 15 is the best by far, as its record says."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(undisturbed[0], folder)
    record = {"step": 30, "perf/started": 1.0}, {"step": 15, "eval/top1": 1.0}
    lines = "".join(json.dumps(row) + "\n" for row in record)
    (folder / "metrics" / "001.jsonl").write_text(lines)
    return folder


def test_it_opens_in_one_line(workdir):
    run = halonet.load_run(str(workdir))
    assert run.classes == tuple("0123456789")
    assert run.weights == "ema"
    assert run.config.model.name == "halonet_tiny"
    probabilities = run.predict(np.zeros((3, 32, 32, 3), np.uint8))
    assert probabilities.shape == (3, 10)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1.0, atol=1e-5)


def test_it_opens_without_the_data_set(workdir, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the data set was opened")

    monkeypatch.setattr("halonet.data.sources.open_source", refuse)
    assert load_run(workdir).step in checkpoint.saved_steps(workdir)


def test_it_opens_inside_a_running_event_loop(workdir):
    async def notebook():
        return load_run(workdir, step="latest").step

    assert asyncio.run(notebook()) == 30


def test_best_latest_and_number(workdir):
    assert resolve_step(workdir, "best") == 15
    assert resolve_step(workdir, "latest") == 30
    assert resolve_step(workdir, "26") == resolve_step(workdir, 26) == 26
    assert load_run(workdir / checkpoint.FOLDER / "26").step == 26
    with pytest.raises(ValueError, match="step='newest' is not 'best', 'latest' or a number"):
        load_run(workdir, step="newest")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"no checkpoint of step 5 .*found: .*26, 30"
    ):
        load_run(workdir, step=5)


class Spread(jax.sharding.Sharding):
    """What `load_run` asks of a sharding before it opens anything: it spans processes."""

    is_fully_addressable = False


class Opened(Exception):
    """Raised with the step that would be restored."""


def several(monkeypatch, *, index, says=None):
    """Makes this one process `index` of several; `says` is the number and the code of process 0."""

    def open_step(workdir, step):
        raise Opened(step)

    sent = []
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.broadcast_one_to_all",
        lambda value: sent.append(value.tolist()) or (value if says is None else np.array(says)),
    )
    return sent, open_step


def test_processes_open_the_step_that_the_first_one_finds(workdir, monkeypatch):
    sent, open_step = several(monkeypatch, index=1, says=(26, 0))
    monkeypatch.setattr(checkpoint, "step_folder", open_step)
    with pytest.raises(Opened, match="26"):
        load_run(workdir, "latest", sharding=Spread())
    assert sent == [[0, 0]]


@pytest.mark.parametrize(
    ("folder", "step", "kind", "code"),
    [
        ("", 5, checkpoint.CheckpointError, 4),
        ("empty", "best", ConfigError, 2),
        ("", "newest", ValueError, 1),
    ],
)
def test_what_the_first_process_does_not_find_all_refuse(
    workdir, monkeypatch, folder, step, kind, code
):
    sent, _ = several(monkeypatch, index=0)
    with pytest.raises(kind):
        load_run(workdir / folder, step, sharding=Spread())
    assert sent == [[0, code]]
    several(monkeypatch, index=1, says=(0, code))
    # Even where this one finds it.
    with pytest.raises(processes.RefusedError, match="process 0 refused; it says why") as refusal:
        load_run(workdir, 26, sharding=Spread())
    assert refusal.value.exit_code == code


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run: there is no config.json"):
        load_run(tmp_path)


def test_averaged_and_raw_weights_differ(workdir):
    averaged, raw = (load_run(workdir, "latest", weights=kind) for kind in ("ema", "raw"))
    kernels = [run.variables["params"]["head"]["kernel"] for run in (averaged, raw)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0
    with pytest.raises(ValueError, match="weights='best' are not in this run; 'raw' are"):
        load_run(workdir, weights="best")


def test_preprocess_takes_arrays_and_pictures_of_any_size(workdir):
    run = load_run(workdir)
    gray = np.random.default_rng(0).integers(0, 256, (40, 32), np.uint8)
    picture = Image.fromarray(gray)
    array = np.repeat(gray[..., None], 3, axis=-1)
    output = run.preprocess([gray, picture, array])
    assert output.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(output[0], output[1])
    np.testing.assert_array_equal(output[0], output[2])
    mean, std = np.array(run.config.data.mean), np.array(run.config.data.std)
    np.testing.assert_allclose(output[2], (array[4:36] / 255 - mean) / std, atol=1e-5)
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match=rf"an image is {wrong.dtype} of shape .* must be uin"):
            run.preprocess([wrong])


def test_preprocess_takes_files_as_the_pipeline_does(workdir, tmp_path):
    """Decoded by their content, and the middle of them resized as evaluation does."""
    run = load_run(workdir)
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "a.jpg", "PNG")
    view = center_view(run.config)
    expected = view((tmp_path / "a.jpg").read_bytes())
    output = run.preprocess([tmp_path / "a.jpg", str(tmp_path / "a.jpg"), array])
    mean, std = np.array(run.config.data.mean), np.array(run.config.data.std)
    for found in output:
        np.testing.assert_allclose(found, (expected / 255 - mean) / std, atol=1e-5)
    with Image.open(tmp_path / "a.jpg") as picture:
        np.testing.assert_array_equal(run.preprocess([picture])[0], output[0])


def test_pictures_of_any_mode_are_read_as_their_files(workdir, tmp_path):
    run = load_run(workdir)
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
    rgba = Image.fromarray(array)
    palette = rgba.convert("RGB").quantize(64)
    palette.info["transparency"] = 3
    deep = Image.fromarray(array[..., 0].astype(np.uint16) * 256 + 255)
    for number, picture in enumerate((rgba, palette, deep)):
        path = tmp_path / f"{number}.png"
        picture.save(path)
        np.testing.assert_array_equal(*run.preprocess([picture, path]))
    assert palette.info["transparency"] == 3
    np.testing.assert_array_equal(*run.preprocess([rgba, array[..., :3]]))


def test_a_file_that_is_missing_or_damaged_is_named(workdir, tmp_path):
    run, path = load_run(workdir), tmp_path / "a.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(path)
    for content, message in (
        (path.read_bytes()[:60], f"{path} is not a readable image: damaged image of 60 bytes: "),
        (b"text", f"{path} is not a readable image: 4 bytes are no JPEG, PNG, WebP, GIF or BMP"),
        (None, f"{path} cannot be read: No such file or directory"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DataError, match=f"^{re.escape(message)}[^\n]*$") as refused:
            run.predict([path])
        assert refused.value.exit_code == 3


def test_one_image_alone_is_refused(workdir):
    run = load_run(workdir)
    with pytest.raises(ValueError, match=r"images='cat.jpg' is one image; give a list: \[image\]"):
        run.predict("cat.jpg")
    with pytest.raises(ValueError, match=r"images has shape \(32, 32, 3\), that of one image"):
        run.predict(np.zeros((32, 32, 3), np.uint8))


def test_evaluation_of_a_checkpoint_equals_that_of_the_run(workdir, tmp_path, capsys, monkeypatch):
    written, whole = [], files.write_whole
    monkeypatch.setattr(
        files, "write_whole", lambda path, text: (written.append(path), whole(path, text))
    )
    result = evaluate.evaluate_checkpoint(CONFIG, workdir, step="latest")
    row = next(
        row for row in metrics.read_metrics(workdir) if "eval/top5" in row and row["step"] == 30
    )
    assert result["count"] == 1000
    assert (result["top1"], result["top5"]) == (row["eval/top1"], row["eval/top5"])
    np.testing.assert_allclose(result["loss"], row["eval/loss"], rtol=1e-6)
    assert json.loads((workdir / "evaluation.json").read_text()) == result
    assert written == [workdir / "evaluation.json"]
    assert result["fingerprint"] == evaluate.open_split(CONFIG, "test").fingerprint
    assert result["config"] == json.loads((workdir / "config.json").read_text())
    assert result["versions"]["jax"] == jax.__version__
    assert {it["count"] for it in result["classes"].values()} == {100}
    hits = sum(it["hits"] for it in result["classes"].values())
    assert hits == round(1000 * result["top1"])
    with Image.open(workdir / "reliability.png") as picture:
        assert picture.format == "PNG"
    printed = capsys.readouterr().out
    assert re.search(r"step 30 \(ema weights\) on mnist5k/test: top-1 [\d.]+ % \(95 %", printed)

    smaller = small_config(**{"data.crop_pct": 0.5, "data.interpolation": "bicubic"})
    chosen = {"step": "latest", "checkpoint": str(workdir), "weights": "raw"}
    chosen["chosen"] = ("data.interpolation", "seed")
    elsewhere = evaluate.evaluate_checkpoint(smaller, tmp_path / "new", **chosen)
    assert elsewhere["weights"] == "raw"
    assert (elsewhere["crop_pct"], elsewhere["interpolation"]) == (1.0, "bicubic")
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text()) == elsewhere


@pytest.mark.middle
def test_suites_are_scored_beside_the_split(workdir, tmp_path, capsys):
    """ReaL and V2 as TFDS has them, but for their size: digits of the split, some unlabelled."""
    import tensorflow_datasets as tfds

    from tests.test_sources import prepare

    digits = evaluate.open_split(CONFIG, "test")
    names = tfds.features.ClassLabel(names=list("0123456789"))

    def image(index):
        file = io.BytesIO()
        Image.fromarray(digits[index]["image"]).save(file, "PNG")
        file.seek(0)
        return file

    def label(index):
        return digits[index]["label"]

    encoded = {"image": tfds.features.Image(shape=(None, None, 3)), "label": names}
    folder = prepare(
        tmp_path, "v2", labels=label, images=image, features=encoded, splits={"test": 9}
    )
    (tmp_path / "imagenet_v2").mkdir()
    folder.parent.rename(tmp_path / "imagenet_v2" / "matched-frequency")
    features = {
        "image": encoded["image"],
        "original_label": names,
        "real_label": tfds.features.Sequence(names),
    }
    prepare(
        *(tmp_path, "imagenet2012_real"),
        # Of twelve three have no label, three their own, three all and three a wrong one.
        labels=lambda i: [[], [label(i)], list(range(10)), [(label(i) + 1) % 10]][i % 4],
        images=image,
        features=features,
        splits={"validation": 12},
    )
    config = small_config(**{"data.data_dir": str(tmp_path), "eval.batch_size": 8})
    result = evaluate.evaluate_checkpoint(
        config, tmp_path / "out", checkpoint=str(workdir), step="latest", suites=["real", "v2"]
    )
    logits = load_run(workdir, "latest").predict([digits[i]["image"] for i in range(12)])
    right = logits.argmax(axis=-1) == [label(i) for i in range(12)]
    wrong = logits.argmax(axis=-1) == [(label(i) + 1) % 10 for i in range(12)]
    real, v2 = result["suites"]["real"], result["suites"]["v2"]
    assert result["count"] == 1000
    assert (v2["count"], v2["top1"]) == (9, right[:9].sum() / 9)
    assert v2["data"] == "imagenet_v2/matched-frequency/test"
    assert (real["count"], real["top1"]) == (9, (right[1::4].sum() + 3 + wrong[3::4].sum()) / 9)
    assert real["fingerprint"]["num_examples"] == 12
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result
    printed = capsys.readouterr().out
    assert re.search(r"on imagenet2012_real/validation: top-1 [\d.]+ % .* 9 examples", printed)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [8, 1000, 1008])
def test_each_example_counts_once(workdir, batch_size, devices):
    config = small_config(**{"eval.batch_size": batch_size})
    source = evaluate.open_split(config, "test")
    of_mesh = np.array(jax.devices()[:devices]).reshape(-1, 1, 1)
    mesh = jax.sharding.Mesh(of_mesh, ("data", "fsdp", "rows"))
    run = load_run(workdir, "latest", sharding=sharding.replicated(mesh))

    def all_zero(variables, batch):
        logits = jax.nn.one_hot(jax.numpy.zeros_like(batch["label"]), 10)
        mask = batch["mask"].astype("float32")
        return {
            "top1": ((batch["label"] == 0) * mask).sum(),
            "count": mask.sum(),
            "classes": (logits.sum(axis=-1) * mask).sum(),
        }

    batches = evaluate.eval_batches(config, source, mesh)
    scores = evaluate.evaluate(jax.jit(all_zero), run.variables, batches)
    assert scores == {"top1": 0.1, "classes": 1.0, "count": 1000}


@pytest.mark.middle
def test_a_model_opens_with_another_window(workdir):
    run = halonet.load_run(workdir, halo_size=2, border="mask")
    assert (run.model.halo_size, run.model.border) == (2, "mask")
    assert run.variables["params"]["stage1_block1"]["attention"]["row_table"].shape[0] == 11
    assert run.predict(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 10)
    with pytest.raises(ValueError, match="unknown option of halonet_tiny 'halo'; did you mean"):
        load_run(workdir, halo=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_classes": 5}, "num_classes=5 is another model: build it with create_model"),
        ({"name": "halonet_h0"}, "name='halonet_h0' is another model"),
        ({"border": "wrap"}, "border 'wrap' is unknown"),
        ({"halo_size": -5}, "halo_size -5 must be at least 0"),
        ({"positions": "contiguous"}, "cannot take tables of positions='exact'"),
        (
            {"plan": "c/h"},
            "do not fit .*stage1_block1/conv2/kernel: nothing there, .* want",
        ),
        ({"depths": (1, 2)}, r"stage2_block3/bn1/bias: float32\[64\] there, nothing wanted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_override_that_needs_other_weights_is_refused(workdir, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_run(workdir, **overrides)


def test_a_run_opens_as_a_backbone(workdir):
    run = load_run(workdir, features_only=True, pad_to_blocks=True)
    maps = jax.eval_shape(
        lambda x: run.model.apply(run.variables, x, train=False), np.zeros((1, 50, 35, 3), "f")
    )
    assert [found.shape for found in maps] == [(1, 25, 18, 64), (1, 13, 9, 128)]
    with pytest.raises(ValueError, match="no classes to predict"):
        run.predict(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    ("size", "padding"), [(48, False), pytest.param(40, True, marks=pytest.mark.middle)]
)
def test_a_model_is_evaluated_at_another_size(workdir, tmp_path, size, padding):
    settings = {"data.image_size": size, "model.pad_to_blocks": padding}
    config = small_config(**settings, **{"train.steps": 0})  # how long to train is not its affair
    result = evaluate.evaluate_checkpoint(config, tmp_path, checkpoint=str(workdir))
    assert result["count"] == 1000
    config.model.pad_to_blocks = False
    config.model.positions = "contiguous"
    with pytest.raises(ConfigError, match="mode=evaluate: positions='contiguous' cannot take"):
        evaluate.evaluate_checkpoint(config, tmp_path, checkpoint=str(workdir))
    config.model.positions = ""
    if padding:
        with pytest.raises(ConfigError, match="image_size=40: .*; with pad_to_blocks any size"):
            evaluate.evaluate_checkpoint(config, tmp_path, checkpoint=str(workdir))


def test_other_classes_are_refused(workdir):
    config = small_config(**{"data.name": "fake:64:7", "data.eval_split": "test"})
    with pytest.raises(DataError, match="has 10 classes and config.data.name=fake:64:7 has 7"):
        evaluate.evaluate_checkpoint(config, workdir)


def test_classes_in_another_order_are_refused():
    where, data = epath.Path("runs/a"), "config.data.name=folder:b"
    names, other = ("cat", "dog", "owl"), ("cat", "owl", "dog")
    evaluate._check_classes(names, names, where, data)
    # Of those without names nobody knows better.
    evaluate._check_classes(("0", "1", "2"), names, where, data)
    evaluate._check_classes(names, ("0", "1", "2"), where, data)
    message = f"class 1 of runs/a is 'dog' and that of {data} is 'owl'; evaluate it on the data it"
    with pytest.raises(DataError, match=re.escape(message)):
        evaluate._check_classes(names, other, where, data)
    with pytest.raises(DataError, match="class 0 of"):
        evaluate._check_classes(("2", "1", "0"), ("3", "2", "1"), where, data)


def test_the_classes_of_the_data_are_compared_with_those_of_the_run(workdir, monkeypatch):
    def letters(config, split, name=""):
        source = open_split(config, split, name)
        source.classes = tuple("abcdefghij")
        return source

    open_split, read = evaluate.open_split, checkpoint.read_meta
    monkeypatch.setattr(evaluate, "open_split", letters)
    trained = {"classes": list("abcdefghji")}
    monkeypatch.setattr(checkpoint, "read_meta", lambda folder: {**read(folder), **trained})
    with pytest.raises(DataError, match="class 8 of .* is 'j' and that of config.data.name=mnist"):
        evaluate.evaluate_checkpoint(CONFIG, workdir)


def test_wrong_settings_are_refused(workdir):
    for key, value, message in (
        ("eval.batch_size", 0, "config.eval.batch_size=0 must be above 0"),
        ("data.image_size", 36, "config.data.image_size=36: image height 36 .* work: 32 and 48"),
        ("mesh.fsdp", 3, "config.mesh.data=0 x mesh.fsdp=3 x mesh.rows=1 does not fit 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate.evaluate_checkpoint(small_config(**{key: value}), workdir)
    with pytest.raises(ConfigError, match="--mode=evaluate: step='newest' is not 'best'"):
        evaluate.evaluate_checkpoint(CONFIG, workdir, step="newest")


def test_it_is_normalised_as_it_was_trained(workdir):
    other = small_config(**{"data.mean": (0.9, 0.9, 0.9)})
    expected = evaluate.evaluate_checkpoint(CONFIG, workdir, step="latest")
    assert evaluate.evaluate_checkpoint(other, workdir, step="latest") == expected


@pytest.mark.parametrize(
    ("fraction", "count", "interval"),
    [(0.5, 100, (0.4038, 0.5962)), (1.0, 1000, (0.9962, 1.0)), (0.9, 10, (0.5958, 0.9821))],
)
def test_wilson_interval(fraction, count, interval):
    """Against published values of the score interval."""
    np.testing.assert_allclose(evaluate.wilson_interval(fraction, count), interval, atol=1e-4)

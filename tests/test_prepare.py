"""Preparation: archives are found here or asked for in one line, and nothing is downloaded."""

import fcntl
import shutil

import pytest

from halonet.data import prepare, sources
from halonet.data.errors import DataError
from tests.test_sources import encoded

URL = "https://example.invalid/pictures/names.txt?download=1"


@pytest.fixture
def toy(monkeypatch):
    """A builder of two splits from pictures.tar and from a file that it would download."""
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir should contain `pictures.tar`."
        url_infos = {}  # noqa: RUF012

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["ant", "bee"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            names = manager.download(URL)
            assert names.read_text() == "ant bee"
            if (manager.manual_dir / "pictures.tar").read_text() == "damaged":
                raise OSError("unexpected end of data\nin pictures.tar")
            return {"train": self._generate_examples(4), "val": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": encoded(i), "label": i % 2}

    monkeypatch.setattr(prepare, "_builder_class", lambda name: Toy)
    return Toy


@pytest.fixture
def manual(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / "pictures.tar").write_text("whole")
    (folder / "names.txt").write_text("ant bee")
    return folder


def prepared(tmp_path, manual, name="toy"):
    """The folder and the counts that preparation returns, and what it said."""
    said = []
    data_dir = str(tmp_path / "data")
    done = prepare.prepare(name, manual_dir=str(manual), data_dir=data_dir, say=said.append)
    return (*done, said)


def fails(tmp_path, manual, match, name="toy"):
    with pytest.raises(DataError, match=match) as caught:
        prepared(tmp_path, manual, name)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_archives_become_shards_once(toy, tmp_path, manual):
    folder, counts, said = prepared(tmp_path, manual)
    assert folder == tmp_path / "data" / "toy" / "1.0.0"
    assert counts == {"train": 4, "val": 2}
    assert said == [f"preparing toy from {manual} in {folder}"]
    source = sources.open_source("toy", "train", data_dir=str(tmp_path / "data"), image_size=8)
    assert {source[i]["image"] for i in range(4)} == {encoded(i).read() for i in range(4)}
    # Neither TFDS's downloads nor what it extracted stay behind.
    visible = [path for path in (tmp_path / "data").rglob("*") if path.name != ".lock"]
    assert {path.parent for path in visible if path.is_file()} == {folder}

    before = {path: path.stat().st_mtime_ns for path in visible}
    shutil.rmtree(manual)
    assert prepared(tmp_path, manual) == (
        *(folder, counts),
        [f"toy is prepared already, in {folder}"],
    )
    assert {path: path.stat().st_mtime_ns for path in visible} == before


def test_what_is_missing_is_named(toy, tmp_path, manual):
    (manual / "names.txt").rename(manual / "names (1).txt")
    fails(
        tmp_path,
        manual,
        r"^toy needs names\.txt: download https://example\.invalid/pictures/names\.txt\?download=1"
        rf" into {manual}$",
    )
    (manual / "pictures.tar").rename(manual / "picture.tar")
    fails(
        tmp_path,
        manual,
        rf"^toy is prepared from pictures\.tar, and {manual} lacks pictures\.tar "
        r"\(found: names \(1\)\.txt, picture\.tar\)$",
    )
    shutil.rmtree(manual)
    fails(tmp_path, manual, rf"^there is no folder {manual}; toy is prepared from pictures\.tar in")
    assert not list((tmp_path / "data").rglob("*.json"))


def test_an_interrupted_preparation_starts_again(toy, tmp_path, manual):
    base = tmp_path / "data" / "toy"
    left = [base / "incomplete.ABC_1.0.0", base / ".preparing.xyz"]
    for folder in left:
        (folder / "extracted").mkdir(parents=True)
        (folder / "extracted" / "half").write_text("half")
    _, counts, said = prepared(tmp_path, manual)
    assert counts == {"train": 4, "val": 2}
    assert said[:2] == [
        f"removing {folder}, half-written when a preparation was interrupted" for folder in left
    ]
    assert not any(folder.exists() for folder in left)


def test_a_second_preparation_is_kept_out(toy, tmp_path, manual):
    base = tmp_path / "data" / "toy"
    (base / "incomplete.ABC_1.0.0").mkdir(parents=True)
    with open(base / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(tmp_path, manual, rf"another process is preparing in {base}; wait for it")
    assert (base / "incomplete.ABC_1.0.0").exists()
    assert prepared(tmp_path, manual)[1] == {"train": 4, "val": 2}


def test_a_full_disk_is_noticed_beforehand(toy, tmp_path, manual, monkeypatch):
    with open(manual / "pictures.tar", "w") as file:
        file.truncate(150_000_000_000)  # sparse
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fails(tmp_path, manual, r"has 20\.0 GB free, and the shards take about 150\.0 GB; free some")


def test_damaged_archives_are_one_line(toy, tmp_path, manual):
    (manual / "pictures.tar").write_text("damaged")
    fails(
        tmp_path,
        manual,
        rf"^toy cannot be prepared from {manual}: OSError: unexpected end of data in pictures.tar$",
    )
    # Nothing half-written looks like a data set.
    assert [path.name for path in (tmp_path / "data" / "toy").iterdir()] == [".lock"]


def test_what_is_there_must_be_whole(toy, tmp_path, manual):
    folder, _, _ = prepared(tmp_path, manual)
    next(folder.glob("toy-val*")).unlink()
    again = rf"; or remove {folder} and prepare it again$"
    fails(
        tmp_path, manual, rf"lacks 1 of the 1 shards of split 'val': toy-val\.array_record.*{again}"
    )
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    fails(tmp_path, manual, rf"prepared as tfrecord, .* convert it with: .*{again}")
    info.write_text(info.read_text()[:50])
    fails(tmp_path, manual, "has a damaged dataset_info.json: .*; remove the folder of that file")
    # Then nothing is known of it, and TFDS would pass it over as prepared.
    info.unlink()
    aside = folder.with_name("1.0.0.incomplete")
    counts, said = prepared(tmp_path, manual)[1:]
    assert counts == {"train": 4, "val": 2}
    assert f"moving {folder}, which has no dataset_info.json, to {aside}" in said
    assert list(aside.glob("toy-train*"))
    source = sources.open_source("toy", "val", data_dir=str(tmp_path / "data"), image_size=8)
    assert source.folder == folder


def test_names_and_places_that_cannot_be(tmp_path, manual):
    fails(
        tmp_path,
        manual,
        "has no data set 'imagenet2013'; did you mean 'imagenet2012'",
        "imagenet2013",
    )
    fails(tmp_path, manual, "'a b' is no name", "a b")
    fails(
        tmp_path, manual, "cannot be prepared: BuilderConfig threshold-0", "imagenet_v2/threshold-0"
    )
    with pytest.raises(
        DataError, match="gs://bucket/data is in a bucket; prepare in a local folder"
    ):
        prepare.prepare("imagenet2012", manual_dir=str(manual), data_dir="gs://bucket/data")


def test_places_that_cannot_be_written(toy, tmp_path, manual):
    (tmp_path / "data").write_text("a file")
    fails(tmp_path, manual, r"^toy cannot be prepared in .*: .*Not a directory: .*/data/toy'$")
    (tmp_path / "data").unlink()
    (tmp_path / "data" / "toy").mkdir(parents=True)
    (tmp_path / "data" / "toy" / "incomplete.x").write_text("a file")
    fails(tmp_path, manual, r"^toy cannot be prepared in .*: .*Not a directory: .*incomplete\.x")


def test_archives_are_those_that_tfds_asks_for():
    train, val = (f"ILSVRC2012_img_{split}.tar" for split in ("train", "val"))
    for name, archives in (
        ("imagenet2012", [train, val]),
        ("imagenet2012_real", [val]),
        ("imagenet_v2/matched-frequency", []),
    ):
        assert prepare.expected_archives(prepare.manual_instructions(name)) == archives

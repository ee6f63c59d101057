"""The doctor's parts: what is counted, which damage is found, what a core makes."""

import io
import itertools
import time

import pytest
from PIL import Image

from halonet.data import check, sources
from halonet.data.errors import DamagedImageError, DamagedShardError, DataError
from halonet.data.views import CenterView
from tests.test_sources import prepare


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder


def opened(folder, name="toy", split="train", size=8):
    return sources.open_source(name, split, data_dir=str(folder), image_size=size)


def test_a_data_set_is_described(data_dir):
    source = opened(data_dir, split="train[:4]")
    assert check.describe(source) == (
        f"toy in {data_dir}/toy/1.0.0, array_record: 3 classes (ant, bee, cat)"
    )
    assert check.examples(source) == {"train": 10, "val": 3, "train[:4]": 4}
    digits = opened("", "mnist5k", "test", 32)
    assert check.describe(digits) == "mnist5k: 10 classes (0, 1, 2, ...)"
    assert check.examples(digits) == {"test": 1000}


def test_other_counts_than_the_published_are_told(tmp_path):
    prepare(tmp_path, "imagenet2012")
    assert check.unusual_counts(opened(tmp_path, "imagenet2012")) == [
        "split train of imagenet2012 has 10 examples, and the published numbers are of 1,281,167",
        "split validation of imagenet2012 has 0 examples, and the published numbers are of 50,000",
    ]
    source = opened(tmp_path, "imagenet2012:1.0.0")
    source.splits = {"train": 1_281_167, "validation": 50_000, "test": 100_000}
    assert check.unusual_counts(source) == []
    assert check.unusual_counts(opened("", "mnist5k", "test", 32)) == []


def test_a_damaged_shard_is_found(tmp_path):
    shard = next(prepare(tmp_path).glob("*train*"))
    source = opened(tmp_path)
    assert check.read_shards(source) == []
    whole = shard.read_bytes()
    found, refused = [], []
    for at in range(0, 12_000, 97):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            found += check.read_shards(opened(tmp_path))
        except DataError as error:  # in the first example, or in what tells where examples are
            refused.append(str(error))
    assert found
    assert refused
    for error in found:
        assert isinstance(error, DamagedShardError)
        assert str(error).startswith(
            "example 9 of split 'train' of data set 'toy' (toy-train.array_record-00000-of-00001) "
            "cannot be read: "
        )


def test_a_sample_is_from_all_over_and_says_what_is_damaged(tmp_path):
    for split, name in itertools.product(("train", "val"), ("ant", "bee")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        for i in range(30):
            file = io.BytesIO()
            Image.new("RGB", (20, 10), (8 * i, 0, 200 * (name == "bee"))).save(file, "PNG")
            (folder / f"{i:02}.png").write_bytes(file.getvalue())
    bad = tmp_path / "train" / "bee" / "29.png"
    bad.write_bytes(bad.read_bytes()[:40])
    source = opened(tmp_path, "folder")
    views = (CenterView(4), CenterView(8))
    (small, large), names, damaged = check.decode_sample(source, views, 7)
    assert small.shape == (6, 4, 4, 3)
    assert large.shape == (6, 8, 8, 3)
    assert names == ["ant"] * 4 + ["bee"] * 2
    assert small[:, 0, 0].tolist() == large[:, 0, 0].tolist()
    assert [row[0] // 8 for row in small[:, 0, 0].tolist()] == [0, 9, 19, 29, 9, 19]
    (error,) = damaged
    assert isinstance(error, DamagedImageError)
    assert str(error).startswith(f"{bad} is not a readable image: ")
    # All there are, where there are fewer.
    assert len(check.decode_sample(source, views, 1000)[1]) == 59


def test_archives_are_found_or_missing(tmp_path):
    (tmp_path / "a_train.tar").write_bytes(b"x" * 2_500_000)
    assert check.archives("Put a_train.tar and a_val.tar into it.", str(tmp_path)) == [
        f"{tmp_path}/a_train.tar: 2.5 MB",
        f"{tmp_path}/a_val.tar: missing",
    ]


def work(image, rng):
    began = time.thread_time()
    while time.thread_time() < began + 0.005:
        pass
    return image


def wait(image, rng):
    time.sleep(0.005)
    return image


def test_the_rate_is_measured():
    """Of images that keep a core busy for 5 ms each, and of images that make it wait as long."""

    source = opened("", "fake:1000:10", "train")
    settings = {"batch_size": 4, "seconds": 0.2}
    rate = check.measure_rate(source, work, **settings, threads=1)
    assert 100 < rate.images_per_core_second <= 200
    assert rate.images_per_second < 250
    # Waiting takes no core, and threads wait together.
    alone, threads, workers = (
        check.measure_rate(source, wait, **settings, **at_once)
        for at_once in ({}, {"threads": 4}, {"workers": 4})
    )
    assert alone.images_per_core_second > 400
    assert alone.images_per_second < 250
    assert threads.images_per_second > 2 * alone.images_per_second
    assert workers.images_per_second > 2 * alone.images_per_second


def test_a_drawn_photograph_is_of_the_size_of_imagenets():
    photograph = check.photograph()
    assert photograph == check.photograph()
    assert 100_000 < len(photograph) < 120_000
    assert Image.open(io.BytesIO(photograph)).size == (500, 375)


def test_the_rate_of_a_core_counts_what_the_view_takes():
    def view(image, rng):
        began = time.thread_time()
        while time.thread_time() < began + 0.01:
            pass

    assert check.core_rate(view, b"", seconds=0.05) == pytest.approx(100, rel=0.1)

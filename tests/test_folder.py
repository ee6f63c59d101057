"""Folders of images: splits and labels that stay, listings that are small, errors of one line."""

import concurrent.futures
import hashlib
import io
import json
import logging
import multiprocessing.reduction
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from halonet.data import decode
from halonet.data.errors import DataError
from halonet.data.folder import FolderImages
from halonet.data.sources import Source

CLASSES = ("cat", "dog", "ox")


def fill(folder, names, content=b"bytes of "):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(content + name.encode())


@pytest.fixture
def divided(tmp_path):
    """train/ and val/ of three classes; val/ has one class less, train/ some litter."""
    for label, name in enumerate(CLASSES):
        fill(tmp_path / "train" / name, [f"{i}.JPEG" for i in range(3 + label)])
    for name in CLASSES[:2]:
        fill(tmp_path / "val" / name, ["a.png", "b.webp"])
    fill(tmp_path / "train" / "cat", ["Z.JpG", "notes.txt", "list", ".hidden.jpg"])
    fill(tmp_path / "train" / ".cache", ["x.jpg"])
    fill(tmp_path, ["README"])
    return tmp_path


@pytest.fixture
def classes(tmp_path):
    """One folder of three classes, of 200 images each."""
    for name in CLASSES:
        fill(tmp_path / name, [f"n{i:05}.jpg" for i in range(200)])
    return tmp_path


def fails(match, *args, error=DataError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        FolderImages(*args, **kwargs)
    assert "\n" not in str(caught.value)


def files(source):
    return [os.path.relpath(source.path(i), source.name) for i in range(len(source))]


def test_divided_by_folders(divided, caplog):
    with caplog.at_level(logging.WARNING):
        train = FolderImages(divided, "train")
    assert isinstance(train, Source)
    assert train.classes == CLASSES
    assert (train.name, train.split) == (str(divided), "train")
    assert files(train)[:5] == [
        *("train/cat/0.JPEG", "train/cat/1.JPEG", "train/cat/2.JPEG", "train/cat/Z.JpG"),
        "train/dog/0.JPEG",
    ]
    assert [train[i]["label"] for i in range(len(train))] == [0] * 4 + [1] * 4 + [2] * 5
    assert train[3] == {"image": b"bytes of Z.JpG", "label": 0}
    assert train[-1] == {"image": b"bytes of 4.JPEG", "label": 2}
    assert {type(train[i]["label"]) for i in range(13)} == {int}
    for outside in (13, -14):
        with pytest.raises(IndexError):
            train[outside]
    assert train.other_files == 2
    assert ".txt (1)" in caplog.text
    assert "none (1)" in caplog.text


def test_labels_are_those_of_training_in_every_split(divided):
    fill(divided / "train" / "ant", ["0.jpg"])
    val = FolderImages(divided, "val")
    assert val.classes == ("ant", *CLASSES)
    assert [val[i]["label"] for i in range(len(val))] == [1, 1, 2, 2]
    assert val[0]["image"] == b"bytes of a.png"
    (divided / "val").rename(divided / "validation")
    assert FolderImages(divided, "val").fingerprint == val.fingerprint
    assert FolderImages(divided, "validation").fingerprint == val.fingerprint
    shutil.copytree(divided / "validation", divided / "test")
    assert len(FolderImages(divided, "test")) == 4
    # Without a train/ the evaluation's own classes are all there is.
    shutil.rmtree(divided / "train")
    assert FolderImages(divided, "val").classes == CLASSES[:2]


def test_divided_by_a_seed(classes):
    train, val = (FolderImages(classes, split) for split in ("train", "val"))
    assert train.classes == val.classes == CLASSES
    assert not set(files(train)) & set(files(val))
    assert len(train) + len(val) == 600
    counts = np.bincount([val[i]["label"] for i in range(len(val))])
    # Binomial with mean 20: four standard deviations of 4.2.
    assert (np.abs(counts - 20) < 17).all()
    other = FolderImages(classes, "val", seed=1)
    assert set(files(other)) != set(files(val))
    assert len(set(files(other)) & set(files(val))) < 25
    half = FolderImages(classes, "val", held_out=0.5)
    assert abs(len(half) - 300) < 50
    assert set(files(val)) <= set(files(half))


def test_the_seed_divides_by_the_hash_that_is_promised(classes):
    def held_out(name):
        digest = hashlib.sha256(b"7/" + name.encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < 0.1

    everything = [f"{name}/n{i:05}.jpg" for name in CLASSES for i in range(200)]
    val = FolderImages(classes, "val", seed=7)
    assert files(val) == [name for name in everything if held_out(name)]


def test_a_share_of_train_is_held_out_by_the_same_hash(tmp_path):
    for name in CLASSES:
        fill(tmp_path / "train" / name, [f"n{i:05}.jpg" for i in range(200)])
    fill(tmp_path / "val" / "cat", ["0.jpg"])
    whole, rest, held_out = (
        FolderImages(tmp_path, split) for split in ("train", "train[:90%]", "train[90%:]")
    )
    assert whole.classes == rest.classes == held_out.classes == CLASSES

    def fraction(path):
        name = "/".join(path.split("/")[1:])
        return int(hashlib.sha256(b"0/" + name.encode()).hexdigest()[:16], 16) / 2**64

    assert files(held_out) == [path for path in files(whole) if fraction(path) >= 0.9]
    assert files(rest) == [path for path in files(whole) if fraction(path) < 0.9]
    # Binomial with mean 60: four standard deviations of 7.3.
    assert abs(len(held_out) - 60) < 30
    assert {held_out[i]["label"] for i in range(len(held_out))} == {0, 1, 2}
    middle = FolderImages(tmp_path, "train[40%:60%]")
    assert files(middle) == [path for path in files(whole) if 0.4 <= fraction(path) < 0.6]
    assert files(FolderImages(tmp_path, "train[:]")) == files(whole)
    prints = [source.fingerprint for source in (whole, rest, held_out, middle)]
    assert len({json.dumps(known) for known in prints}) == 4
    assert prints[1]["split"] == "train[:90%]"

    for split in ("train[:50]", "train[60%:40%]", "train[:101%]", "train[90%:", "train[:1.5%]"):
        fails(
            r"written in whole per cent, such as train\[:99%\] and train\[99%:\]", tmp_path, split
        )
    fails(r"no split 'dev\[:9%\]'|no split 'dev'", tmp_path, "dev[:9%]")
    fails("'val.0%:1%.' .* has 0 images", tmp_path, "val[0%:1%]")
    fill(tmp_path / "train" / "elk", ["0.jpg"])
    share = "train[:50%]" if fraction("train/elk/0.jpg") >= 0.5 else "train[50%:]"
    fails("leaves no image for training: elk; add images or take another share$", tmp_path, share)
    share = share.replace("train", "val")
    fill(tmp_path / "val" / "elk", ["0.jpg"])
    fill(tmp_path / "val" / "cat", [f"{i}.jpg" for i in range(20)])
    assert "elk" in FolderImages(tmp_path, share).classes  # none of it in the share, which may be


def test_images_stay_in_their_split_whatever_comes_and_goes(classes):
    before = {split: set(files(FolderImages(classes, split))) for split in ("train", "val")}
    fill(classes / "cat", [f"added{i}.png" for i in range(50)])
    fill(classes / "bee", [f"{i}.png" for i in range(50)])
    for i in range(100):
        (classes / "dog" / f"n{i:05}.jpg").unlink()
    for split, names in before.items():
        after = set(files(FolderImages(classes, split)))
        gone = {f"dog/n{i:05}.jpg" for i in range(100)}
        assert names - gone == {name for name in after if "added" not in name and "bee" not in name}


def test_fingerprint_tells_other_data_apart(divided, tmp_path_factory):
    first = FolderImages(divided, "train").fingerprint
    assert json.loads(json.dumps(first)) == first
    assert first["num_examples"] == 13
    assert first["split"] == "train"
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.copytree(divided, moved)
    assert FolderImages(moved, "train").fingerprint == first
    changes = (
        lambda: (moved / "train" / "cat" / "0.JPEG").write_bytes(b"longer than it was before"),
        lambda: (moved / "train" / "cat" / "1.JPEG").rename(moved / "train" / "cat" / "9.JPEG"),
        lambda: (moved / "train" / "dog").rename(moved / "train" / "fox"),
    )
    seen = [first]
    for change in changes:
        change()
        fingerprint = FolderImages(moved, "train").fingerprint
        assert fingerprint not in seen
        assert (fingerprint["classes_hash"] == first["classes_hash"]) == (len(seen) < 3)
        seen.append(fingerprint)


def test_the_order_is_that_of_bytes_and_not_of_the_disk(tmp_path):
    names = ["b.jpg", "B.jpg", "a.jpg", "é.jpg", "10.jpg", "9.jpg"]
    for folder, order in (("one", names), ("two", names[::-1])):
        fill(tmp_path / folder / "train" / "class", order)
    one, two = (FolderImages(tmp_path / folder, "train") for folder in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    expected = ("10.jpg", "9.jpg", "B.jpg", "a.jpg", "b.jpg", "é.jpg")
    assert files(one) == files(two) == [f"train/class/{name}" for name in expected]


def test_workers_and_threads_share_it(classes):
    source = FolderImages(classes, "train")
    pickled = multiprocessing.reduction.ForkingPickler.dumps(source)
    # Ten bytes of name and two of where it ends, not an object of Python for each.
    assert len(pickled) / len(source) < 16
    again = multiprocessing.reduction.ForkingPickler.loads(pickled)
    assert again.fingerprint == source.fingerprint
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        items = list(pool.map(source.__getitem__, range(len(source))))
    assert items == [again[i] for i in range(len(source))]


def test_photographs_in_folders_decode(tmp_path):
    """Tiles of two real photographs, in all formats, under whatever suffix."""
    kinds = [("JPEG", "jpg"), ("PNG", "JPEG"), ("WEBP", "webp"), ("JPEG", "png")]
    tiles = {}
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (tmp_path / name).mkdir()
        for i in range(40):
            top, left = 64 * (i % 5), 64 * (i // 5)
            kind, suffix = kinds[i % 4]
            path = str(tmp_path / name / f"{i:02}.{suffix}")
            tiles[path] = photograph[top : top + 64, left : left + 64]
            Image.fromarray(tiles[path]).save(path, kind, quality=95)
    sources = [FolderImages(tmp_path, split) for split in ("train", "val")]
    paths = [source.path(i) for source in sources for i in range(len(source))]
    assert sorted(paths) == sorted(tiles)
    items = [source[i] for source in sources for i in range(len(source))]
    for path, item in zip(paths, items, strict=True):
        assert ("china", "flower")[item["label"]] in path
        # Another tile is off by 20 or more.
        assert np.abs(decode.decode(item["image"]).astype(int) - tiles[path]).mean() < 8


def test_nothing_there(tmp_path):
    fails("none cannot be read: No such file", tmp_path / "none", "train")
    fails("has no class folders", tmp_path, "train")
    fill(tmp_path, ["a.jpg"])
    fails("has no class folders; each class needs a folder", tmp_path, "train")
    fails("a.jpg cannot be read: Not a directory", tmp_path / "a.jpg", "train")
    fails("is in a bucket", "gs://bucket/pets", "train")


def test_splits_that_are_not_there(divided, classes):
    fails(r"no split 'test' \(found: train, val\)", divided, "test")
    fails("no split 'minival'", divided, "minival")
    shutil.rmtree(divided / "val")
    fails(r"no split 'val' \(found: train\); .*train alone is divided by a seed", divided, "val")


def test_one_folder_of_classes_has_two_splits(classes):
    fails("no split 'test': it holds classes, which a seed divides", classes, "test")
    for held_out in (0, 1, -0.5):
        fails("must be above 0", classes, "val", held_out=held_out, error=ValueError)


def test_both_names_of_a_split(divided):
    fill(divided / "validation" / "cat", ["1.jpg"])
    fails("has both val and validation", divided, "val")


def test_classes_without_images(divided, tmp_path_factory):
    (divided / "train" / "elk").mkdir()
    fill(divided / "train" / "gnu", ["only.txt"])
    fails(r"train has classes without images: elk, gnu; add images \(\.jpg", divided, "train")
    fill(divided / "train" / "elk", ["1.jpg"])
    (divided / "val" / "elk").mkdir()
    fails("val has classes without images: elk", divided, "val")
    one = tmp_path_factory.mktemp("one")
    fill(one / "cat", ["1.jpg"])
    (one / "dog").mkdir()
    for split in ("train", "val"):
        fails("has classes without images: dog", one, split)


def test_a_class_that_is_held_out_whole(tmp_path):
    fill(tmp_path / "cat", ["1.jpg"])
    (seed,) = (s for s in range(9) if hashlib.sha256(b"%d/cat/1.jpg" % s).digest()[0] < 0.1 * 255)
    fails(
        f"seed={seed} leaves no image for training: cat; add images or divide it into train/ and "
        "val/ yourself$",
        *(tmp_path, "train"),
        seed=seed,
    )
    assert len(FolderImages(tmp_path, "val", seed=seed)) == 1
    fails("split 'val' of folder .* has 0 images", tmp_path, "val", seed=seed + 1)


def test_classes_unknown_to_training(divided):
    fill(divided / "val" / "yak", ["1.jpg"])
    fails("val has classes that train/ lacks: yak", divided, "val")


def test_folders_in_classes(divided):
    fill(divided / "train" / "cat" / "kittens", ["1.jpg"])
    fails("kittens lies in a class folder", divided, "train")


def test_reading_names_the_file(divided):
    source = FolderImages(divided, "train")
    os.unlink(divided / "train" / "cat" / "1.JPEG")
    with pytest.raises(DataError, match=r"train/cat/1\.JPEG cannot be read: No such file"):
        source[1]
    (divided / "train" / "dog" / "gone.jpg").symlink_to(divided / "nowhere")
    fails(r"gone\.jpg cannot be read: No such file", divided, "train")


def test_bytes_are_read_as_they_are(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "PNG")
    for i in range(30):
        fill(tmp_path / "red", [f"{i}.jpg"])
        (tmp_path / "red" / f"{i}.jpg").write_bytes(file.getvalue())
    assert FolderImages(tmp_path, "train")[0]["image"] == file.getvalue()

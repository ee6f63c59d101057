"""Images in folders, one folder a class, as a source of encoded images.

    pets/train/cat/1.jpg    pets/val/cat/7.jpg      the splits are folders
    pets/cat/1.jpg          pets/dog/2.png          or a seed divides one folder of classes

The split train of the first way can be divided too, to tune on a part of it without a look at val:
train[:99%] and train[99%:].

ImageNet-21k comes the second way, as 21,841 folders n01440764 and so on. Its 14 million names are
kept as one string of bytes and an array of where each ends: 25 bytes an image instead of 100.
"""

import collections
import hashlib
import logging
import operator
import os
import pathlib
import re
import typing

import numpy as np

from halonet.data.errors import DataError

_SPLITS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}
_ALIASES = {alias: split for split, folders in _SPLITS.items() for alias in folders}
_SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp")


class EncodedExample(typing.TypedDict):
    """The bytes of one image file, and its class as an int."""

    image: bytes
    label: int


class FolderImages:
    """The image files of a folder of class folders, in the order of class and file name.

    Files count as images by their suffix (.jpg, .jpeg, .png, .webp, in any case) and are decoded by
    their content. Hidden files and folders are passed over; other files are counted, in
    `other_files`, and logged.

    The classes are the names of the folders in sorted order: those of train/ for all splits, so
    that a label means the same in each.

    Args:
      folder: holds train/ and val/ (or validation/) and perhaps test/, or else the class folders.
      split: "train", "val" ("validation") or "test" for the first kind, or a share of one of them
        such as "train[:99%]", in whole per cent; "train" or "val" for the second.
      seed: decides which images are held out for the second kind, and which are in a share for the
        first, by the SHA-256 of seed and path as a fraction: "val" are those where it is below
        `held_out`, "train[99%:]" those where it is from 0.99 on. So an image stays in its split
        whatever else is added or removed, and the fraction is met on average.
      held_out: fraction of the images that is the split "val", for the second kind only.

    Raises DataError if the folder or the split is missing, a class has no images (or none in the
    larger part of a divided train), class folders contain folders, or val/ has classes that train/
    lacks; ValueError if held_out is not between 0 and 1.
    """

    def __init__(
        self, folder: str | os.PathLike, split: str, *, seed: int = 0, held_out: float = 0.1
    ):
        if not 0 < held_out < 1:
            raise ValueError(f"held_out={held_out} must be above 0 and below 1; 0.1 is usual")
        if re.match(r"\w+://", str(folder)):
            raise DataError(
                f"folder {folder} is in a bucket, and images are read one by one from a local file "
                "system only; mount it, or prepare it as ArrayRecord and name the TFDS data set"
            )
        root = pathlib.Path(folder).expanduser()
        inside = _folders(root)
        divided = any(alias in inside for alias in ("train", *_SPLITS["val"]))
        self.name = str(folder)
        self.split = split
        base, low, high = _share(root, split)
        if divided:
            self._root = root / _split_folder(root, base, inside)
            self.classes = tuple(_folders(root / "train" if "train" in inside else self._root))
            for_training = _ALIASES[base] == "train" and 0.5 <= high - low < 1
        else:
            if _ALIASES.get(split) not in ("train", "val"):
                raise DataError(
                    f"folder {root} has no split {split!r}: it holds classes, which a seed divides "
                    "into train and val"
                )
            self._root = root
            self.classes = tuple(inside)
            for_training = _ALIASES[split] == "train"
            low, high = (held_out, 1) if for_training else (0, held_out)

        def choose(path: bytes) -> bool:
            digest = hashlib.sha256(b"%d/%b" % (seed, path)).digest()
            number = int.from_bytes(digest[:8], "big")
            return int(low * 2**64) <= number < int(high * 2**64)

        self._list(choose if high - low < 1 else None)
        without = [self.classes[label] for label in np.flatnonzero(np.diff(self._starts) == 0)]
        if without and for_training:
            raise DataError(
                f"folder {root} has classes of which seed={seed} leaves no image for training: "
                f"{_listed(without)}; add images or "
                + ("take another share" if divided else "divide it into train/ and val/ yourself")
            )
        if len(self) == 0:
            raise DataError(f"split {split!r} of folder {root} has 0 images")

    def _list(self, choose) -> None:
        """Reads the names in all class folders, class by class, and keeps those to be chosen."""
        there = set(_folders(self._root))
        if not there:
            raise DataError(
                f"folder {self._root} has no class folders; each class needs a folder of its images"
            )
        unknown = sorted(there - set(self.classes))
        if unknown:
            raise DataError(
                f"folder {self._root} has classes that train/ lacks: {_listed(unknown)}"
            )
        names, lengths, starts = bytearray(), [np.zeros(1, np.uint16)], [0]
        empty, listing = [], hashlib.sha256()
        others: collections.Counter[str] = collections.Counter()
        for class_name in self.classes:
            found = _images_in(self._root / class_name, others) if class_name in there else []
            if not found and class_name in there:
                empty.append(class_name)
            if choose is not None:
                prefix = os.fsencode(class_name) + b"/"
                found = [entry for entry in found if choose(prefix + entry[0])]
            starts.append(starts[-1] + len(found))
            names += b"".join(name for name, _ in found)
            lengths.append(np.array([len(name) for name, _ in found], np.uint16))
            listing.update(repr((class_name, found)).encode())
        if empty:
            raise DataError(
                f"folder {self._root} has classes without images: {_listed(empty)}; add images "
                f"({', '.join(suffix.decode() for suffix in _SUFFIXES)}) or remove them"
            )
        # Name i lies between bounds i and i + 1.
        bounds = np.cumsum(np.concatenate(lengths), dtype=np.uint64)
        self._bounds = bounds.astype(np.min_scalar_type(len(names)))
        self._names = bytes(names)
        self._starts = np.array(starts)
        self.other_files = sum(others.values())
        if others:
            logging.warning(
                "folder %s: %d files are no images by their suffix and are passed over: %s",
                *(self._root, self.other_files),
                _listed(f"{suffix or 'none'} ({count})" for suffix, count in others.most_common()),
            )
        self.fingerprint = {
            "name": "folder",
            "split": _ALIASES.get(self.split, self.split),
            "num_examples": len(self),
            "num_classes": len(self.classes),
            "classes_hash": hashlib.sha256(repr(self.classes).encode()).hexdigest()[:16],
            "hash": listing.hexdigest()[:16],
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, index: int) -> str:
        return self.path(index)

    def path(self, index: int) -> str:
        """The file of example `index`, counted from the end if negative; IndexError beyond."""
        index = range(len(self))[index]
        name = self._names[int(self._bounds[index]) : int(self._bounds[index + 1])]
        return os.path.join(self._root, self.classes[self._label(index)], os.fsdecode(name))

    def _label(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def __getitem__(self, index: int) -> EncodedExample:
        index = range(len(self))[index]
        path = self.path(index)
        try:
            with open(path, "rb") as file:
                return {"image": file.read(), "label": self._label(index)}
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _share(root: pathlib.Path, split: str) -> tuple[str, float, float]:
    """The name of a split, and from where to where it goes, as fractions of the whole one."""
    base, bracket, _ = split.partition("[")
    match = re.fullmatch(r"\w*(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?", split)
    low, high = (int(match[1] or 0), int(match[2] or 100)) if match else (0, 0)
    if bracket and not 0 <= low < high <= 100:
        raise DataError(
            f"folder {root} cannot give split {split!r}: a share is written in whole per cent, "
            f"such as {base}[:99%] and {base}[99%:]"
        )
    return base, low / 100, high / 100


def _split_folder(root: pathlib.Path, split: str, inside: list[str]) -> str:
    """The name of the folder of `split`."""
    known = [alias for alias in _ALIASES if alias in inside]
    there = [alias for alias in _SPLITS.get(_ALIASES.get(split, ""), ()) if alias in known]
    if len(there) > 1:
        raise DataError(f"folder {root} has both {' and '.join(there)}; keep one of them")
    if not there:
        raise DataError(
            f"folder {root} has no split {split!r} (found: {', '.join(known)})"
            + (f"; {root / 'train'} alone is divided by a seed" if "train" in known else "")
        )
    return there[0]


def _scan(folder: pathlib.Path):
    """The entries of a folder that are not hidden; DataError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from error


def _folders(folder: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in _scan(folder) if entry.is_dir())


def _images_in(folder: pathlib.Path, others: collections.Counter[str]) -> list[tuple[bytes, int]]:
    """Name and size of the images of one class, sorted by the bytes of the name."""
    found = []
    for entry in _scan(folder):
        name = os.fsencode(entry.name)
        if name.lower().endswith(_SUFFIXES) and not entry.is_dir():
            try:
                found.append((name, entry.stat().st_size))
            except OSError as error:  # such as a link to nowhere
                raise DataError(f"{entry.path} cannot be read: {error.strerror}") from error
        elif entry.is_dir():
            raise DataError(
                f"folder {entry.path} lies in a class folder; classes are one level deep"
            )
        else:
            others[os.path.splitext(entry.name)[1].lower()] += 1
    return sorted(found, key=operator.itemgetter(0))


def _listed(names, most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")

"""Prepares a TFDS data set as ArrayRecord, from archives that are here already.

The builders are TFDS's own, and this is the only place that needs TensorFlow. Nothing is ever
downloaded: what a builder would fetch has to lie in `manual_dir` under the name that its URL ends
in.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import pathlib
import re
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from halonet.data import sources
from halonet.data.errors import DataError

_INFO = "dataset_info.json"  # TFDS writes it last
_SCRATCH = ".preparing."  # TFDS's downloads and extractions; hidden, so that it is no data set


def prepare(
    name: str, *, manual_dir: str, data_dir: str = "", say: Callable[[str], None] = print
) -> tuple[pathlib.Path, dict[str, int]]:
    """Writes the shards of a data set, unless they are there already.

    What an interrupted preparation left is removed first, and a folder of the shards that has no
    dataset_info.json is moved aside.

    Args:
      name: as TFDS writes it: "imagenet2012", "imagenet_v2/matched-frequency".
      manual_dir: the folder of the archives.
      data_dir: gets the shards; empty: $TFDS_DATA_DIR, and without that ~/tensorflow_datasets.
      say: gets lines on what is happening; TFDS draws its own bars on stderr.

    Returns the folder of the shards, and the number of examples of each split.

    Raises DataError, in one line, if no data set has this name, an archive is missing or damaged,
    the disk is too small, or what is there already cannot be read, or nothing written there.
    """
    builder = _builder(name, data_dir)
    folder = pathlib.Path(builder.data_path)
    try:
        return _prepare(builder, folder, name, manual_dir, data_dir, say)
    except OSError as error:
        raise DataError(f"{name} cannot be prepared in {folder}: {_one_line(error)}") from error


def _prepare(
    builder: Any,
    folder: pathlib.Path,
    name: str,
    manual_dir: str,
    data_dir: str,
    say: Callable[[str], None],
) -> tuple[pathlib.Path, dict[str, int]]:
    if (folder / _INFO).exists():
        try:
            counts = _verified(builder, data_dir)
        except DataError as error:
            raise DataError(f"{error}; or remove {folder} and prepare it again") from error
        say(f"{name} is prepared already, in {folder}")
        return folder, counts
    manual = pathlib.Path(manual_dir).expanduser()
    archives = expected_archives(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
    _check_archives(name, manual, archives)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent):
        _remove_leftovers(folder.parent, say)
        if folder.exists() and not (folder / _INFO).exists():  # TFDS would take it for prepared
            aside = folder.with_name(f"{folder.name}.incomplete")
            say(f"moving {folder}, which has no {_INFO}, to {aside}")
            folder.rename(aside)
        _check_disk(folder.parent, [manual / archive for archive in archives])
        say(f"preparing {name} from {manual} in {folder}")
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder.parent) as scratch:
            _run(builder, name, manual, scratch)
    return folder, _verified(builder, data_dir)


def expected_archives(instructions: str | None) -> list[str]:
    """The archives that a builder's instructions for downloading by hand name, in their order."""
    found = re.findall(r"\b[A-Za-z0-9][\w.-]*\.tar(?:\.gz)?\b", instructions or "")
    return list(dict.fromkeys(found))


def manual_instructions(name: str) -> str | None:
    """What TFDS says of downloading a data set by hand; None where nothing needs to be.

    Raises DataError if no data set has this name.
    """
    return _builder_class(name).MANUAL_DOWNLOAD_INSTRUCTIONS


def _builder_class(name: str) -> Any:
    # TensorFlow writes half a page of greetings when it is imported, most of it on oneDNN.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow_datasets as tfds

    base = re.match(r"\w*", name)[0]
    try:
        return tfds.builder_cls(base)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(base, known, n=1)
        raise DataError(
            f"TensorFlow Datasets {tfds.__version__} has no data set {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "; tfds.list_builders() lists them")
        ) from error


def _builder(name: str, data_dir: str) -> Any:
    """The builder itself, never one read from files, which could not prepare anything."""
    root = sources.data_root(data_dir)
    if re.match(r"\w+://", str(root)):
        raise DataError(
            f"data_dir {root} is in a bucket; prepare in a local folder, then copy it there"
        )
    from google.protobuf import json_format

    match = re.fullmatch(r"\w+(?:/([\w.-]+))?(?::([\w.]+))?", name)
    if match is None:
        raise DataError(f"data set {name!r} is no name; such as imagenet2012")
    given = {"config": match[1], "version": match[2]}
    given = {key: value for key, value in given.items() if value}
    try:
        return _builder_class(name)(data_dir=os.fspath(root), **given)
    except json_format.Error as error:
        raise DataError(
            f"data set {name!r} under {root} has a damaged {_INFO}: {_one_line(error)}; remove the "
            "folder of that file and prepare it again"
        ) from error
    except (AssertionError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data set {name!r} cannot be prepared: {_one_line(error)}") from error


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Keeps a second preparation out, which would remove what the first one is writing."""
    with open(folder / ".lock", "w") as lock:
        try:
            # Of the system, so that it goes with its process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is preparing in {folder}; wait for it") from error
        yield


def _remove_leftovers(folder: pathlib.Path, say: Callable[[str], None]) -> None:
    for pattern in ("incomplete.*", f"{_SCRATCH}*"):
        for left in sorted(folder.glob(pattern)):
            say(f"removing {left}, half-written when a preparation was interrupted")
            shutil.rmtree(left)


def _check_archives(name: str, manual: pathlib.Path, expected: list[str]) -> None:
    what = f"{name} is prepared from {' and '.join(expected) or 'archives'}"
    if not manual.is_dir():
        raise DataError(f"there is no folder {manual}; {what} in it")
    missing = [archive for archive in expected if not (manual / archive).is_file()]
    if missing:
        found = sorted(entry.name for entry in manual.iterdir())
        raise DataError(
            f"{what}, and {manual} lacks {' and '.join(missing)} (found: {sources.listed(found)})"
        )


def _check_disk(folder: pathlib.Path, archives: list[pathlib.Path]) -> None:
    """The images are written as they lie in the archives, so that both are of one size."""
    needed = sum(archive.stat().st_size for archive in archives)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and the shards take about "
            f"{needed / 1e9:.1f} GB; free some, or take another --data_dir"
        )


def _run(builder: Any, name: str, manual: pathlib.Path, scratch: str) -> None:
    import tensorflow_datasets as tfds

    class FromManualDir(tfds.download.DownloadManager):
        """One that finds files instead of fetching them."""

        def _download(self, resource):
            # TFDS has looked where it knows a name and a checksum; this is the rest.
            file = pathlib.PurePosixPath(urllib.parse.urlparse(resource.url).path).name
            if not (manual / file).is_file():
                raise DataError(f"{name} needs {file}: download {resource.url} into {manual}")
            # Nothing to extract: TFDS's way to a promise of this path.
            here = tfds.download.Resource(
                path=manual / file, extract_method=tfds.download.ExtractMethod.NO_EXTRACT
            )
            return self._extract(here)

    # download_and_prepare makes its own manager and takes no other.
    builder._make_download_manager = lambda **_: FromManualDir(
        download_dir=scratch,
        manual_dir=manual,
        manual_dir_instructions=builder.MANUAL_DOWNLOAD_INSTRUCTIONS,
        url_infos=builder.url_infos,
        dataset_name=builder.name,
    )
    try:
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    except DataError:
        raise
    except Exception as error:  # a builder is a program: damaged archives raise what they like
        raise DataError(
            f"{name} cannot be prepared from {manual}: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _verified(builder: Any, data_dir: str) -> dict[str, int]:
    """The examples of each split, all of whose shards are there."""
    name = ":".join(builder.info.full_name.rsplit("/", 1))
    folder, builder = sources.open_prepared(name, data_dir=data_dir)
    for split in builder.info.splits:
        sources.check_shards(name, folder, builder.info, split)
    return {split: info.num_examples for split, info in builder.info.splits.items()}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 400 else text[:400] + " ..."

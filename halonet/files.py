"""Files that are never half there, hashes that show it, and what to say where no room is left."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Collection

from etils import epath

MANIFEST = "manifest.json"


class WriteError(OSError):
    """A file that could not be written. The message is one line, with the room that is left."""

    exit_code = 7

    def __init__(self, path: epath.PathLike, error: OSError):
        super().__init__(error.errno, error.strerror or str(error))
        self._path = path

    def __str__(self) -> str:
        return f"{self._path} cannot be written: {self.strerror}; {room(self._path)}"


class UnreachableError(ValueError):
    """A file system that cannot be asked. The message is one line."""

    exit_code = 4  # and not that of a wrong flag: a bucket may come back


def check_reachable(flag: str, path: epath.PathLike) -> None:
    """Raises UnreachableError unless a folder, which need not exist, can be looked for.

    Args:
      flag: that named it, for the message.
      path: a folder of this machine, or gs://.
    """
    if "://" not in str(path):
        return
    try:
        epath.Path(path).exists()
    except Exception as error:  # each file system has exceptions of its own
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreachableError(
            f"{flag}={path} cannot be reached ({line}); a folder of this machine would do, or "
            "gs://BUCKET/FOLDER where the bucket exists and this machine may use it"
        ) from error


def room(path: epath.PathLike) -> str:
    """How much the file system of a path, which need not exist, has free, as a text."""
    if "://" in str(path):
        return "how much is free there is not known"
    folder = pathlib.Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free there (a quota may leave less)"


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file such that a kill leaves the old one or the new one, never half of it.

    Raises:
      WriteError: where a disk is full, or the folder cannot be written.
    """
    if "://" in str(path):
        path.write_text(text)  # an object appears when it is complete
        return
    # Of its own, since another process may be writing the same file.
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise WriteError(path, error) from error


def write_manifest(folder: epath.PathLike, without: Collection[str] = ()) -> None:
    """Writes manifest.json: the SHA-256 of each file under `folder`, by its relative path.

    A file that cannot be read gets none, and counts as damaged.

    Args:
      without: names of files that are left out, in whatever folder.
    """
    folder = epath.Path(folder)
    text = json.dumps({"sha256": _hashes(folder, without)}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n")


def damaged(folder: epath.PathLike, without: Collection[str] = ()) -> str:
    """The first files of a folder that are missing or not as its manifest says; "" where all are.

    Raises:
      OSError, ValueError, KeyError, AttributeError: where the manifest is missing or damaged.
    """
    folder = epath.Path(folder)
    recorded = json.loads((folder / MANIFEST).read_text())["sha256"].items()
    found = _hashes(folder, without)
    names = sorted(name for name, it in recorded if not it or found.get(name) != it)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _hashes(folder: epath.Path, without: Collection[str]) -> dict[str, str]:
    def digest(path: epath.Path) -> str:
        found = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    found.update(block)
        except OSError:
            return ""  # no file's
        return found.hexdigest()

    files = [path for path in _files(folder) if path.name not in (MANIFEST, *without)]
    # Hashing lets go of the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        digests = pool.map(digest, files)
        return {str(path.relative_to(folder)): it for path, it in zip(files, digests, strict=True)}


def _files(folder: epath.Path) -> list[epath.Path]:
    found = []
    for path in folder.iterdir():
        found += _files(path) if path.is_dir() else [path]
    return found

"""Files that are never half there."""

from __future__ import annotations

import os

from etils import epath


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file such that a kill leaves the old one or the new one, never half of it."""
    if "://" in str(path):
        path.write_text(text)  # an object appears when it is complete
    else:
        # Of its own, since another process may be writing the same file.
        part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        part.write_text(text)
        part.replace(path)

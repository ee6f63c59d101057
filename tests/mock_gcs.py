"""A stand-in for Google Cloud Storage: gs:// paths of this process live under a local folder.

Put `pytest_plugins = ["tests.mock_gcs"]` at the top of a test module. `mock_gcs` serves etils.epath
and Orbax; `mock_gcs_events` adds TensorFlow's event files, and the seconds of importing TensorFlow.
Both give the store: `store.local(path)` is where an object really lies, `store.paths("rename")`
lists what an operation was called with, `store.bypassed` what tried to reach gs:// without epath.
"""

import contextlib
import io
import os
import re
import sys
import types

import pytest
from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils

# Also what os.path.abspath ("/cwd/gs:/b") and pathlib ("/gs/b", from an epath.Path) make of it.
_GS_PATH = re.compile(r"(^|/)gs:/|^/gs/")
_active = []  # the store in use; an audit hook cannot be removed, so ours looks here


class _Upload:
    """What is open for writing: a one-way stream, without seek, tell or fileno."""

    def __init__(self, buffer):
        self.write, self.flush = buffer.write, buffer.flush


class ObjectStore(backend.Backend):
    """An epath backend with the manners of an object store."""

    def __init__(self, root):
        self.root, self.bypassed = os.fspath(root), []
        self.calls = []  # (operation, path): appending is safe from Orbax's threads

    def local(self, path):
        path = os.fspath(path)
        return os.path.join(self.root, path[5:]) if path.startswith("gs://") else path

    def paths(self, operation):
        return [path for name, path in self.calls if name == operation]

    def _remote(self, path):
        return "gs://" + os.path.relpath(path, self.root)

    @contextlib.contextmanager  # as epath's TensorFlow backend: it cannot be used without `with`
    def open(self, path, mode):
        self.calls.append((f"open {mode}", path))
        if "a" in mode:
            raise io.UnsupportedOperation(f"an object cannot be appended to: {path}")
        if "r" in mode:
            with backend.os_backend.open(self.local(path), mode) as file:
                return (yield file)
        buffer = io.BytesIO() if "b" in mode else io.StringIO()
        try:
            yield _Upload(buffer)
        finally:
            # Readers see the old object until here, then the new one whole. After an exception the
            # truncated object is published all the same: closing a GFile does that.
            data, final = buffer.getvalue(), self._with_parent(path)
            part = f"{self.root}/part-{id(buffer)}"  # beside the buckets: in no listing
            with open(part, "wb") as file:
                file.write(data if "b" in mode else data.encode())
            os.replace(part, final)

    def _with_parent(self, path):
        if path.startswith("gs://"):  # in a bucket, folders are only names
            os.makedirs(os.path.dirname(self.local(path)), exist_ok=True)
        return self.local(path)

    def glob(self, path):
        self.calls.append(("glob", path))
        return [self._remote(p) for p in backend.os_backend.glob(self.local(path))]

    def walk(self, top, **kwargs):
        self.calls.append(("walk", top))
        for folder, *names in backend.os_backend.walk(self.local(top), **kwargs):
            yield self._remote(folder), *names

    def _forward(name):  # the others are the same call with local paths
        def method(self, path, *dst, **kwargs):
            self.calls.append((name, path))
            local = self._with_parent(path) if name == "mkdir" else self.local(path)
            dst = map(self._with_parent, dst)
            return getattr(backend.os_backend, name)(local, *dst, **kwargs)

        return method

    exists, isdir, listdir, stat = map(_forward, ["exists", "isdir", "listdir", "stat"])
    mkdir, makedirs, remove, rmtree = map(_forward, ["mkdir", "makedirs", "remove", "rmtree"])
    rename, replace, copy = map(_forward, ["rename", "replace", "copy"])


def _audit(event, args):
    if _active and (event == "open" or event.startswith("os.")):
        for path in args[:2]:
            if isinstance(path, str | os.PathLike) and _GS_PATH.search(str(path)):
                _active[-1].bypassed.append((event, path))  # in case the error is swallowed
                raise AssertionError(f"{event} of {path!r} does not go through etils.epath")


sys.addaudithook(_audit)


@pytest.fixture
def mock_gcs(tmp_path, monkeypatch):
    store = ObjectStore(tmp_path / "gcs")
    # etils' own mock_epath does not reach gs:// where TensorFlow is installed, for then epath takes
    # TensorFlow's backend before it looks into the table that mock_epath replaces.
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    monkeypatch.setattr(gpath, "_GCS_BACKENDS", {store})  # which wins in copies from local paths
    # Orbax asks the bucket whether its folders are real, and gives TensorStore its own address.
    # Everything else (commit_success.txt instead of renames) follows from the gs:// in the path.
    bucket = types.SimpleNamespace(hierarchical_namespace_enabled=False)

    def kvstore(path):
        return {"driver": "file", "path": store.local(path)}

    monkeypatch.setattr(gcs_utils, "get_bucket", lambda name: bucket)
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    # The one common call without an audit event: os.path.exists would just say False.
    stat = os.stat

    def checked_stat(path, *args, **kwargs):
        _audit("os.stat", [path])
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", checked_stat)
    _active.append(store)
    yield store
    _active.remove(store)
    assert not store.bypassed
    assert not os.path.lexists("gs:"), "C++ code took gs:// for a relative path"


@pytest.fixture
def mock_gcs_events(mock_gcs, monkeypatch):
    """`mock_gcs`, and clu's SummaryWriter too: its writer is C++ and knows nothing of epath."""
    import tensorflow as tf

    make, local = tf.summary.create_file_writer, mock_gcs.local
    monkeypatch.setattr(tf.summary, "create_file_writer", lambda d, **kw: make(local(d), **kw))
    return mock_gcs

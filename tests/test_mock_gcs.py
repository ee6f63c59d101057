"""The stand-in for Google Cloud Storage behaves, before other tests rely on it."""

import io
import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest_plugins = ["tests.mock_gcs"]

RUN = "gs://bucket/run"


def test_epath_operations(mock_gcs, tmp_path):
    run = epath.Path(RUN)
    assert not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    (run / "a.txt").write_text("é\n")
    (run / "new" / "b.bin").write_bytes(b"\x00\r\n")  # no mkdir: folders are only names
    assert (run / "a.txt").read_text() == "é\n"
    assert (run / "new" / "b.bin").stat().length == 3
    assert sorted(p.name for p in run.iterdir()) == ["a.txt", "new"]
    assert list(run.glob("*.txt")) == [run / "a.txt"]
    assert [(p, f) for p, _, f in run.walk()] == [(run, ["a.txt"]), (run / "new", ["b.bin"])]
    (run / "a.txt").rename(run / "c.txt")
    with pytest.raises(FileExistsError):
        (run / "c.txt").rename(run / "new" / "b.bin")
    (tmp_path / "local").write_text("up")
    epath.Path(tmp_path / "local").copy(run / "c.txt", overwrite=True)
    assert (run / "c.txt").read_text() == "up"
    (run / "c.txt").unlink()
    run.rmtree()
    assert not run.exists()
    assert mock_gcs.paths("rename") == [f"{RUN}/a.txt", f"{RUN}/c.txt"]


def test_an_object_is_written_whole_or_not_at_all(mock_gcs):
    path = epath.Path(RUN) / "m.jsonl"
    path.write_text("old")
    with path.open("w") as file:
        file.write("new")
        assert path.read_text() == "old"
        assert not hasattr(file, "seek")
    assert path.read_text() == "new"
    with pytest.raises(io.UnsupportedOperation, match="appended"), path.open("a"):
        pass
    with pytest.raises(AttributeError):
        path.open("w").write("without `with`")


def stat_as_pathlib(path):
    return pathlib.Path(path).is_file()


@pytest.mark.parametrize(
    "bypass", [open, os.mkdir, os.makedirs, os.listdir, os.path.exists, np.load, stat_as_pathlib]
)
def test_going_around_epath_is_caught(mock_gcs, bypass):
    for path in epath.Path(RUN), os.path.abspath(RUN):
        with pytest.raises(AssertionError, match=r"does not go through etils\.epath"):
            bypass(path)
    assert len(mock_gcs.bypassed) == 2
    mock_gcs.bypassed.clear()  # or the fixture fails the test


def manager(keep=2):
    policy = ocp.checkpoint_managers.LatestN(keep)
    options = ocp.CheckpointManagerOptions(preservation_policy=policy)
    return ocp.CheckpointManager(epath.Path(RUN) / "checkpoints", options=options)


def test_checkpoint_manager(mock_gcs, tmp_path):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    table = jax.random.normal(jax.random.key(0), (8, 6))
    state = {
        "split": jax.device_put(table, NamedSharding(mesh, PartitionSpec("x", "y"))),
        "copied": jax.device_put(-table, NamedSharding(mesh, PartitionSpec())),
    }
    with manager() as saving:
        for step in 1, 2, 3:
            scaled = jax.tree.map(lambda x, step=step: x * step, state)
            saving.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(scaled), data=ocp.args.JsonSave({"step": step})
                ),
            )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    restore = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
    )
    with manager() as reading:
        assert reading.all_steps() == [2, 3]
        restored = reading.restore(3, args=restore)
    assert restored.data == {"step": 3}
    for name, saved in scaled.items():
        np.testing.assert_array_equal(restored.state[name], saved)
        assert restored.state[name].sharding == saved.sharding
    # The paths of an object store were taken: a marker commits a step, nothing is renamed.
    assert not mock_gcs.paths("rename") + mock_gcs.paths("replace")
    commit = epath.Path(RUN) / "checkpoints" / "3" / "commit_success.txt"
    commit.unlink()
    with manager() as reading:
        assert reading.all_steps() == [2]
    assert os.listdir(tmp_path) == ["gcs"]
    assert os.listdir(tmp_path / "gcs") == ["bucket"]


def test_event_files(mock_gcs_events):
    from clu import metric_writers

    writer = metric_writers.create_default_writer(RUN)
    writer.write_scalars(1, {"loss": 0.5})
    writer.close()
    (events,) = epath.Path(RUN).glob("events.out.tfevents.*")
    assert b"loss" in events.read_bytes()

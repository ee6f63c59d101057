"""Training end to end: what it leaves behind, and that an interruption changes nothing."""

import collections
import json
import os
import signal

import jax
import numpy as np
import pytest

from halonet import checkpoint, metrics, train
from halonet.config import ConfigError
from halonet.data.errors import DataError
from halonet.runtime import Interrupted
from tests.small_run import small_config


class CrashError(Exception):
    """Ends a run in the middle."""


def saved_arrays(workdir, step):
    """Every array of a checkpoint, by path, as bytes."""
    folder = checkpoint.step_folder(workdir, step)
    with checkpoint.ocp.Checkpointer(checkpoint.ocp.PyTreeCheckpointHandler()) as checkpointer:
        structure = checkpointer.metadata(folder / "state").item_metadata.tree
        args = jax.tree.map(
            lambda _: checkpoint.ocp.RestoreArgs(restore_type=np.ndarray), structure
        )
        tree = checkpointer.restore(
            folder / "state", args=checkpoint.ocp.args.PyTreeRestore(restore_args=args)
        )
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def history(workdir):
    """The reproducible part of metrics.jsonl, as its lines."""
    lines = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {name: row[name] for name in row if name.startswith(("train/", "eval/"))}
        if kept:
            lines.append(json.dumps({"step": row["step"], **kept}))
    return lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    summary = train.train_and_evaluate(small_config(), workdir)
    return workdir, summary


def crash_after_saving(step, monkeypatch):
    save = train.Checkpointer.save

    def crashing(self, saved_step, state, meta):
        save(self, saved_step, state, meta)
        if saved_step == step:
            raise CrashError

    monkeypatch.setattr(train.Checkpointer, "save", crashing)


def send_signal_at(step, monkeypatch):
    write = metrics.MetricsLog.write

    def signalling(self, written_step, values):
        write(self, written_step, values)
        if written_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.MetricsLog, "write", signalling)


def crash_after_writing(step, monkeypatch):
    write = metrics.MetricsLog.write

    def crashing(self, written_step, values):
        write(self, written_step, values)
        if written_step == step:
            raise CrashError

    monkeypatch.setattr(metrics.MetricsLog, "write", crashing)


@pytest.mark.parametrize(
    ("interrupt", "error", "saved"),
    [
        (lambda patch: crash_after_saving(13, patch), CrashError, 13),
        (lambda patch: send_signal_at(20, patch), Interrupted, 21),  # a step that has no row
        pytest.param(  # its evaluation is due
            *(lambda patch: crash_after_saving(15, patch), CrashError, 15),
            marks=pytest.mark.middle,
        ),
        pytest.param(  # rows 16 and 20 are measured again
            *(lambda patch: crash_after_writing(20, patch), CrashError, 15),
            marks=pytest.mark.middle,
        ),
    ],
    ids=["after a save", "SIGTERM", "before an evaluation", "past the checkpoint"],
)
def test_interrupted_equals_undisturbed(
    undisturbed, tmp_path, monkeypatch, interrupt, error, saved
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(error):
            train.train_and_evaluate(small_config(), workdir)
    assert checkpoint.saved_steps(workdir)[-1] == saved
    assert not (workdir / "summary.json").exists()

    train.train_and_evaluate(small_config(), workdir)
    assert history(workdir) == history(undisturbed[0])
    arrays, expected = saved_arrays(workdir, 30), saved_arrays(undisturbed[0], 30)
    assert arrays.keys() == expected.keys()
    assert [path for path in expected if arrays[path] != expected[path]] == []
    groups = {path.split("'")[1] for path in expected}
    assert groups == {"step", "params", "batch_stats", "opt_state", "ema"}


def test_the_comparison_can_tell_two_states_apart(undisturbed):
    before, after = (saved_arrays(undisturbed[0], step) for step in (26, 30))
    changed = {path.split("'")[1] for path in after if before[path] != after[path]}
    assert changed == {"step", "params", "batch_stats", "opt_state", "ema"}


def test_what_a_run_leaves_behind(undisturbed):
    workdir, summary = undisturbed
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        *("config.json", "metrics", "metrics.jsonl", "checkpoints", "tensorboard"),
        *("parameters.txt", "summary.json", "curves.png", "predictions.png"),
    }
    assert json.loads((workdir / "summary.json").read_text()) == summary
    rows = metrics.read_metrics(workdir)
    # Every fourth step, and each that was saved.
    recorded = [row["step"] for row in rows if "train/loss" in row]
    assert recorded == [4, 8, 12, 13, 15, 16, 20, 24, 26, 28, 30]
    assert [row["step"] for row in rows if "eval/top1" in row] == [15, 30]
    assert all(row["eval/count"] == 1000 for row in rows if "eval/top1" in row)
    assert all(0 <= row["perf/data_wait"] <= 1 for row in rows if "perf/data_wait" in row)
    # Of 13, 15, 26 and 30 the newest two, and the best of those evaluated before the last save.
    assert checkpoint.saved_steps(workdir) == [15, 26, 30]
    assert summary["eval/top1"] == rows[-1]["eval/top1"]
    assert summary["best/step"] == metrics.best_steps(rows, 1)[0]


def test_a_finished_run_says_so_and_changes_nothing(undisturbed, capsys):
    workdir, summary = undisturbed
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert train.train_and_evaluate(small_config(), workdir) == summary
    assert "has ended already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_another_configuration_is_refused(undisturbed):
    with pytest.raises(ConfigError, match="optim.learning_rate: 0.003 there, 0.5 now"):
        train.train_and_evaluate(small_config(**{"optim.learning_rate": 0.5}), undisturbed[0])


@pytest.mark.middle
def test_other_data_is_refused(tmp_path, monkeypatch):
    config = small_config(**{"train.steps": 4, "checkpoint.every_steps": 2})
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_after_saving(2, patch)
        with pytest.raises(CrashError):
            train.train_and_evaluate(config, workdir)
    open_split = train.evaluate_lib.open_split

    def other(*args):
        source = open_split(*args)
        source.fingerprint = {**source.fingerprint, "num_examples": 3}
        return source

    monkeypatch.setattr(train.evaluate_lib, "open_split", other)
    with pytest.raises(DataError, match="the train data of the run in .* take another --workdir"):
        train.train_and_evaluate(config, workdir)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    config = small_config(**{"optim.learning_rate": 1e30, "optim.clip_norm": 0.0})
    with pytest.raises(train.NonFinite, match=r"the (loss|grad_norm) of step \d+ is (nan|inf)"):
        train.train_and_evaluate(config, tmp_path / "run")


def test_each_step_is_traced_once(tmp_path, monkeypatch):
    """Over several evaluations and checkpoints. Without averages, which nothing else here does."""
    traced = collections.Counter()

    def counted(name):
        step = getattr(train.steps, name)

        def counting(*args, **kwargs):
            traced[name] += 1
            return step(*args, **kwargs)

        return counting

    for name in ("train_step", "eval_step"):
        monkeypatch.setattr(train.steps, name, counted(name))
    config = small_config(
        **{"train.steps": 6, "train.ema_decay": 0.0, "eval.every_steps": 2, "mesh.fsdp": 2}
    )
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_after_saving(4, patch)
        with pytest.raises(CrashError):
            train.train_and_evaluate(config, workdir)
    assert traced == {"train_step": 1, "eval_step": 1}
    assert "ema" not in {path.split("'")[1] for path in saved_arrays(workdir, 4)}
    train.train_and_evaluate(config, workdir)
    assert traced == {"train_step": 2, "eval_step": 2}
    assert [row["step"] for row in metrics.read_metrics(workdir) if "eval/top1" in row] == [2, 4, 6]

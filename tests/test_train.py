"""Training end to end: what it leaves behind, and that an interruption changes nothing."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from experiments.collect import collect
from experiments.table import read_table
from halonet import checkpoint, files, metrics, report, runtime, train
from halonet.config import ConfigError
from halonet.data.errors import DataError
from halonet.health import NonFinite
from halonet.models import create_model
from halonet.models.cost import cost
from halonet.runtime import Interrupted
from tests.small_run import history, saved_arrays, small_config


class CrashError(Exception):
    """Ends a run in the middle."""


def crash_after_saving(step, monkeypatch):
    save = train.Checkpointer.save

    def crashing(self, saved_step, state, meta):
        save(self, saved_step, state, meta)
        if saved_step == step:
            raise CrashError

    monkeypatch.setattr(train.Checkpointer, "save", crashing)


def send_signal_at(step, monkeypatch):
    write, sent = metrics.MetricsLog.write, []

    def signalling(self, written_step, values):
        write(self, written_step, values)
        # Once: a step has several rows, and a second signal would end the tests.
        if written_step == step and not sent:
            sent.append(step)
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
        (lambda patch: send_signal_at(20, patch), Interrupted, 22),  # a step that has no row
        pytest.param(  # between evaluations
            *(lambda patch: crash_after_saving(13, patch), CrashError, 13),
            marks=pytest.mark.middle,
        ),
        pytest.param(  # its evaluation is due
            *(lambda patch: crash_after_saving(15, patch), CrashError, 15),
            marks=pytest.mark.middle,
        ),
        pytest.param(  # rows 16 and 20 are measured again
            *(lambda patch: crash_after_writing(20, patch), CrashError, 15),
            marks=pytest.mark.middle,
        ),
    ],
    ids=["SIGTERM", "after a save", "before an evaluation", "past the checkpoint"],
)
def test_interrupted_equals_undisturbed(
    undisturbed, tmp_path, monkeypatch, interrupt, error, saved
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "code_version", lambda: "one")
        interrupt(patch)
        with pytest.raises(error):
            train.train_and_evaluate(small_config(), workdir)
    assert checkpoint.saved_steps(workdir)[-1] == saved
    assert not (workdir / "summary.json").exists()

    monkeypatch.setattr(runtime, "code_version", lambda: "two")
    summary = train.train_and_evaluate(small_config(), workdir)
    assert history(workdir) == history(undisturbed[0])
    # Each version of the code that had a part in the state is told.
    assert summary["made_by"] == [runtime.versions() | {"code": it} for it in ("one", "two")]
    assert summary["goodput/starts"] == 2
    shares = [summary[f"goodput/{name}"] for name in (*report.SPENT, "lost")]
    assert min(shares) >= 0
    assert sum(shares) == pytest.approx(1)
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
    model = create_model("halonet_tiny", num_classes=10)
    assert summary["multiply_adds"] == sum(part.cost.total for part in cost(model, 32, 32))
    assert summary["devices"] == "8 cpu"
    (made_by,) = summary["made_by"]
    assert made_by.items() >= runtime.versions().items()
    rows = metrics.read_metrics(workdir)
    # Every fourth step, and each that was saved.
    recorded = [row["step"] for row in rows if "train/loss" in row]
    assert recorded == [4, 8, 12, 13, 15, 16, 20, 24, 26, 28, 30]
    assert [row["step"] for row in rows if "eval/top1" in row] == [15, 30]
    assert all(row["eval/count"] == 1000 for row in rows if "eval/top1" in row)
    assert all(0 <= row["perf/data_wait"] <= 1 for row in rows if "perf/data_wait" in row)
    # Of 13, 15, 26 and 30 the newest two, and the best of those evaluated before the last save.
    assert checkpoint.saved_steps(workdir) == [15, 26, 30]
    assert summary["eval/top1"] == [row for row in rows if "eval/top1" in row][-1]["eval/top1"]
    assert summary["best/step"] == metrics.best_steps(rows, 1)[0]


def test_a_run_is_a_row_of_its_sweep(undisturbed, tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "a-0").symlink_to(undisturbed[0])
    member = {"name": "a", "id": "a-0", "overrides": {"seed": 0}}
    sweep = {"sweep": "it", "config": "configs/mnist.py", "overrides": {}, "members": [member]}
    (tmp_path / "it" / "sweep.json").write_text(json.dumps(sweep))
    csv, page = collect(tmp_path / "it")
    (row,) = read_table(csv)
    # On a CPU there is no peak to have a share of.
    assert [name for name, value in row.items() if value is None] == ["mfu"]
    assert row["top1"] == undisturbed[1]["eval/top1"]
    assert row["training_flops"] == 6 * row["multiply_adds"] * 16 * 30
    assert row["jax"] == jax.__version__
    assert '"name":"a"' in page.read_text()


def test_a_finished_run_says_so_and_changes_nothing(undisturbed, capsys):
    workdir, summary = undisturbed
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert train.train_and_evaluate(small_config(), workdir) == summary
    assert "has ended already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize("text", ["", '{"step": 30, "eval/top1"', "\0" * 9])
def test_a_summary_cut_short_is_none(undisturbed, tmp_path, monkeypatch, text):
    """A run with it has not ended: it goes on to the state."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed[0], workdir)
    (workdir / "summary.json").write_text(text)

    def state(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.recipe, "schedule", state)
    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(small_config(), workdir)


@pytest.mark.middle
def test_a_summary_cut_short_is_written_again(undisturbed, tmp_path, monkeypatch):
    workdir, whole = tmp_path / "run", files.write_whole
    shutil.copytree(undisturbed[0], workdir)
    (workdir / "summary.json").write_text('{"step": 30, "eval/top1"')
    written = []
    monkeypatch.setattr(
        files, "write_whole", lambda path, text: (written.append(path.name), whole(path, text))
    )
    summary = train.train_and_evaluate(small_config(), workdir)
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert "summary.json" in written
    assert summary["eval/top1"] == undisturbed[1]["eval/top1"]
    assert history(workdir) == history(undisturbed[0])


def test_another_configuration_is_refused(undisturbed):
    with pytest.raises(ConfigError, match="optim.learning_rate: 0.003 there, 0.5 now"):
        train.train_and_evaluate(small_config(**{"optim.learning_rate": 0.5}), undisturbed[0])


def test_another_model_is_refused_with_each_key_and_each_array(undisturbed):
    other = {"seed": 1, "optim.name": "sgd", "train.ema_decay": 0.0, "model.plan": "c/c"}
    with pytest.raises(ConfigError) as info:
        train.train_and_evaluate(small_config(**other), undisturbed[0])
    line, *arrays = str(info.value).splitlines()
    for key in other:
        assert re.search(rf"[(; ]{key}: \S+ there, \S+ now", line), key
    assert all(re.fullmatch(r"  [\w/]+: .+ there, .+ wanted", array) for array in arrays)
    named = {array.split(":")[0].strip() for array in arrays}
    saved = {re.sub(r"\W+", "/", path).strip("/") for path in saved_arrays(undisturbed[0], 30)}
    assert {name for name in saved if name.startswith("ema/")} <= named
    assert "params/head/kernel" not in named
    assert [array for array in arrays if "params/stage" in array]


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


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    init_state = train.steps.init_state

    def poisoned(*args, **kwargs):
        state = init_state(*args, **kwargs)
        params = jax.tree.map(lambda leaf: leaf * jax.numpy.inf, state.params)
        return dataclasses.replace(state, params=params)

    monkeypatch.setattr(train.steps, "init_state", poisoned)
    with pytest.raises(NonFinite, match=r"^the state of step 0 is not finite .* more arrays$"):
        train.train_and_evaluate(small_config(), tmp_path / "run")
    # Nothing stays that the next attempt would have to go on from.
    assert not (tmp_path / "run").exists()


def with_a_loss_that_is_none(monkeypatch, steps):
    """Makes the loss of these steps NaN."""
    train_step = train.recipe.train_step

    def poisoned(*args):
        step = train_step(*args)

        def run(state, batch):
            none = jax.numpy.isin(state.step + 1, jax.numpy.array(steps))
            factor = jax.numpy.where(none, jax.numpy.nan, 1.0)
            return step(state, batch, loss=lambda *them: step.keywords["loss"](*them) * factor)

        return run

    monkeypatch.setattr(train.recipe, "train_step", poisoned)


@pytest.mark.middle
def test_the_step_whose_loss_is_none_is_named(tmp_path, monkeypatch):
    with_a_loss_that_is_none(monkeypatch, [7])
    config = small_config(**{"train.steps": 10, "checkpoint.every_steps": 5})
    with pytest.raises(NonFinite, match=r"^the loss of step 7 is nan; the checkpoints in .* are "):
        train.train_and_evaluate(config, tmp_path / "run")
    assert checkpoint.saved_steps(tmp_path / "run") == [5]


@pytest.mark.middle
def test_steps_without_a_loss_are_passed_over_within_the_bound(tmp_path, monkeypatch, capsys):
    with_a_loss_that_is_none(monkeypatch, [1, 7, 10])
    monkeypatch.setattr(train, "Progress", functools.partial(train.Progress, interval=0.0))
    settings = {"train.steps": 10, "checkpoint.every_steps": 5, "log.every_steps": 1}
    workdir = tmp_path / "run"
    # The count goes on over a restart.
    with pytest.raises(NonFinite, match=r"^the loss of step 10 is nan \(3 of the run; .*=2\)"):
        train.train_and_evaluate(small_config(**settings, **{"train.skip_nonfinite": 2}), workdir)
    assert checkpoint.saved_steps(workdir) == [5]
    summary = train.train_and_evaluate(
        small_config(**settings, **{"train.skip_nonfinite": 3}), workdir
    )
    assert summary["skipped"] == 3
    assert "; 3 steps were passed over" in capsys.readouterr().out
    rows = [row for row in metrics.read_metrics(workdir) if "train/skipped" in row]
    assert [row["train/skipped"] for row in rows] == [1, 1, 1, 1, 1, 1, 2, 2, 2, 3]
    assert [row["step"] for row in rows if "train/loss" not in row] == [1, 7, 10]


@contextlib.contextmanager
def observed():
    """Yields a list of what happens inside, in order.

    ("compile", name); ("step", number), where one is dispatched; ("read", number), where the host
    waits for something that this step returned.
    """
    events, outputs = [], {}
    array = type(jax.numpy.zeros(()))
    value, wait, call = array._value, array.block_until_ready, jax.stages.Compiled.__call__

    def compiled(name, _, **details):
        if name == "/jax/core/compile/backend_compile_duration":
            events.append(("compile", details["fun_name"]))

    def step(self, *args):
        number = len([event for event in events if event[0] == "step"]) + 1
        events.append(("step", number))
        result = call(self, *args)
        # The arrays are kept: an id is taken again once its owner is gone.
        outputs.update((id(leaf), (number, leaf)) for leaf in jax.tree.leaves(result))
        return result

    def read(leaf):
        if id(leaf) in outputs:
            events.append(("read", outputs[id(leaf)][0]))

    jax.monitoring.register_event_duration_secs_listener(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array, "_value", property(lambda self: (read(self), value.fget(self))[1]))
        patch.setattr(array, "block_until_ready", lambda self: (read(self), wait(self))[1])
        patch.setattr(jax.stages.Compiled, "__call__", step)
        yield events
    jax.monitoring.unregister_event_duration_listener(compiled)


def late_compilations(events, step=1):
    """What was compiled after a step was dispatched."""
    return [name for kind, name in events[events.index(("step", step)) :] if kind == "compile"]


def early_reads(events):
    """The steps of which something was read before the next one was dispatched."""
    steps = [events.index(event) for event in events if event[0] == "step"]
    ends = [*steps[1:], len(events)]
    return {
        number
        for number, (start, end) in enumerate(zip(steps, ends, strict=True), start=1)
        if ("read", number) in events[start:end]
    }


@pytest.mark.middle
def test_no_late_compilation_and_no_early_read(tmp_path, monkeypatch):
    """Over evaluations, checkpoints and a resumption. Without averages, as nothing else here is."""
    monkeypatch.setitem(runtime.PEAK_FLOPS, "cpu", 1e12)
    config = small_config(
        **{"train.steps": 9, "train.ema_decay": 0.0, "eval.every_steps": 3, "mesh.fsdp": 2},
        **{"log.every_steps": 1},
    )
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch, observed() as first:
        crash_after_saving(6, patch)
        with pytest.raises(CrashError):
            train.train_and_evaluate(config, workdir)
    # The evaluation's, and Orbax's slices of replicated arrays: once, where they are first due.
    assert set(late_compilations(first)) == {"jit(eval_step)", "jit(slice)"}
    assert late_compilations(first).count("jit(eval_step)") == 1
    assert late_compilations(first, step=4) == []
    # Saved ones are: the record is to know of every checkpoint.
    assert early_reads(first) == {3, 6}
    assert {number for kind, number in first if kind == "read"} >= {1, 2, 3, 4, 5, 6}
    assert "ema" not in {path.split("'")[1] for path in saved_arrays(workdir, 6)}

    with observed() as second:
        summary = train.train_and_evaluate(config, workdir)
    assert late_compilations(second) == late_compilations(second, step=3)
    assert early_reads(second) == {3}
    rows = metrics.read_metrics(workdir)
    assert [row["step"] for row in rows if "eval/top1" in row] == [3, 6, 9]

    started = [row for row in rows if "perf/startup_seconds" in row]
    assert [row["step"] for row in started] == [0, 6]
    assert 0 < started[1]["perf/compile_seconds"] < started[1]["perf/startup_seconds"]
    assert summary["perf/startup_seconds"] == started[1]["perf/startup_seconds"]
    multiply_adds = sum(part.cost.total for part in cost(create_model("halonet_tiny"), 32, 32))
    multiply_adds -= 64 * 2 * 990  # ten classes and not a thousand
    for row in (row for row in rows if "train/loss" in row):
        peak = 8 * 1e12 / (3 * 2 * multiply_adds)
        assert row["perf/mfu"] == pytest.approx(row["perf/images_per_second"] / peak)


@pytest.mark.middle
def test_an_early_read_would_be_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "STEPS_IN_FLIGHT", 0)
    settings = {"train.steps": 3, "train.ema_decay": 0.0, "eval.every_steps": 3, "mesh.fsdp": 2}
    with observed() as events:
        train.train_and_evaluate(small_config(**settings), tmp_path / "run")
    assert early_reads(events) == {1, 2, 3}


def test_a_late_compilation_would_be_noticed():
    with observed() as events:
        step = jax.jit(lambda x: x + 1).lower(1.0).compile()
        step(1.0)
        jax.jit(lambda x: x * 2)(np.ones(3))
    assert late_compilations(events) == ["jit(<lambda>)"]
    assert late_compilations(events[:-1]) == []


@pytest.mark.middle
def test_a_damaged_image_ends_the_run_or_is_counted(tmp_path, caplog, monkeypatch):
    from PIL import Image

    for label in "ab":
        (tmp_path / "images" / "train" / label).mkdir(parents=True)
        for number in range(12):
            pixels = np.full((40, 40, 3), 20 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / "train" / label / f"{number}.jpg")
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "val")
    damaged = tmp_path / "images" / "train" / "b" / "3.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-200])

    def run(name, **settings):
        settings = {
            "data.name": "folder",
            "data.data_dir": str(tmp_path / "images"),
            "data.eval_split": "val",
            "data.batch_size": 16,
            "eval.batch_size": 16,
            "train.steps": 6,  # four epochs of 24
            "checkpoint.every_steps": 1,
            "log.every_steps": 1,
            **{f"data.{key}": value for key, value in settings.items()},
        }
        return train.train_and_evaluate(small_config(**settings), tmp_path / name)

    with pytest.raises(DataError, match=rf"^{damaged} is not a readable image: "):
        run("strict")
    summary = run("skip", damaged="skip", damaged_limit=1)
    assert summary["damaged"] == 4
    rows = metrics.read_metrics(tmp_path / "skip")
    counts = [row["train/damaged"] for row in rows if "train/damaged" in row]
    assert (len(counts), sum(counts)) == (6, 4)
    assert caplog.text.count(f"{damaged} is not a readable image; others take its place") == 1
    # A later start counts on from the checkpoint: of the whole run, and of an epoch. The limit ends
    # a run before the checkpoint that would hide it, the last one too.
    with monkeypatch.context() as patch:
        crash_after_saving(4, patch)
        with pytest.raises(CrashError):
            run("crashed", damaged="skip", damaged_limit=1)
    assert run("crashed", damaged="skip", damaged_limit=1)["damaged"] == 4
    for _ in range(2):
        with pytest.raises(DataError, match=r"^1 damaged images in epoch 1, by step \d, and "):
            run("none", damaged="skip", damaged_limit=0)


@pytest.mark.middle
def test_a_folder_of_photographs_with_everything_on(tmp_path):
    """JPEGs of two classes; every augmentation and training option that a recipe can name."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        folder = tmp_path / "photographs" / name
        folder.mkdir(parents=True)
        tiles = (
            photograph[:420, :630].reshape(6, 70, 7, 90, 3).swapaxes(1, 2).reshape(-1, 70, 90, 3)
        )
        for number, tile in enumerate(tiles):
            Image.fromarray(tile).save(folder / f"{number}.jpg", quality=90)
    config = small_config(
        **{
            "data.name": "folder",
            "data.data_dir": str(tmp_path / "photographs"),
            "data.eval_split": "val",
            "data.crop_pct": 0.9,
            "data.interpolation": "bicubic",
            "data.workers": 2,
            "model.dropout": 0.1,
            "augment.crop_min_area": 0.3,
            "augment.flip": True,
            "augment.rand_augment": "rand-m9-n2-mstd0.5-inc1",
            "augment.erase": 0.25,
            "augment.cutmix": 1.0,
            "augment.repeats": 2,
            "train.loss": "binary",
            "train.target_threshold": 0.2,
            "train.accumulate": 2,
            "train.steps": 8,
            "optim.name": "lamb",
            "optim.base_batch": 64,
            "optim.floor": 1e-5,
            "data.batch_size": 32,
        }
    )
    summary = train.train_and_evaluate(config, tmp_path / "run")
    held_out = len(train.evaluate_lib.open_split(config, "val"))
    assert 0 < held_out < 20
    assert summary["eval/count"] == held_out
    rows = metrics.read_metrics(tmp_path / "run")
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    # Half of the configured rate, for half of the batch that it is meant for.
    assert 0.5 * config.optim.learning_rate * 0.5 < max(rates) <= 0.5 * config.optim.learning_rate
    assert all(np.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)


def test_a_workdir_in_use_is_refused(tmp_path):
    held = runtime.WorkdirLock(tmp_path)
    with held, pytest.raises(runtime.LockedError, match=f"in use by process {os.getpid()} on"):
        train.train_and_evaluate(small_config(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.middle
def test_the_watchdog_knows_what_a_run_is_doing(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(runtime.Watchdog, "at", lambda self, what: places.append(what))

    def few_batches(*args, **kwargs):
        yield from itertools.islice(train_batches(*args, **kwargs), 5)
        raise DataError("the end")

    train_batches = train.pipeline.train_batches
    monkeypatch.setattr(train.pipeline, "train_batches", few_batches)
    with pytest.raises(DataError, match="the end"):
        train.train_and_evaluate(small_config(), tmp_path)
    compiling = ["compiling the step", "waiting for the others to compile"]
    assert places[:3] == ["starting", *compiling]
    step = ["waiting for data", "waiting for the devices"]
    # Batches are fetched ahead: how many steps come before the error is the prefetcher's affair.
    assert places[3:-1] == step * (len(places[3:-1]) // 2) != []
    assert places[-1] == "waiting for data"

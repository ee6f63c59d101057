"""Several real processes train as one does."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from halonet import checkpoint, load_run, runtime
from launch.rehearsal import free_port, process_flags
from tests.small_run import rows, saved_arrays
from tests.system.launch import launch

SETTINGS = {
    "optim.name": "sgd",
    "optim.learning_rate": 0.1,
    "train.epochs": 0,
    "train.steps": 3,
    "data.batch_size": 32,
    "model.bn_group": 4,
    "eval.every_steps": 3,
    "log.every_steps": 1,
}


def start(workdir, *, mode="train", devices=1, process_id=0, process_count=1, port=0, **settings):
    settings = {**SETTINGS, **settings}
    flags = [f"--mode={mode}", *(f"--config.{key}={value}" for key, value in settings.items())]
    flags += process_flags(process_id, process_count, port)
    command = ("main.py", "--config=configs/mnist.py", f"--workdir={workdir}", *flags)
    return launch(*command, devices=devices)


def finish(*processes):
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


@pytest.mark.middle
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"model.name": "halonet_tinny"}, 2, "did you mean 'halonet_tiny'"),
        (
            {"data.name": "imagenet2012", "data.data_dir": "/nowhere"},
            3,
            "there is no folder /nowhere",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_code(tmp_path, settings, code, message):
    process = start(tmp_path / "run", **settings)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    last = output.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in output


@pytest.mark.middle
@pytest.mark.timeout(300)
def test_what_the_first_process_refuses_all_refuse(tmp_path):
    port = free_port()
    with runtime.WorkdirLock(tmp_path):
        pair = [start(tmp_path, process_id=i, process_count=2, port=port) for i in range(2)]
        outputs = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [2, 2], outputs
    assert "is in use by process" in outputs[0].splitlines()[-1]
    assert outputs[1].splitlines()[-1] == "error: process 0 refused; it says why"


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_two_processes_train_as_one(tmp_path):
    def pair(**kwargs):
        port = free_port()
        ids = ({"process_id": i, "process_count": 2, "port": port} for i in range(2))
        return port, finish(*[start(tmp_path / "two", devices=2, **it, **kwargs) for it in ids])

    port, outputs = pair()
    for index, output in enumerate(outputs):
        assert f"process {index} of 2 (coordinator 127.0.0.1:{port}), 2 of 4 cpu" in output
    # The first one speaks for both.
    assert "held-out top-1" in outputs[0]
    assert "held-out top-1" not in outputs[1]
    assert len(list((tmp_path / "two" / "metrics").iterdir())) == 1

    output = finish(start(tmp_path / "one", devices=1))[0]
    assert "alone, on 1 cpu device(s)" in output
    one, two = (rows(tmp_path / name, "train/") for name in ("one", "two"))
    assert len(one) == 3
    np.testing.assert_allclose(
        [row["train/loss"] for row in two], [row["train/loss"] for row in one], rtol=1e-5
    )
    assert [row["eval/count"] for row in rows(tmp_path / "two", "eval/")] == [1000]

    # What they saved opens elsewhere: here, on one device of eight, without any flags.
    run, saved = load_run(tmp_path / "two"), saved_arrays(tmp_path / "two", 3)
    assert (run.step, run.weights) == (3, "ema")
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.variables):
        assert np.asarray(leaf).tobytes() == saved[f"['ema']{jax.tree_util.keystr(path)}"]
    assert np.isfinite(run.predict(np.zeros((1, 32, 32, 3), np.uint8))).all()

    # And evaluate as one does: whole numbers are the same, of each class too.
    found = []
    for evaluate in (
        lambda: pair(mode="evaluate"),
        lambda: finish(start(tmp_path / "two", mode="evaluate")),
    ):
        evaluate()
        found.append(json.loads((tmp_path / "two" / "evaluation.json").read_text()))
    assert [it["devices"] for it in found] == ["4 cpu", "1 cpu"]
    for name in ("count", "top1", "top5", "classes", "fingerprint"):
        assert found[0][name] == found[1][name]
    assert found[0]["count"] == 1000
    np.testing.assert_allclose(found[0]["calibration_error"], found[1]["calibration_error"], 1e-5)


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_a_second_run_a_kill_and_a_flipped_bit_change_nothing(tmp_path):
    workdir, settings = tmp_path / "run", {"train.steps": 40, "checkpoint.every_steps": 5}
    settings = {**settings, "eval.every_steps": 40}
    first = start(workdir, **settings)
    for _ in first.stdout:
        if len(checkpoint.saved_steps(workdir)) > 1:
            break
    second = start(workdir, **settings)
    output, _ = second.communicate(timeout=400)
    assert second.returncode == 2, output
    assert re.search(rf"error: .* is in use by process {first.pid} on \S+", output)
    assert first.poll() is None
    first.kill()
    first.communicate()

    newest = pathlib.Path(checkpoint.step_folder(workdir, checkpoint.saved_steps(workdir)[-1]))
    files = [path for path in newest.rglob("*") if path.is_file()]
    arrays = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 1
    arrays.write_bytes(data)
    output = finish(start(workdir, **settings))[0]
    assert f"taking over {workdir} from process {first.pid}" in output
    assert re.search(rf"{newest} is damaged: .*{arrays.name}; it is {newest.name}.damaged", output)
    assert not (workdir / "lock.json").exists()

    finish(start(tmp_path / "undisturbed", **settings))
    for prefix in ("train/", "eval/"):
        assert rows(workdir, prefix) == rows(tmp_path / "undisturbed", prefix)
    disturbed, undisturbed = (
        saved_arrays(folder, 40) for folder in (workdir, tmp_path / "undisturbed")
    )
    assert disturbed == undisturbed

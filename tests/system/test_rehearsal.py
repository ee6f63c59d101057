"""A rehearsal is the run itself: what interrupts it changes nothing."""

import itertools
import signal
import time

import pytest

from halonet import checkpoint
from tests.small_run import SETTINGS, rows, saved_arrays
from tests.system.launch import launch

STEPS = 8
SHORT = {
    **SETTINGS,
    "train.steps": STEPS,
    "eval.every_steps": STEPS,
    "checkpoint.every_steps": STEPS,
    "log.every_steps": 1,
}


def rehearse(workdir, *options):
    """Starts a rehearsal of 2 processes x 4 devices."""
    flags = [f"--config.{key}={value}" for key, value in SHORT.items()]
    return launch(
        *("-m", "launch", "rehearse", "--processes=2", "--devices=4", *options, "--"),
        *("--config=configs/mnist.py", f"--workdir={workdir}", *flags),
    )


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_preempted_and_started_again_it_ends_as_undisturbed(tmp_path):
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    process = rehearse(disturbed, "--restarts=1")
    said = list(itertools.takewhile(lambda it: "compiled the step" not in it, process.stdout))
    while not rows(disturbed, "train/"):
        assert process.poll() is None, said
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=400)
    output = "".join([*said, output])
    assert process.returncode == 0, output
    assert "exit code 75: starting again, 0 more at most\n" in output
    saved, last = checkpoint.saved_steps(disturbed)
    assert 1 <= saved < last == STEPS
    for index in range(2):
        assert f"\n[{index}] process {index} of 2 (coordinator 127.0.0.1:" in output
    assert ", 4 of 8 cpu devices here\n" in output
    assert f"[0] going on from the checkpoint of step {saved}\n" in output

    process = rehearse(undisturbed)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    for prefix in ("train/", "eval/"):
        assert rows(disturbed, prefix) == rows(undisturbed, prefix)
    assert [row["step"] for row in rows(disturbed, "train/")] == [*range(1, STEPS + 1)]
    arrays, expected = (saved_arrays(workdir, STEPS) for workdir in (disturbed, undisturbed))
    assert arrays.keys() == expected.keys()
    assert [path for path in expected if arrays[path] != expected[path]] == []

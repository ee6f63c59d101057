"""Signals and deaths at the worst moments, of real processes: nothing is lost, nothing is left."""

import itertools
import random
import re
import signal
import time

import numpy as np
import pytest

from halonet import checkpoint
from halonet.runtime import HUNG, PREEMPTED
from tests.small_run import rows, saved_arrays
from tests.system.launch import Start, launch
from tests.test_checkpoint import on_one_device
from tests.test_workers import descendants, wait_until_gone

# main.py, in which a moment is announced and lasts long enough to be struck.
SLOWED = """
import sys, time
import main
from absl import app
from halonet import evaluate, train
from halonet.checkpoint import Checkpointer
from halonet.data import device, pipeline

def announced(function, what, seconds):
    def slow(*args, **kwargs):
        print("now", what, flush=True)
        time.sleep(seconds)
        return function(*args, **kwargs)
    return slow

{patches}
app.run(main.main, flags_parser=main.parse_flags)
"""
SETTINGS = {
    "train.steps": 12,
    "eval.every_steps": 4,
    "checkpoint.every_steps": 3,
    "log.every_steps": 1,
}


def slowed(**moments):
    """What `Start` starts: main.py with each function named replaced by an announced one."""
    patches = "\n".join(
        f"{name} = announced({name}, {what!r}, {seconds})"
        for name, (what, seconds) in moments.items()
    )
    return "-c", SLOWED.format(patches=patches)


def starts(workdir, **settings):
    options = {"count": 1, "devices": 1, **SETTINGS}
    return Start(workdir, **{**options, **settings})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with starts(workdir) as start:
        assert start.wait() == [0], start.said()
    return workdir


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_whenever_one_process_is_struck_nothing_is_lost(undisturbed, tmp_path):
    """One run through all of them: each start goes on from where the last was struck."""
    workdir = tmp_path / "run"

    # While it compiles for the first time: there is nothing yet that could be lost.
    with starts(workdir) as start:
        start.until_said("compiling the step")
        start.signal_all(signal.SIGTERM)
        assert start.wait() == [PREEMPTED], start.said()
        assert "SIGTERM before step 1: nothing to save" in start.output()

    # While it evaluates step 4, which is saved before: the evaluation ends, and is not lost.
    program = slowed(**{"evaluate.eval_batches": ("evaluating", 2)})
    with starts(workdir, program=program) as start:
        start.until_said("now evaluating")
        start.until(lambda: checkpoint.saved_steps(workdir)[-1:] == [4], "a checkpoint")
        start.signal_all(signal.SIGTERM)
        assert start.wait() == [PREEMPTED], start.said()
        assert "SIGTERM at step 5 of 12: saved" in start.output()
    assert [row["step"] for row in rows(workdir, "eval/")] == [4]
    assert checkpoint.saved_steps(workdir)[-1] == 5

    # While it restores.
    program = slowed(**{"train.restore_state": ("restoring", 1)})
    with starts(workdir, program=program) as start:
        start.until_said("now restoring")
        start.signal_all(signal.SIGTERM)
        assert start.wait() == [PREEMPTED], start.said()
        assert "SIGTERM before step 6: nothing to save" in start.output()

    # The whole group, as Slurm and a terminal do it: batches come until the run has saved.
    slowly = slowed(**{"device.Prefetcher.__next__": ("fetching", 0.3)})
    with starts(workdir, program=slowly, **{"data.workers": 2}) as start:
        start.until(lambda: rows(workdir, "train/")[-1]["step"] >= 6, "step 6")
        assert len(descendants(start.processes[0].pid)) == 3  # with the nursery
        start.signal_all(signal.SIGTERM)
        assert start.wait(60) == [PREEMPTED], start.said()
        assert "lost one" not in start.output()

    # The trainer alone, by the one signal that it cannot hear: its workers end with it.
    with starts(workdir, program=slowly, **{"data.workers": 2}) as start:
        start.until_said("compiled the step")
        workers = descendants(start.processes[0].pid)
        assert len(workers) == 3
        start.processes[0].kill()
        wait_until_gone(workers, seconds=5)

    # Two signals: the second does not wait for the save, of which nothing counts.
    saved = checkpoint.saved_steps(workdir)[-1]
    slow = slowed(**{"Checkpointer._write_manifest": ("saving", 60)})
    for second in (signal.SIGTERM, signal.SIGINT):
        with starts(workdir, program=slow) as start:
            start.until_said(f"going on from the checkpoint of step {saved}")
            start.until_said("now saving")  # at a step that is due
            start.signal_all(signal.SIGTERM)
            start.until_said("again to leave at once")
            began = time.monotonic()
            start.signal_all(second)
            (code,) = start.wait(30)
            assert time.monotonic() - began < 5, start.said()
            assert code not in (0, PREEMPTED), start.said()
        assert checkpoint.saved_steps(workdir)[-1] == saved
        checkpoint.verify(checkpoint.step_folder(workdir, saved))

    with starts(workdir) as start:
        assert start.wait() == [0], start.said()
    for prefix in ("train/", "eval/"):
        assert rows(workdir, prefix) == rows(undisturbed, prefix)
    assert saved_arrays(workdir, 12) == saved_arrays(undisturbed, 12)


def state_of(step):
    """32 MB that follow from the step."""
    return {"array": np.random.default_rng(step).random((2048, 4096), np.float32)}


def save_for_ever(workdir, first):
    checkpointer = checkpoint.Checkpointer(workdir, keep_latest=2, best_steps=list)
    for step in itertools.count(first):
        checkpointer.save(step, state_of(step), {})
        print("saving", step, flush=True)


@pytest.mark.middle
@pytest.mark.timeout(300)
def test_a_kill_inside_a_save_leaves_only_whole_checkpoints(tmp_path):
    """Five, each a random time into a save."""
    rng, unfinished = random.Random(0), 0
    for _ in range(5):
        last = max(checkpoint.saved_steps(tmp_path), default=0)
        call = f"save_for_ever({str(tmp_path)!r}, {last + 1})"
        process = launch("-c", f"from {__name__} import save_for_ever; {call}")
        assert f"saving {last + 3}\n" in process.stdout
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        unfinished += len(list((tmp_path / checkpoint.FOLDER).glob("*.orbax-checkpoint-tmp*")))
        steps = checkpoint.saved_steps(tmp_path)
        assert steps[-1] > last
        for step in steps:
            folder, state = checkpoint.step_folder(tmp_path, step), state_of(step)
            checkpoint.verify(folder)
            restored = checkpoint.restore_arrays(folder, on_one_device(state))
            np.testing.assert_array_equal(restored["array"], state["array"])
    assert unfinished, "no kill was inside a save: too late to show anything"


@pytest.mark.middle
@pytest.mark.timeout(600)
def test_two_processes_stop_together_whenever_one_is_told(tmp_path):
    workdir = tmp_path / "run"
    settings = {**SETTINGS, "train.steps": 400, "eval.every_steps": 400}
    with Start(workdir, **settings) as start:
        start.until(lambda: checkpoint.saved_steps(workdir), "a checkpoint")
        start.processes[1].send_signal(signal.SIGINT)
        assert start.wait(60) == [PREEMPTED] * 2, start.said()
        assert re.search(r"a preemption notice at step \d+ of 400: saved", start.output())
    saved = checkpoint.saved_steps(workdir)[-1]
    # Before its first step, which is not the run's first.
    with Start(workdir, **settings) as start:
        start.until_said("compiling the step")
        start.processes[0].send_signal(signal.SIGTERM)
        assert start.wait(60) == [PREEMPTED] * 2, start.said()
    assert checkpoint.saved_steps(workdir)[-1] == saved + 1


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_one_of_two_dies_or_hangs_and_both_end(tmp_path):
    workdir = tmp_path / "run"
    settings = {**SETTINGS, "train.steps": 200, "eval.every_steps": 200}
    with Start(workdir, **settings) as start:
        start.until(lambda: len(checkpoint.saved_steps(workdir)) > 1, "two checkpoints")
        start.processes[1].kill()
        began = time.monotonic()
        codes = start.wait(60)
        print(f"process 0 ended with {codes[0]} after {time.monotonic() - began:.1f} s")
        assert codes[0] not in (0, PREEMPTED), start.said()
    saved = checkpoint.saved_steps(workdir)[-1]

    # Alive, with a heartbeat, and stuck: in process 1 some batch never comes.
    stuck = """
batches = pipeline.train_batches
def some(*args, process_index, **kwargs):
    for number, batch in enumerate(batches(*args, process_index=process_index, **kwargs)):
        if number == 6:
            time.sleep(600 if process_index else 5)  # process 0 is to be the later one
        yield batch
pipeline.train_batches = some
"""
    program = ("-c", SLOWED.format(patches=stuck))
    with Start(workdir, program=program, **{**settings, "train.hang_seconds": 20}) as start:
        start.until_said(f"going on from the checkpoint of step {saved}")
        start.until_said("compiled the step")
        codes = start.wait(60)
        print(f"a hang: {codes}")
        assert codes[1] == HUNG, start.said()
        assert codes[0] not in (0, PREEMPTED), start.said()
        said = start.output(1)
        assert "error: no progress for 20 s while waiting for data; where each thread" in said
        assert re.search(r"in some$", said, re.MULTILINE)
    assert checkpoint.saved_steps(workdir)[-1] > saved

    # One process, on one device, goes on where two on four stood.
    saved = checkpoint.saved_steps(workdir)[-1]
    with starts(workdir, **settings) as start:
        start.until_said(f"going on from the checkpoint of step {saved}")
        start.until_said("compiled the step")
        start.until(lambda: checkpoint.saved_steps(workdir)[-1] > saved, "a checkpoint of its own")

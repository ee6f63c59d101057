"""A run that is interrupted at random, again and again, ends where an undisturbed one ends."""

import json
import os
import random
import signal
import time

import pytest

from halonet import checkpoint, metrics
from tests.small_run import rows, saved_arrays
from tests.system.launch import Start
from tests.test_workers import descendants

TERM_ONE, TERM_ALL = "SIGTERM to process {}", "SIGTERM to all"
KILL, KILL_SAVING = "SIGKILL of process {}", "SIGKILL of process {} inside a save"
KILL_WORKER = "SIGKILL of a data worker of process {}"
FLIP = "a flipped bit"
KINDS = (TERM_ONE, KILL_SAVING, FLIP, KILL_WORKER, TERM_ALL, KILL)
SEED = 20_210_323
# The last steps are left in peace: the notice of a preemption takes effect a step or two later.
CALM = 6


def last_step(workdir):
    return metrics.read_metrics(workdir)[-1]["step"]


def good_steps(workdir):
    def good(step):
        try:
            checkpoint.verify(checkpoint.step_folder(workdir, step))
        except checkpoint.CheckpointError:
            return False
        return True

    return [step for step in checkpoint.saved_steps(workdir) if good(step)]


def flip_a_bit(rng, workdir):
    """In a file of the newest good checkpoint, among those that matter; returns where."""
    folder = workdir / checkpoint.FOLDER / str(good_steps(workdir)[-1])
    recorded = json.loads((folder / checkpoint.MANIFEST).read_text())["sha256"]
    files = [folder / name for name in [*sorted(recorded), checkpoint.MANIFEST]]
    path = rng.choice([file for file in files if file.stat().st_size])
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {path.relative_to(folder.parent)}"


def strike(kind, rng, start, wait):
    """Interrupts a running start some steps from now; returns how, and the exit codes.

    Args:
      wait: after so many steps, and so many seconds beside.
    """
    workdir, index = start.workdir, rng.randrange(2)
    start.until_said("compiled the step in")
    workers = [sorted(descendants(process.pid)) for process in start.processes]
    steps, seconds = wait
    since = last_step(workdir)
    start.until(lambda: last_step(workdir) >= since + steps, f"step {since + steps}")
    time.sleep(seconds)
    if kind == KILL_SAVING:
        folder = workdir / checkpoint.FOLDER
        start.until(lambda: list(folder.glob("*.orbax-checkpoint-tmp*")), "a save")
        time.sleep(rng.uniform(0, 0.3))
    struck = start.processes[index]
    how, began = f"{kind.format(index)} at step {last_step(workdir)}", time.monotonic()
    if kind == TERM_ALL:
        start.signal_all(signal.SIGTERM)
    elif kind == TERM_ONE:
        struck.send_signal(signal.SIGTERM)
    elif kind == KILL_WORKER:
        os.kill(rng.choice(workers[index]), signal.SIGKILL)
        # It shall be told within half a minute.
        struck.wait(30)
    else:
        struck.kill()
    if kind not in (TERM_ALL, TERM_ONE):
        # As launchers do, and not to wait for a heartbeat that fails to come.
        struck.wait(30)
        for process in start.processes:
            process.kill()
    codes = start.wait()
    expected = {TERM_ALL: 75, TERM_ONE: 75, KILL_WORKER: 3}.get(kind, -signal.SIGKILL)
    assert codes[index] == expected, f"{how}: {codes}\n{start.said()}"
    return f"{how}, ended after {time.monotonic() - began:.1f} s"


def interrupted_run(workdir, interruptions, seed, **settings):
    """Starts a run until it ends, having been interrupted so often, by each kind as often."""
    rng, total = random.Random(seed), settings["train.steps"]
    left = [KINDS[i % len(KINDS)] for i in range(interruptions)]
    rng.shuffle(left)
    done, began = 0, time.monotonic()
    while left:
        # Where one of two is damaged the run goes on from the other; where all are it must not.
        can_flip = workdir.exists() and len(good_steps(workdir)) > 1
        kind = next((kind for kind in left if can_flip or kind != FLIP), TERM_ALL)
        if kind == FLIP:
            how = flip_a_bit(rng, workdir)
        else:
            begin = max(good_steps(workdir), default=0) if workdir.exists() else 0
            # On the average each takes its share of the way, and something is left for the last.
            most = 1.2 * (total - CALM - begin) / (len(left) + 1)
            wait = rng.randint(0, max(0, int(most))), rng.uniform(0, 0.5)
            with Start(workdir, **settings) as start:
                how = strike(kind, rng, start, wait)
        if kind in left:
            left.remove(kind)
            done += 1
        print(f"{time.monotonic() - began:4.0f} s  {done}/{interruptions}  {how}", flush=True)
    finish(workdir, **settings)


def finish(workdir, **settings):
    with Start(workdir, **settings) as start:
        assert start.wait(900) == [0, 0], start.said()


@pytest.mark.parametrize(
    ("interruptions", "settings"),
    [
        pytest.param(
            4,
            {"train.steps": 24, "checkpoint.every_steps": 6, "eval.every_steps": 12},
            marks=[pytest.mark.middle, pytest.mark.timeout(900)],
        ),
        pytest.param(
            int(os.environ.get("CHAOS", "100")),  # an hour or two
            {"train.steps": 300, "checkpoint.every_steps": 20, "eval.every_steps": 50},
            marks=[pytest.mark.long, pytest.mark.timeout(14_400)],
        ),
    ],
    ids=lambda it: it if isinstance(it, int) else "",
)
def test_interruptions_change_nothing(tmp_path, interruptions, settings):
    """On two processes of two devices each: seed, kinds and steps are printed."""
    settings = {**settings, "checkpoint.keep_latest": 3, "log.every_steps": 1, "data.workers": 1}
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    interrupted_run(disturbed, interruptions, SEED, **settings)
    finish(undisturbed, **settings)

    for prefix in ("train/", "eval/"):
        history = rows(undisturbed, prefix)
        assert rows(disturbed, prefix) == history
    assert [row["step"] for row in rows(disturbed, "train/")] == [
        *range(1, settings["train.steps"] + 1)
    ]
    arrays, expected = (
        saved_arrays(workdir, settings["train.steps"]) for workdir in (disturbed, undisturbed)
    )
    assert arrays.keys() == expected.keys()
    assert [path for path in expected if arrays[path] != expected[path]] == []
    groups = {path.split("'")[1] for path in expected}
    assert groups == {"step", "params", "batch_stats", "opt_state", "ema"}

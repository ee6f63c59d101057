"""A sweep of real runs: a member and the launcher are killed, and a second run finishes it."""

import importlib.util
import json
import os
import signal
import time

import pytest
from etils import epath

from experiments import sweeps
from tests.system.launch import launch

SHORT = {
    "train.steps": 24,
    "model.plan": "c/c",  # compiled in half the time
    "eval.every_steps": 24,
    "checkpoint.every_steps": 8,
    "log.every_steps": 2,
}


def run(root):
    """A launcher of the sweep, and the file that it prints into."""
    flags = [f"--config.{key}={value}" for key, value in SHORT.items()]
    said = root / f"said{len(list(root.glob('said*')))}"
    with said.open("w") as file:
        command = ("-m", "experiments", "run", "scale_smoke", "--jobs=2", f"--root={root}", *flags)
        return launch(*command, stdout=file), said


def until(found, launcher, seconds=400):
    """Waits for found(), and returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (it := found()):
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.05)
    return it


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_a_sweep_survives_the_kill_of_a_member_and_of_its_launcher(tmp_path):
    folder = epath.Path(tmp_path) / "scale_smoke"
    members = {member.name: member.id for member in sweeps.load("scale_smoke").members}
    assert len(members) >= 6

    def states():
        return {name: sweeps.state(folder, it) for name, it in members.items()}

    def remembered(name):
        return json.loads((folder / f"{members[name]}.json").read_text())

    def one(state):
        """A member in that state; of those that run, one in the middle."""
        found = (name for name, it in states().items() if it.name == state)
        middle = range(2, 15) if state == "running" else range(SHORT["train.steps"] + 1)
        return next((name for name in found if states()[name].step in middle), "")

    launcher, _ = run(tmp_path)
    try:
        # One is killed at work; the others go on.
        killed = until(lambda: one("running"), launcher)
        owner = json.loads((folder / members[killed] / "lock.json").read_text())
        os.kill(owner["pid"], signal.SIGKILL)
        until(lambda: states()[killed].name == "failed", launcher)
        assert states()[killed].exit_code == 137
        until(lambda: one("done"), launcher)
        # Then the launcher, while others are at work, who save.
        interrupted = until(lambda: one("running"), launcher)
    finally:
        launcher.kill()
        launcher.wait()
    done = [name for name, it in states().items() if it.name == "done"]

    launcher, said = run(tmp_path)
    try:
        assert launcher.wait(600) == 0, said.read_text()
    finally:
        launcher.kill()
        launcher.wait()
    for name in members:
        assert states()[name].name == "done"
        summary = json.loads((folder / members[name] / "summary.json").read_text())
        assert summary["step"] == SHORT["train.steps"]
        # One that came to its end after its launcher had no one to see that.
        assert remembered(name).get("exit_code", 0) == 0
    assert {name for name in members if remembered(name)["attempts"] > 1} >= {killed, interrupted}
    for name in done:
        assert f"{name} has ended already" in said.read_text()
        assert remembered(name)["attempts"] == 1
    log = (folder / f"{members[interrupted]}.log").read_text()
    assert "going on from the checkpoint of step" in log
    if importlib.util.find_spec("experiments.collect"):
        out = tmp_path / "report"
        command = ("-m", "experiments", "collect", "scale_smoke", f"--root={tmp_path}")
        collecting = launch(*command, f"--out={out}")
        printed, _ = collecting.communicate(timeout=200)
        assert collecting.returncode == 0, printed
        assert [path.suffix for path in out.rglob("*.html")] == [".html"]
        (table,) = out.rglob("*.csv")
        assert all(name in table.read_text() for name in members)

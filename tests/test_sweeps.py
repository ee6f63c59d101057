"""Sweeps: what is refused, what is started and what not, by members that only look like runs."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
from etils import epath

from configs import imagenet
from experiments import __main__ as command_line
from experiments import sweeps
from experiments.sweeps import Member, Sweep, SweepError
from halonet.config import flatten
from halonet.runtime import WorkdirLock
from launch import TARGETS
from launch.runs import read_config
from tests import command_lines

ROOT = pathlib.Path(__file__).parent.parent
# ml_collections loads config files by an older way of importlib.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

NAMES = sweeps.names()
CONFIG = "experiments/borders.py:smoke"

# What main.py does, as far as its launcher can tell: --config.do says how it ends.
MEMBER = """
import json, os, pathlib, signal, sys, time

flags = dict(it[2:].split("=", 1) for it in sys.argv[1:])
workdir, do = pathlib.Path(flags["workdir"]), flags["config.do"]
workdir.mkdir(exist_ok=True)
signals = []
signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))

def note(what):
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    with open(workdir.parent / "notes", "a") as file:
        file.write(f"{what} {workdir.name.rpartition('-')[0]} {os.getpid()} {cores}\\n")

note("start")
(workdir / "config.json").write_text(json.dumps({"train": {"steps": 4}}))
if do == "fail":
    print("error: it cannot be\\nand more")
    sys.exit(3)
if do == "used":
    (workdir / "lock.json").write_text(json.dumps({"heartbeat": time.time()}))
    print("error: it is in use by another")
    sys.exit(2)
# A run that waits goes on when it is told to; one that was stopped, at its next start.
again = (workdir / "saved").exists()
while not (again or signals or (workdir.parent / "go").exists()) and do in ("wait", "slow"):
    time.sleep(0.02)
if signals or do == "stop" or (do == "stop once" and not again):
    while do == "slow" and not (workdir.parent / "saving").exists():
        time.sleep(0.02)
    (workdir / "saved").touch()
    note("saved")
    sys.exit(75)
(workdir / "summary.json").write_text(json.dumps({"step": 4, "eval/top1": 0.975}))
note("done")
"""

LAUNCHER = """
import pathlib, sys
from etils import epath
from experiments.launcher import Launcher
from experiments.sweeps import Member, Sweep

folder, jobs, *members = sys.argv[1:]
members = tuple(Member(*it.split(":")[:1], {"do": it.split(":")[1]}) for it in members)
sweep = Sweep("made_up", "experiments/made_up.py:smoke", {}, members)
sys.exit(Launcher(sweep, epath.Path(folder), jobs=int(jobs), program=(folder + ".py",)).run())
"""


class Folder:
    """The folder of a made-up sweep, and launchers of it."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        path.with_name(f"{path.name}.py").write_text(MEMBER)

    def launch(self, *members, jobs=1):
        """Starts a launcher of members "name:what it does"."""
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(self.path), str(jobs), *members],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *members, jobs=1):
        """(exit code, lines) of a launcher."""
        launcher = self.launch(*members, jobs=jobs)
        said, _ = launcher.communicate(timeout=60)
        return launcher.returncode, said.splitlines()

    def notes(self, what=""):
        """What members noted, as (what, name, pid, cores)."""
        path = self.path / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [tuple(line.split()) for line in lines if line.startswith(what)]

    def started(self):
        return [name for _, name, *_ in self.notes("start")]

    def until(self, happened):
        deadline = time.monotonic() + 30
        while not happened():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def state(self, text):
        """Of a member "name:what it does"."""
        name, do = text.split(":")
        return sweeps.state(epath.Path(self.path), Member(name, {"do": do}).id)


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "made_up")
    yield made
    for _, _, pid, _ in made.notes("start"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def test_a_failed_member_stops_no_other_and_a_second_run_takes_the_rest(folder):
    members = ("a:ok", "b:fail", "c:ok")
    code, said = folder.run(*members)
    assert code == 1
    assert folder.started() == ["a", "b", "c"]
    (line,) = [line for line in said if line.startswith("b failed")]
    log = folder.path / f"{Member('b', {'do': 'fail'}).id}.log"
    assert line == f"b failed with exit code 3: error: it cannot be; all of it: {log}"
    assert [line for line in said if line.startswith("c is done: top-1 97.50 %, 0:0")]
    assert said[-1] == f"3 members: 2 done, 1 failed, 0 left, in {folder.path}"
    assert [folder.state(it).name for it in members] == ["done", "failed", "done"]
    assert folder.state("b:fail").exit_code == 3

    code, said = folder.run(*members)
    assert (code, folder.started()[3:]) == (1, ["b"])
    assert "a has ended already: top-1 97.50 %" in said
    attempts = json.loads(log.with_suffix(".json").read_text())["attempts"]
    assert (attempts, log.read_text().count("$ ")) == (2, 2)


def test_all_done_is_exit_code_0(folder):
    assert folder.run("a:ok", "b:ok", jobs=3)[0] == 0


def test_a_preempted_member_is_started_again(folder):
    code, said = folder.run("a:stop once", "b:ok")
    assert (code, folder.started()) == (0, ["a", "a", "b"])
    assert "a was stopped at step 0: starting it again (1 of 5)" in said


def test_but_not_for_ever(folder):
    code, said = folder.run("a:stop", "b:ok")
    assert (code, folder.started()) == (75, [*("a" * 6), "b"])
    assert "a was stopped at step 0, more than 5 times: passed over" in said
    assert said[-1].startswith("2 members: 1 done, 0 failed, 1 left")
    assert folder.state("a:stop").name == "preempted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_waits_for_its_members(folder, number):
    launcher = folder.launch("a:wait", "b:wait", "c:ok", jobs=2)
    folder.until(lambda: len(folder.started()) == 2)
    assert folder.state("a:wait").name == "running"
    launcher.send_signal(number)
    said, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 75
    assert "stopping: the members save; again to kill them" in said
    assert sorted(name for _, name, *_ in folder.notes("saved")) == ["a", "b"]
    assert [folder.state(it).name for it in ("a:wait", "c:ok")] == ["preempted", "queued"]
    assert folder.run("a:wait", "b:wait", "c:ok")[0] == 0
    assert folder.started()[2:] == ["a", "b", "c"]


def test_a_second_signal_kills(folder):
    launcher = folder.launch("a:slow")
    folder.until(folder.started)
    launcher.terminate()
    assert launcher.stdout.readline().startswith(
        "0 done, 1 running, 0 failed, 0 queued; ? left: a "
    )
    assert launcher.stdout.readline().startswith("stopping: ")
    launcher.terminate()
    said, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 75
    assert said.startswith("a was killed at step 0\n1 members: 0 done, 0 failed, 1 left")
    assert folder.state("a:slow").exit_code == 137


def test_a_killed_launcher_leaves_nothing_that_the_next_one_would_meet(folder):
    launcher = folder.launch("a:slow", "b:ok")
    folder.until(folder.started)
    launcher.kill()
    launcher.communicate()
    # Its member was told to stop, and is still saving.
    launcher = folder.launch("a:slow", "b:ok")
    while launcher.stdout.readline() != "a is run by another launcher: waiting for it\n":
        assert launcher.poll() is None
    assert folder.started() == ["a", "b"]
    (folder.path / "saving").touch()
    launcher.communicate(timeout=30)
    assert launcher.returncode == 0
    assert [it[:2] for it in folder.notes()] == [
        *(("start", "a"), ("start", "b"), ("done", "b")),
        *(("saved", "a"), ("start", "a"), ("done", "a")),
    ]


def test_two_launchers_share_the_members(folder):
    first = folder.launch("a:wait", "b:ok")
    folder.until(folder.started)
    second = folder.launch("a:wait", "b:ok")
    folder.until(lambda: folder.notes("done"))
    time.sleep(0.3)
    assert second.poll() is None
    (folder.path / "go").touch()
    said = [it.communicate(timeout=30)[0] for it in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert sorted(folder.started()) == ["a", "b"]
    assert "a is run by another launcher: waiting for it" in said[1]
    assert "a has ended already" in said[1]
    assert "b has ended already" in said[0]


def test_a_member_that_was_started_by_hand_is_passed_over(folder):
    code, said = folder.run("a:used", "b:ok")
    assert code == 75
    assert "a is passed over: error: it is in use by another" in said
    assert folder.started() == ["a", "b"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="of Linux")
def test_members_share_the_cores(folder):
    cores = sorted(os.sched_getaffinity(0))
    assert folder.run("a:ok", "b:ok", jobs=1)[0] == 0
    assert {it[3] for it in folder.notes("start")} == {",".join(map(str, cores))}
    (folder.path / "notes").unlink()
    names = [f"m{number}" for number in range(len(cores))]
    launcher = folder.launch(*(f"{name}:wait" for name in names), jobs=len(cores))
    folder.until(lambda: len(folder.started()) == len(names))
    assert sorted(it[3] for it in folder.notes("start")) == sorted(map(str, cores))
    (folder.path / "go").touch()
    assert launcher.wait(30) == 0
    launcher.stdout.close()
    (folder.path / "notes").unlink()
    more = [f"n{number}:ok" for number in range(len(cores) + 1)]
    assert folder.run(*more, jobs=len(more))[0] == 0
    assert {it[3] for it in folder.notes("start")} == {",".join(map(str, cores))}


# What a sweep is.


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Writes a sweep "made" into a folder of sweeps; what its generator yields is Python."""

    def write(yields, head=""):
        text = f'"""What of it?"""\n{head}\ndef get_config(scale="full"):\n'
        text += "    from configs import mnist\n    return mnist.get_config()\n\n"
        text += f'def sweep(scale="full"):\n    yield from {yields}\n'
        (tmp_path / "made.py").write_text(text)
        monkeypatch.setattr(sweeps, "FOLDER", tmp_path)

    return write


def test_an_id_is_of_the_overrides_alone():
    one = Member("a", {"seed": 1, "model.widths": (8, 16)})
    assert re.fullmatch(r"a-[0-9a-f]{8}", one.id)
    assert one.id == Member("a", {"model.widths": [8, 16], "seed": 1}).id
    assert one.id != Member("a", {"seed": 2, "model.widths": (8, 16)}).id
    assert one.id[-8:] == Member("b", one.overrides).id[-8:]


def test_a_sweep_is_read_with_its_scale(made):
    made('[{"name": scale, "seed": 1}]')
    assert sweeps.names() == ["made", "made_smoke"]
    assert sweeps.question("made_smoke") == "What of it?"
    for name, scale in (("made", "full"), ("made_smoke", "smoke")):
        found = sweeps.load(name, ["train.steps=30", "data.data_dir=30", "model.widths=(8, 16)"])
        assert found.config == f"experiments/made.py:{scale}"
        assert found.members == (Member(scale, {"seed": 1}),)
        # With the types that the configuration has.
        assert found.overrides["data.data_dir"] == "30"
        assert found.overrides["train.steps"] == 30
        assert found.overrides["model.widths"] == (8, 16)
    (run,) = found.runs("gs://bucket/runs/")
    assert run.name == "made-smoke-smoke"
    assert run.workdir == f"gs://bucket/runs/made_smoke/{found.members[0].id}"
    assert run.flags[2:] == [
        *("--config.train.steps=30", "--config.data.data_dir=30"),
        *("--config.model.widths=(8, 16)", "--config.seed=1"),
    ]


@pytest.mark.parametrize(
    ("yields", "message"),
    [
        ("[]", "sweep made has no members"),
        ("[3]", "sweep made yields 3; a member is a dict of overrides by dotted key and a 'name'"),
        ('[{"seed": 1}]', "sweep made yields {'seed': 1}; a member is a dict .* and a 'name'"),
        ('[{"name": "a"}, {"name": "a", "seed": 1}]', "sweep made has two members named 'a'"),
        (
            '[{"name": "a", "seed": 1}, {"name": "b", "seed": 1}]',
            "members 'a' and 'b' of sweep made have the same overrides: {'seed': 1}",
        ),
        (
            '[{"name": "a", "train.epochs": 3}]',
            "--config.train.epochs=2: member 'a' sets it to 3; it cannot be the same for all",
        ),
        (
            '[{"name": "a", "seed": {1}}]',
            "member 'a' of sweep made: Object of type set is not JSON serializable",
        ),
        ("[1 / 0]", "experiments/made.py: ZeroDivisionError: division by zero"),
    ],
)
def test_a_bad_sweep_is_refused(made, yields, message):
    made(yields)
    with pytest.raises(SweepError, match=f"^{message}$"):
        sweeps.load("made", ["train.epochs=2"])


def test_a_sweep_that_cannot_be_imported_is_refused(made):
    made("[]", head="import nothing_of_that_name")
    with pytest.raises(SweepError, match="made.py: ModuleNotFoundError: No module named 'nothing_"):
        sweeps.load("made")


def test_an_unknown_sweep_is_refused():
    with pytest.raises(SweepError, match="no sweep 'scale_smok'; did you mean 'scale_smoke'"):
        sweeps.load("scale_smok")
    with pytest.raises(SweepError, match="no sweep 'xyz'; there are: block_halo, block_halo_smoke"):
        sweeps.load("xyz")


def sweep_of(*members, config=CONFIG, **overrides):
    members = tuple(Member(f"m{number}", it) for number, it in enumerate(members))
    return Sweep("borders_smoke", config, overrides, members)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model.bordr": "mask"},
            "no config key 'model.bordr' (value 'mask'); did you mean 'model.border'?",
        ),
        (
            {"train.steps": "many"},
            "config.train.steps=many is not of the key's type, int: now 500",
        ),
        (
            {"train.steps": 12.5},
            "config.train.steps=12.5 is not of the key's type, int: now 500",
        ),
        ({"model.border": 3}, "model.border=3 would be read as '3'; give one value"),
        ({"train.steps": -1}, "config.train.steps=-1 must not be negative"),
        ({"model.block_size": 6}, "config.data.image_size=32: image height 32 cannot be cut into"),
        ({"model.widths": (8, 15)}, "config.model: width 15 cannot be shared by 4 heads"),
        ({"model.name": "halonet_h9"}, "config.model: unknown model 'halonet_h9'; did you mean"),
        ({"data.batch_size": 48}, "config.data.batch_size=48 cannot be shared by 1 devices in"),
    ],
)
def test_a_member_that_cannot_run_is_refused(overrides, message):
    with pytest.raises(SweepError, match=re.escape(f"run 'borders-smoke-m1': {message}")):
        sweeps.check(sweep_of({"seed": 3}, overrides), devices=1)


def test_what_is_wrong_for_all_is_refused():
    with pytest.raises(SweepError, match="no config key 'modl.border'"):
        sweeps.check(sweep_of({"seed": 3}, **{"modl.border": "mask"}), devices=1)
    with pytest.raises(SweepError, match="experiments/borders.py:half: unknown scale 'half'; "):
        sweeps.check(sweep_of({"seed": 3}, config="experiments/borders.py:half"), devices=1)
    with pytest.raises(SweepError, match="batch_size=32 cannot be shared by 4 devices"):
        sweeps.check(sweep_of({"seed": 3}), devices=4)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_sweep_can_be_built(name):
    sweep = sweeps.load(name)
    runs = sweeps.check(sweep, devices=1)
    assert [run.overrides for run in runs] == [member.overrides for member in sweep.members]
    # They are of one kind, so that its columns say how they differ.
    assert len(sweep.members) > 1


@pytest.mark.parametrize("name", [it for it in NAMES if it.endswith(sweeps.SMOKE)])
def test_a_shipped_sweep_says_what_it_asks_and_costs(name):
    file = name.removesuffix(sweeps.SMOKE)
    text = (ROOT / "experiments" / f"{file}.py").read_text().split('"""')[1]
    assert sweeps.question(name).endswith("?")
    for part in (f"python -m experiments run {name} ", "The paper", "\nfull: ", "\nsmoke: "):
        assert part in text
    for scale, sweep in (("full", sweeps.load(file)), ("smoke", sweeps.load(name))):
        said = text.partition(f"\n{scale}: ")[2]
        seeds = len({member.overrides.get("seed") for member in sweep.members})
        assert f"{len(sweep.members) // seeds} members" in said.partition("\nsmoke: ")[0]
        assert seeds == (3 if scale == "smoke" and file != "scale" else 1)


def test_sweeps_are_read_without_jax():
    code = (
        "import sys; from experiments import __main__, sweeps\n"
        "assert [sweeps.load(name) for name in sweeps.names()]; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_members_of_scale_are_the_recipes_of_imagenet():
    for run in sweeps.load("scale").runs("runs"):
        recipe = imagenet.get_config(run.overrides["model.name"])
        assert flatten(read_config(run)) == flatten(recipe)


# What is kept of a sweep.


def test_a_record_grows_and_does_not_change(tmp_path):
    folder = epath.Path(tmp_path) / "made"
    with pytest.raises(SweepError, match="made holds no sweep: there is no sweep.json in it"):
        sweeps.read_record(folder)
    steps = {"train.steps": 30}
    small = sweep_of({"model.widths": (8, 16)}, **steps)
    sweeps.write_record(small, folder)
    sweeps.write_record(small, folder)
    (member,) = small.members
    assert sweeps.read_record(folder) == {
        "sweep": "borders_smoke",
        "config": CONFIG,
        "overrides": steps,
        "members": [{"name": "m0", "id": member.id, "overrides": {"model.widths": [8, 16]}}],
    }
    more = sweep_of(member.overrides, {"seed": 1}, **steps)
    sweeps.write_record(more, folder)
    assert len(sweeps.read_record(folder)["members"]) == 2
    with pytest.raises(SweepError, match=f"has no more, or has changed: {more.members[1].id}; "):
        sweeps.write_record(small, folder)
    other = dataclasses.replace(more, overrides={"train.steps": 40})
    with pytest.raises(
        SweepError, match=r"other overrides: --config.train.steps=30 there, .*=40 now; take another"
    ):
        sweeps.write_record(other, folder)
    with pytest.raises(SweepError, match="other config: experiments/borders.py:smoke there, "):
        sweeps.write_record(dataclasses.replace(more, config="experiments/a.py:smoke"), folder)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(SweepError, match="runs/made cannot be made: Not a directory; take another"):
        sweeps.write_record(sweep_of({"seed": 1}), epath.Path(tmp_path) / "runs" / "made")


def test_states_are_read_from_files(tmp_path, capsys):
    folder = epath.Path(tmp_path) / "borders_smoke"
    sweep = sweep_of(*({"seed": seed} for seed in range(7)))
    sweeps.write_record(sweep, folder)
    ids = [member.id for member in sweep.members]

    def write(number, suffix, **values):
        path = folder / f"{ids[number]}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))

    write(1, "/summary.json", **{"step": 90, "eval/top1": 0.5})
    write(1, ".json", attempts=1, exit_code=0, seconds=12.0)
    write(2, ".json", attempts=1, exit_code=7, seconds=3.0)
    # Of a launcher that was killed.
    write(3, ".json", attempts=1)
    # Elsewhere, so that there is but a heartbeat.
    write(4, "/config.json", train={"steps": 90})
    (folder / ids[4] / "metrics").mkdir()
    rows = ({"step": 20, "eval/top1": 0.25}, {"step": 30, "train/loss": 1.0})
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / ids[4] / "metrics" / "000.jsonl").write_text(text)
    # A heartbeat of long ago, or of before the last end.
    write(5, "/lock.json", heartbeat=time.time() - 300)
    write(6, "/lock.json", heartbeat=time.time() - 2)
    write(6, ".json", attempts=2, exit_code=143, ended=time.time())
    with WorkdirLock(folder / ids[4]):
        assert command_line.main(["status", "borders_smoke", f"--root={tmp_path}"]) == 0
    lines, last = capsys.readouterr().out.splitlines(), ["1", "running"]
    assert [line.split() for line in lines] == [
        ["member", "state", "exit", "step", "top-1", "seconds"],
        ["m0", "queued", "-", "0", "-", "-"],
        ["m1", "done", "0", "90", "of", "90", "50.00", "%", "12"],
        ["m2", "failed", "7", "0", "-", "3"],
        ["m3", "preempted", "-", "0", "-", "-"],
        ["m4", "running", "-", "30", "of", "90", "25.00", "%", "-"],
        ["m5", "preempted", "-", "0", "-", "-"],
        ["m6", "preempted", "143", "0", "-", "-"],
        ["7", "members:", "1", "queued,", "1", "done,", "1", "failed,", "3", "preempted,", *last],
    ]


# The command line.


def said(capsys, *arguments):
    """(exit code, what stderr and stdout have) of a command."""
    try:
        code = command_line.main([str(it) for it in arguments])
    except SystemExit as leaving:
        code = leaving.code
    found = capsys.readouterr()
    return code, found.err, found.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "the following arguments are required: NAME"),
        (["run", "scal"], "there is no sweep 'scal'; did you mean 'scale'?"),
        (["run", "scale", "--job=2"], "unrecognized argument: --job=2"),
        (
            ["run", "scale", "--config.seed"],
            "unrecognized argument: --config.seed; a key is set by --config.key=value",
        ),
        (["status", "scale", "--config.seed=1"], "unrecognized argument: --config.seed=1; a key"),
        (["run", "scale", "--jobs=0"], "--jobs=0 must be at least 1"),
        (["run", "scale", "--index=8"], "--index=8: scale has the members 0 to 7"),
        (["run", "scale", "--root=gs://a"], "--root=gs://a is of no file system of this machine"),
        (["status", "scale", "--root=/nowhere"], "/nowhere/scale holds no sweep: there is no"),
        (["collect", "scale", "--root=/nowhere"], "/nowhere/scale holds no sweep: there is no"),
        (
            ["render", "scale", "--target=slurm", "--topology=gpu:1", "--root=/r", "--out=/o"],
            "target slurm needs time",
        ),
        (["lst"], "argument COMMAND: invalid choice: 'lst'"),
    ],
)
def test_a_command_that_is_wrong_is_refused(capsys, arguments, message):
    code, err, out = said(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_the_list_has_every_sweep(capsys):
    code, _, out = said(capsys, "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == NAMES
    assert re.search(r"^scale_smoke +7 members  How does accuracy grow with .*\?$", out, re.M)


@pytest.mark.middle  # for the process in which it is checked
def test_nothing_is_started_of_a_sweep_that_is_refused(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(command_line, "Launcher", pytest.fail)
    code, err, _ = said(
        capfd, "run", "borders_smoke", f"--root={tmp_path}", "--config.model.borders=1"
    )
    assert code == 2
    assert err.startswith("error: run 'borders-smoke-zeros-seed0': no config key 'model.borders'")
    assert list(tmp_path.iterdir()) == []


def test_a_run_launches_what_was_chosen(monkeypatch, capsys, tmp_path):
    launched = []

    class Launcher:
        def __init__(self, sweep, folder, *, jobs):
            launched.append((sweep, str(folder), jobs))

        def run(self):
            return 1

    monkeypatch.setattr(command_line, "Launcher", Launcher)
    checked = []
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda it, **_: checked.append(it) or done)
    arguments = ["run", "scale_smoke", f"--root={tmp_path}", "--config.train.steps=9"]
    assert said(capsys, *arguments, "--jobs=3", "--index=2")[0] == 1
    ((sweep, folder, jobs),) = launched
    assert (folder, jobs) == (str(tmp_path / "scale_smoke"), 3)
    whole = sweeps.load("scale_smoke", ["train.steps=9"])
    assert sweep == dataclasses.replace(whole, members=whole.members[2:3])
    check = ["-m", "experiments", "check", "scale_smoke", "--config.train.steps=9"]
    assert [it[1:] for it in checked] == [check]
    # The others are left to other machines.
    assert sweeps.read_record(tmp_path / "scale_smoke") == whole.record()


def test_collecting_is_left_to_its_module(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "borders_smoke"
    sweeps.write_record(sweep_of({"seed": 1}), epath.Path(folder))

    def collect(folder, *, out, allow_mixed):
        if not allow_mixed:
            raise SweepError(f"two versions in {folder}")
        print(folder, out)

    module = types.SimpleNamespace(collect=collect)
    monkeypatch.setitem(sys.modules, "experiments.collect", module)
    command = ("collect", "borders_smoke", f"--root={tmp_path}")
    assert said(capsys, *command) == (2, f"error: two versions in {folder}\n", "")
    assert said(capsys, *command, "--allow_mixed", "--out=o") == (0, "", f"{folder} o\n")


RENDER = {
    "jobset": ("gs://RUNS/x", "v5e:8x8", "--image=i"),
    "gcloud": ("gs://RUNS/x", "v5e:8x8", "--project=p", "--zone=z"),
    "slurm": ("/shared/runs", "gpu:8x8", "--time=60"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_members_are_rendered_as_runs(capsys, tmp_path, target):
    root, topology, *settings = RENDER[target]
    where = [f"--target={target}", f"--topology={topology}", f"--root={root}", f"--out={tmp_path}"]
    code, err, out = said(capsys, "render", "scale", *where, *settings, "--config.data.workers=4")
    assert (code, err) == (0, "")
    sweep = sweeps.load("scale", ["data.workers=4"])
    *lines, copy = out.splitlines()
    assert len(lines) == len(list(tmp_path.iterdir())) - 1 == 8
    for line, run in zip(lines, sweep.runs(root, topology), strict=True):
        text = pathlib.Path(re.split("[ =]", line)[-1]).read_text()
        assert all(flag in text for flag in run.flags)
    assert f"{tmp_path}/sweep.json {root}/scale/sweep.json" in copy
    assert json.loads((tmp_path / "sweep.json").read_text()) == sweep.record()


def test_what_the_devices_of_a_cluster_cannot_share_is_refused(capsys, tmp_path):
    where = [f"--out={tmp_path}", "--root=gs://RUNS", "--target=jobset", "--image=i"]
    code, err, _ = said(capsys, "render", "scale", *where, "--topology=v5e:16x16")
    assert code == 2
    assert "batch_size=4096 cannot be shared by 256 devices in groups of config.model.bn_g" in err
    assert list(tmp_path.iterdir()) == []
    options = ["--topology=v5e:16x16", "--config.model.bn_group=16"]
    assert said(capsys, "render", "scale", *where, *options)[0] == 0


# docs/sweeps.md

PAGE = (ROOT / "docs" / "sweeps.md").read_text()
BLOCKS = command_lines.blocks(PAGE)


@pytest.mark.parametrize("command", command_lines.commands(PAGE), ids=lambda it: it[:60])
def test_a_command_of_the_page_does_what_it_says(command, monkeypatch, capsys, tmp_path):
    words = shlex.split(command)
    if words[:3] != ["python", "-m", "experiments"]:
        command_lines.read(command, monkeypatch, tmp_path)
        return
    if words[3] in ("run", "status", "collect"):
        words.append(f"--root={tmp_path}")
    if words[3] in ("status", "collect"):
        sweeps.write_record(sweeps.load(words[4]), epath.Path(tmp_path) / words[4])
    words = [it.replace("--out=", f"--out={tmp_path}/") for it in words]
    monkeypatch.setattr(command_line, "Launcher", lambda *_, **__: types.SimpleNamespace(run=int))
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(sweeps, "check", lambda *_, **__: [])
    module = types.SimpleNamespace(collect=lambda folder, *, out, allow_mixed: None)
    monkeypatch.setitem(sys.modules, "experiments.collect", module)
    assert said(capsys, *words[3:])[:2] == (0, "")


def test_the_sweep_of_the_page_is_one(monkeypatch, tmp_path):
    (text,) = (block.text for block in BLOCKS if block.language == "python")
    (tmp_path / "drop_path.py").write_text(text)
    monkeypatch.setattr(sweeps, "FOLDER", tmp_path)
    sweep = sweeps.load("drop_path_smoke")
    assert [member.name for member in sweep.members] == ["rate0", "rate10", "rate20"]
    # Its configuration is that of others; main.py would look for the file in this repository.
    sweeps.check(dataclasses.replace(sweep, config=CONFIG), devices=1)


def test_the_page_lists_the_sweeps():
    for name in NAMES[::2]:
        full, smoke = (len(sweeps.load(it).members) for it in (name, f"{name}_smoke"))
        assert f"| `{name}` | {sweeps.question(name)} | {full} | {smoke} |\n" in PAGE

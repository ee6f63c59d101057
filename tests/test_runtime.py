"""The process: the cache of compiled programs, signals, the lock of a workdir, the watchdog."""

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from halonet import runtime


def test_the_code_is_known_by_its_commit(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "halonet"
    package.mkdir()
    (package / "runtime.py").write_text("1")
    monkeypatch.setattr(runtime, "__file__", str(package / "runtime.py"))
    assert runtime.code_version() == ""  # in no repository of its own
    git("init", "-q")
    assert runtime.code_version() == ""  # without a commit
    git("add", ".")
    git("commit", "-qm", "One")
    git("tag", "v1")
    assert runtime.code_version() == git("rev-parse", "HEAD")
    (package / "runtime.py").write_text("2")
    assert runtime.code_version() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert runtime.code_version() == ""


def test_versions_of_what_computes():
    found = runtime.versions()
    assert found["jax"] == jax.__version__
    assert found["python"] == platform.python_version()


@pytest.mark.parametrize(
    ("chosen", "cache_home", "used"),
    [
        (None, "", "/nowhere/home/.cache/halonet/xla"),
        (None, "/nowhere/cache", "/nowhere/cache/halonet/xla"),
        ("/nowhere/mine", "/nowhere/cache", "/nowhere/mine"),
    ],
)
def test_compilation_cache(monkeypatch, chosen, cache_home, used):
    monkeypatch.setenv("HOME", "/nowhere/home")
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", chosen)
    try:
        runtime.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == used
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def handlers():
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted(number, capsys):
    before = handlers()
    with runtime.StopSignal(alone=True) as stop:
        assert stop.name == ""
        assert handlers() != before
        os.kill(os.getpid(), number)
        assert stop.name == number.name
        # From here on the next one ends the process.
        assert set(handlers().values()) == {signal.SIG_DFL}
    assert handlers() == before
    line = f"{number.name}: finishing this step and saving; again to leave at once"
    assert capsys.readouterr().out.strip() == line


def test_handlers_come_back_without_a_signal():
    before = handlers()
    with pytest.raises(KeyError), runtime.StopSignal(alone=True):
        raise KeyError
    assert handlers() == before


def test_among_several_sigterm_is_left_to_jax_and_ctrl_c_made_one():
    before = handlers()
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    with runtime.StopSignal(alone=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert heard == ["SIGTERM"]
        # The next Ctrl-C ends the process; the next SIGTERM is JAX's again.
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert stop.name == ""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert handlers() == before


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_process(second):
    code = (
        "import os, signal, threading, time\n"
        "from halonet.runtime import StopSignal\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"  # as one that saves
        "with StopSignal(alone=True) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('noted', stop.name, flush=True)\n"
        f"    os.kill(os.getpid(), {int(second)})\n"
        "    print('still here', flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=40
    )
    assert done.returncode == -second
    assert done.stdout.endswith("noted SIGTERM\n")


def test_peaks_are_those_of_a_device():
    # A core of a v3, whose chip has two; bfloat16 and not the 1,979 with sparsity.
    assert runtime.PEAK_FLOPS["TPU v3"] == 61.5e12
    assert runtime.PEAK_FLOPS["NVIDIA H100 80GB HBM3"] == 989e12
    assert "cpu" not in runtime.PEAK_FLOPS


def test_seconds_of_the_process():
    code = (
        "import time; began = time.perf_counter()\n"
        "from halonet import runtime\n"
        "print(time.perf_counter() - began, runtime.process_seconds())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    outside = time.perf_counter() - began
    inside, found = map(float, done.stdout.split())
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert inside - tick <= found <= outside + tick


def test_interrupted_is_told_from_an_error():
    assert runtime.Interrupted.exit_code == runtime.PREEMPTED == 75


OWNER = """
import sys, time
from halonet import runtime
with runtime.WorkdirLock(sys.argv[1], heartbeat=0.1):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_and_a_dead_one_succeeded(tmp_path, owner, capsys):
    workdir = tmp_path / "run"
    message = rf"run is in use by process {owner.pid} on \S+ \(since \S+\); .*--force"
    with pytest.raises(runtime.LockedError, match=message) as info, runtime.WorkdirLock(workdir):
        pass
    assert "\n" not in str(info.value)
    assert info.value.exit_code == 2
    owner.kill()
    owner.wait()
    with runtime.WorkdirLock(workdir) as lock:
        lock.check()
        assert re.search(rf"taking over .*run from process {owner.pid} ", capsys.readouterr().out)
    assert not list(workdir.iterdir())


def test_force_takes_over_and_the_owner_notices(tmp_path, capsys):
    first = runtime.WorkdirLock(tmp_path, heartbeat=0.05)
    with first, runtime.WorkdirLock(tmp_path, force=True, stale=1.0):
        assert "taking over" in capsys.readouterr().out
        deadline = time.monotonic() + 10
        while not first._lost:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(runtime.LockedError, match=r"was taken over by process \d+ on"):
            first.check()
    # The second one's file was not the first one's to remove.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({}, False),
        ({"start_ticks": 1}, True),  # another process has that number now
        ({"pid": 2**22 + 1}, True),
        ({"heartbeat": None}, False),
        ({"machine": "another"}, True),  # and no heartbeat changes the file
        ({"machine": ""}, True),
        ({"token": None}, False),
    ],
)
def test_a_stale_lock_is_told_from_a_living_one(tmp_path, change, free):
    with runtime.WorkdirLock(tmp_path):
        owner = json.loads((tmp_path / "lock.json").read_text())
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "lock.json").write_text(json.dumps({**owner, **change}))
        refused = pytest.raises(runtime.LockedError, match="in use")
        other = runtime.WorkdirLock(tmp_path / "other", stale=0.3)
        with contextlib.nullcontext() if free else refused, other:
            pass


def test_a_heartbeat_from_another_machine_keeps_the_lock(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_machine", lambda: "another")
        owner = runtime.WorkdirLock(tmp_path, heartbeat=0.05)
    refused = pytest.raises(runtime.LockedError, match="in use")
    with owner, refused, runtime.WorkdirLock(tmp_path, stale=5.0):
        pass


def test_a_process_that_nobody_waited_for_is_gone():
    process = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while runtime._start_ticks(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert os.path.exists(f"/proc/{process.pid}")  # its zombie
    process.wait()


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    message = "--workdir=.*file/run cannot be written: Not a directory"
    lock = runtime.WorkdirLock(tmp_path / "file" / "run")
    with pytest.raises(runtime.LockedError, match=message), lock:
        pass


def test_a_workdir_that_stayed_empty_goes(tmp_path):
    with runtime.WorkdirLock(tmp_path / "run"):
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists()


def test_a_lock_that_says_nothing_is_free(tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with runtime.WorkdirLock(tmp_path):
        pass


def test_a_hang_says_where_and_ends_the_process(tmp_path):
    code = (
        "import time\nfrom halonet import runtime\n"
        "def next_batch(): time.sleep(60)\n"
        "with runtime.Watchdog(0.4) as watchdog:\n"
        "    watchdog.at('waiting for data')\n    next_batch()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == runtime.HUNG == 6
    assert "error: no progress for 0.4 s while waiting for data; where each" in done.stderr
    assert "in next_batch" in done.stderr
    assert "in _watch" in done.stderr


def test_a_hang_ends_the_process_whatever_became_of_stderr():
    code = (
        "import sys, time\nfrom halonet import runtime\nsys.stderr = None\n"
        "with runtime.Watchdog(0.2):\n    time.sleep(60)\n"
    )
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=write)
    os.close(write)
    assert process.wait(timeout=60) == runtime.HUNG


def test_progress_keeps_the_watchdog_quiet():
    left = []
    with runtime.Watchdog(1.0, leave=left.append) as watchdog:
        for _ in range(12):
            watchdog.at("working")
            time.sleep(0.1)
    with runtime.Watchdog(0.0, leave=left.append):
        time.sleep(0.1)
    assert left == []


def test_the_watchdog_knows_what_the_time_went_on():
    with runtime.Watchdog(0.0, before=5.0) as watchdog:
        time.sleep(0.02)
        watchdog.at("waiting for data")
        time.sleep(0.05)
        watchdog.at("working")
        watchdog.at("waiting for data")
        seconds = watchdog.seconds()
    assert 5.02 <= seconds["starting"] < 6
    assert 0.05 <= seconds["waiting for data"] < 1
    assert seconds["never"] == 0

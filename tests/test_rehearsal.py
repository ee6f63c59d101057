"""What a rehearsal starts, passes on, and ends with; a small program stands for main.py."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch.__main__ import main
from launch.rehearsal import Rehearsal, process_flags

ROOT = pathlib.Path(__file__).parent.parent
# It does what stands behind its process's number in the arguments.
PROGRAM = """
import os, re, signal, sys, time
index = int((re.findall("process_id=(.)", " ".join(sys.argv)) or "0")[0])
signals = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: signals.append(number))
print("started", *sys.argv[3:], flush=True)
print(os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"], flush=True)

with open(f"{sys.argv[1]}/{index}", "a+") as file:
    file.write(".")
    file.seek(0)
    start = len(file.read())

def code(*codes):
    # In each start the next one.
    sys.exit(codes[min(start, len(codes)) - 1])

def until_signal():
    while start == 1 and not signals:
        time.sleep(0.01)
    time.sleep(0.2)  # for a second one
    print("heard", [signal.Signals(it).name for it in signals], flush=True)
    code(75, 0)

def forever():
    time.sleep(600)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

exec(sys.argv[2].split(";")[index])
"""


def rehearsed(tmp_path, *what, devices=3, restarts=0):
    program = ("-S", "-c", PROGRAM, str(tmp_path))
    return Rehearsal(
        [";".join(what), "--config=a b"],
        processes=len(what),
        devices=devices,
        restarts=restarts,
        program=program,
    )


def test_every_process_is_told_who_it_is(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert rehearsed(tmp_path, "code(0)", "code(0)").run() == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    environment = "cpu --xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=3"
    port = lines[1].partition("127.0.0.1:")[2].split()[0]
    assert lines == [
        line
        for i in range(2)
        for line in (
            f"[{i}] {environment}",
            f"[{i}] started --config=a b {' '.join(process_flags(i, 2, port))}",
        )
    ]


def test_one_process_has_nobody_to_find(tmp_path, capfd):
    assert rehearsed(tmp_path, "code(0)").run() == 0
    assert "[0] started --config=a b\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("what", "code"),
    [
        (("code(0)", "code(0)"), 0),
        (("code(75)", "code(75)"), 75),
        (("code(75)", "code(0)"), 75),
        # The rest is killed, and what it ends with is not the cause.
        (("forever()", "code(3)"), 3),
        (("die()", "forever()"), 137),
        # One that stays behind is no success.
        (("code(0)", "forever()"), 137),
    ],
)
def test_it_ends_with_the_cause(tmp_path, monkeypatch, what, code):
    for name in ("_GRACE_FAILED", "_GRACE_DONE"):
        monkeypatch.setattr(f"launch.rehearsal.{name}", 0.5)
    began = time.monotonic()
    assert rehearsed(tmp_path, *what).run() == code
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "starts"),
    [
        ("75, 75, 0", 2, 0, 3),
        ("75, 75, 0", 1, 75, 2),
        ("75, 0", 0, 75, 1),
        ("75, 2", 5, 2, 2),
        ("1, 0", 5, 1, 1),
        ("0", 5, 0, 1),
    ],
)
def test_it_starts_again_after_75_alone(tmp_path, capfd, codes, restarts, code, starts):
    assert rehearsed(tmp_path, f"code({codes})", restarts=restarts).run() == code
    assert capfd.readouterr().out.count("[0] started") == starts


COMMAND = """
import sys
sys.path.insert(0, {root!r})
from launch.rehearsal import Rehearsal
program = ("-S", "-c", {program!r}, {folder!r})
sys.exit(Rehearsal([{what!r}], processes=2, devices=1, restarts=1, program=program).run())
"""


def rehearsal_process(tmp_path, what):
    code = COMMAND.format(root=str(ROOT), program=PROGRAM, folder=str(tmp_path), what=what)
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True, process_group=0
    )
    ready = set()
    for line in process.stdout:
        if "cpu" in line:
            ready.add(line)
        if len(ready) == 2:
            break
    return process


@pytest.mark.parametrize(
    ("number", "code", "starts"), [(signal.SIGTERM, 0, 2), (signal.SIGINT, 75, 0)]
)
def test_a_signal_reaches_each_process_once(tmp_path, number, code, starts):
    """To the whole group, as a terminal and Slurm do it. Ctrl-C is not followed by a restart."""
    process = rehearsal_process(tmp_path, "until_signal();until_signal()")
    # Held, so that what hears the group would hear it twice and not once at the same time.
    process.send_signal(signal.SIGSTOP)
    os.killpg(process.pid, number)
    time.sleep(0.1)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code
    for index in range(2):
        assert output.count(f"[{index}] heard ['{number.name}']") == 1
    assert output.count("started") == starts


def test_a_second_signal_ends_it_at_once(tmp_path):
    process = rehearsal_process(tmp_path, "forever();forever()")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 137


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=0", "--", "--config=c"], "--processes=0 must be at least 1"),
        (["--devices=0", "--", "--config=c"], "--devices=0 must be at least 1"),
        (["--restarts=-1", "--", "--config=c"], "--restarts=-1 must be at least 0"),
        (["--processes=2"], "after -- come the flags of main.py: -- --config=FILE --workdir=DIR"),
        (["--config=c"], "unrecognized arguments: --config=c"),
    ],
)
def test_a_command_line_that_cannot_be(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(["rehearse", *arguments])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"

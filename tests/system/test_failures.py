"""What ends a run, in real processes: each is one line with what to do, and nothing is lost."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from halonet import checkpoint
from launch.rehearsal import free_port, process_flags
from tests.system.launch import ROOT, launch

SETTINGS = {
    "train.epochs": 0,
    "train.steps": 20,
    "data.batch_size": 32,
    "model.bn_group": 4,
    "checkpoint.every_steps": 5,
    "eval.every_steps": 20,
}


def arguments(workdir, **settings):
    flags = [f"--config.{key}={value}" for key, value in {**SETTINGS, **settings}.items()]
    return ["main.py", "--config=configs/mnist.py", f"--workdir={workdir}", *flags]


def finish(process, code):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    return output


def pair(*commands):
    """Two processes of one run."""
    port = free_port()
    return [
        launch(*command, *process_flags(index, 2, port)) for index, command in enumerate(commands)
    ]


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_a_run_that_diverges_ends_with_the_step_and_keeps_what_it_had(tmp_path):
    # Finite until a gradient of float32 is not.
    diverging = {"optim.name": "sgd", "optim.learning_rate": 1e18, "optim.clip_norm": 0.0}
    diverging |= {"optim.warmup": 0.0, "checkpoint.every_steps": 1}
    output = finish(launch(*arguments(tmp_path, **diverging)), 5)
    found = re.search(r"^error: the (loss|grad_norm|state) of step (\d+) is ", output, re.MULTILINE)
    assert found, output
    saved = checkpoint.saved_steps(tmp_path)
    assert all(step < int(found[2]) for step in saved)


# From step 10 on one file may take less than a checkpoint needs, and more than a row.
FULL_DISK = """
import resource, runpy, signal, sys
from halonet.checkpoint import Checkpointer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Checkpointer.save
def fuller(self, step, *args):
    if step == 10:
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    save(self, step, *args)
Checkpointer.save = fuller
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_a_full_disk_leaves_the_earlier_steps(tmp_path):
    workdir = tmp_path / "run"
    output = finish(launch("-c", FULL_DISK, *arguments(workdir)[1:]), 7)
    assert re.search(
        rf"^error: step 10 could not be saved into {workdir}/checkpoints: .*; [\d.]+ GB are free "
        r"there \(a quota may leave less\); whole checkpoints there, which the same command goes "
        r"on from: 5$",
        output,
        re.MULTILINE,
    ), output
    assert checkpoint.saved_steps(workdir) == [5]
    output = finish(launch(*arguments(workdir)), 0)
    assert "going on from the checkpoint of step 5" in output


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_processes_of_different_runs_are_told_apart(tmp_path):
    commands = arguments(tmp_path / "a"), arguments(tmp_path / "b", seed=1)
    for process in pair(*commands):
        assert (
            f"error: the processes are of different runs: --workdir is '{tmp_path}/a' in process 0 "
            f"and '{tmp_path}/b' in process 1; config.seed is 0 in process 0 and 1 in process 1\n"
        ) in finish(process, 2)
    assert not list(tmp_path.iterdir())


# Alive, but it never comes to where the others wait.
STUCK = """
import runpy, sys, time
from halonet import processes
processes.check_alike = lambda *_: time.sleep(600)
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_a_process_that_does_not_come_is_named(tmp_path):
    command = arguments(tmp_path / "run", **{"train.hang_seconds": 20})
    here, missing = pair(command, ["-c", STUCK, *command[1:]])
    output = finish(here, 6)
    missing.communicate(timeout=60)  # it ends with the first
    assert missing.returncode != 0
    assert (
        "\nerror: process 1 of 2 did not come within 16 s to where the others wait: comparing "
        "settings; look at what it printed last\n"
    ) in output


@pytest.mark.middle
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")
def test_under_open_mpi(tmp_path):
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.path.expanduser("~"),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = ["mpirun", "-n", "2", "--oversubscribe", sys.executable, *arguments(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for index in range(2):
        line = f"process {index} of 2 (detected from the environment), 1 of 2 cpu devices here\n"
        assert line in done.stdout
    assert checkpoint.saved_steps(tmp_path / "run")[-1] == 20

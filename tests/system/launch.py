"""Commands in processes of their own, as a user starts them."""

import os
import pathlib
import subprocess
import sys
import time

from launch.rehearsal import free_port, process_flags
from tests.small_run import SETTINGS

ROOT = pathlib.Path(__file__).parent.parent.parent


def launch(*arguments, devices=1, environment=None, **options):
    """Starts Python with `arguments` in the repository, on so many devices of a CPU.

    `environment` is added to the least that is needed; `options` are those of subprocess.Popen.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": os.path.expanduser("~"),
            "JAX_PLATFORMS": "cpu",
            "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            **(environment or {}),
        },
        **options,
    )


class Start:
    """One start of a small run, as a launcher's: its processes, in a group of their own.

    What they print is in files beside the workdir. Leaving the context kills what still runs.

    Args:
      workdir: the run's folder.
      count, devices: processes, and devices of each.
      program: what is started: main.py, or what behaves as it does.
      config: the configuration file.
      settings: configuration by dotted key, beside those of tests/small_run.py.
    """

    def __init__(
        self,
        workdir,
        *,
        count=2,
        devices=2,
        program=("main.py",),
        config="configs/mnist.py",
        **settings,
    ):
        self.workdir, self.processes, self._logs = pathlib.Path(workdir), [], []
        flags = [
            f"--config={config}",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in {**SETTINGS, **settings}.items()),
        ]
        port = free_port()
        for index in range(count):
            log = self.workdir.with_name(f"{self.workdir.name}.{index}.log")
            with log.open("w") as file:
                process = launch(
                    *program,
                    *flags,
                    *process_flags(index, count, port),
                    devices=devices,
                    stdout=file,
                    process_group=self.processes[0].pid if index else 0,
                )
            self.processes.append(process)
            self._logs.append(log)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for process in self.processes:
            process.kill()
        self.wait()

    def output(self, index=0):
        """What a process has printed until now."""
        return self._logs[index].read_text()

    def until(self, happened, what, seconds=400):
        """Waits for happened(), and returns what it returned."""
        deadline = time.monotonic() + seconds
        while not (found := happened()):
            assert self.running() == len(self.processes), f"ended before {what}: {self.said()}"
            assert time.monotonic() < deadline, f"no {what} after {seconds} s: {self.said()}"
            time.sleep(0.03)  # looking takes a core from what is looked at
        return found

    def until_said(self, text, index=0, seconds=400):
        """Waits until a process has printed `text`."""
        return self.until(lambda: text in self.output(index), repr(text), seconds)

    def signal_all(self, number):
        """Sends a signal to the group: the trainers and whatever they started."""
        os.killpg(self.processes[0].pid, number)

    def running(self):
        """How many of the processes have not ended."""
        return sum(process.poll() is None for process in self.processes)

    def wait(self, seconds=400):
        """Their exit codes, once all have ended."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def said(self):
        """What all of them printed, for the report of a test."""
        outputs = (f"process {i}:\n{self.output(i)}" for i in range(len(self.processes)))
        return "\n".join(outputs)

"""A run of several processes on this machine, as a pod would run it, but on CPU devices."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from launch.targets import PREEMPTED

_MAIN = pathlib.Path(__file__).parent.parent / "main.py"
# After one process has ended, the others have so long: the first of them waits for their own codes
# where it fails, and all for what process 0 still writes where they are done.
_GRACE_FAILED, _GRACE_DONE = 10.0, 60.0


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process_flags(index: int, count: int, port: int) -> list[str]:
    """By which process `index` of `count` finds the others; none where it is alone."""
    if count == 1:
        return []
    return [
        f"--distributed.coordinator=127.0.0.1:{port}",
        f"--distributed.process_id={index}",
        f"--distributed.process_count={count}",
    ]


class Rehearsal:
    """Several processes of main.py, whose lines are printed with the number of each before them.

    Args:
      flags: of main.py.
      processes, devices: how many, and CPU devices of each.
      restarts: so often it is started again when it ends with exit code 75, unless by Ctrl-C.
      program: what is started: main.py, or what behaves as it does.
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        processes: int,
        devices: int,
        restarts: int = 0,
        program: Sequence[str] = (str(_MAIN),),
    ):
        self._command = [sys.executable, *program, *flags]
        self._processes, self._restarts = processes, restarts
        count = f"--xla_force_host_platform_device_count={devices}"
        self._environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}".strip(),
            "PYTHONUNBUFFERED": "1",
        }
        self._running: list[subprocess.Popen] = []
        self._signal = 0

    def run(self) -> int:
        """Runs it to its end; the exit code is that of the process that failed first."""
        handlers = {it: signal.signal(it, self._pass_on) for it in (signal.SIGTERM, signal.SIGINT)}
        try:
            while True:
                self._signal = 0
                code = self._run_once()
                if code != PREEMPTED or not self._restarts or self._signal == signal.SIGINT:
                    return code
                self._restarts -= 1
                print(
                    f"exit code {code}: starting again, {self._restarts} more at most", flush=True
                )
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run_once(self) -> int:
        port = free_port()
        readers = []
        try:
            for index in range(self._processes):
                process = subprocess.Popen(
                    [*self._command, *process_flags(index, self._processes, port)],
                    env=self._environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    # The terminal's Ctrl-C comes to this process alone, which passes it on.
                    start_new_session=True,
                )
                self._running.append(process)
                readers.append(threading.Thread(target=self._show, args=(index, process.stdout)))
                readers[-1].start()
            return self._wait()
        finally:
            self._kill()
            for process in self._running:
                process.wait()
            for reader in readers:
                reader.join()
            self._running.clear()

    def _wait(self) -> int:
        left, codes, deadline = list(self._running), [], float("inf")
        while left:
            time.sleep(0.05)
            if time.monotonic() > deadline:
                self._kill()
            for process in [it for it in left if it.poll() is not None]:
                left.remove(process)
                code = process.returncode
                codes.append(128 - code if code < 0 else code)
                grace = _GRACE_DONE if codes[-1] in (0, PREEMPTED) else _GRACE_FAILED
                deadline = min(deadline, time.monotonic() + grace)
        # What follows a failure is of its making.
        return next((code for code in codes if code not in (0, PREEMPTED)), max(codes))

    def _kill(self) -> None:
        for process in self._running:
            process.kill()

    def _pass_on(self, number: int, _frame) -> None:
        """The first signal to all, as when a slice is preempted; the second ends them at once."""
        if self._signal:
            self._kill()
            return
        self._signal = number
        for process in self._running:
            process.send_signal(number)

    @staticmethod
    def _show(index: int, lines) -> None:
        with lines:
            for line in lines:
                sys.stdout.write(f"[{index}] {line}")
                sys.stdout.flush()

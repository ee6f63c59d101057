"""Starts the members of a sweep on this machine, so many at a time, until none is left.

Nothing here knows JAX: a member is a process of main.py, and what is known of it is in files. Its
log is locked (flock) as long as it, or what it started, lives, whatever has become of its launcher;
so a second launcher of the same sweep takes the other members, and waits for the last.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO

from etils import epath

from experiments import sweeps
from halonet.files import write_whole
from halonet.progress import LiveLine, duration

_ROOT = sweeps.FOLDER.parent
# So often a member that was told to stop, by others than this launcher, is started again.
_RESTARTS = 5
_USED = 2  # main.py's exit code for a workdir that another run holds, among others
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclasses.dataclass
class _Job:
    """A member that runs."""

    member: sweeps.Member
    slot: int
    log: IO
    process: subprocess.Popen
    remembered: dict
    began: float
    fraction: float  # of its steps, at the start
    signalled: int = 0


class Launcher:
    """Runs the members of a sweep that are not done.

    The first SIGTERM or Ctrl-C is passed on to the members, which save; the second kills them.
    Where this process itself is killed, Linux sends them a SIGTERM.

    Args:
      sweep, folder: the sweep, and its folder on this machine.
      jobs: members at a time; each gets its part of the cores.
      program: what is started: main.py, or what behaves as it does.
    """

    def __init__(
        self,
        sweep: sweeps.Sweep,
        folder: epath.Path,
        *,
        jobs: int = 1,
        program: Sequence[str] = (str(_ROOT / "main.py"),),
    ):
        self._folder = folder
        self._command = [sys.executable, *program]
        self._runs = {
            member.id: run
            for member, run in zip(sweep.members, sweep.runs(str(folder.parent)), strict=True)
        }
        self._members = sweep.members
        self._todo = collections.deque(sweep.members)
        self._jobs, self._free = jobs, list(range(jobs))
        self._running: list[_Job] = []
        self._done, self._failed = 0, 0
        self._restarts = collections.Counter()
        self._pace: list[float] = []  # seconds of whole members, by what was seen of each
        self._waiting: set[str] = set()
        self._signals, self._told = 0, False
        self._line = LiveLine()

    def run(self) -> int:
        """Returns 0 where all members are done, 1 where some failed, 75 where some are left."""
        handlers = {it: signal.signal(it, self._note) for it in (signal.SIGTERM, signal.SIGINT)}
        try:
            looked = 0.0
            while (self._todo and not self._signals) or self._running:
                self._pass_on()
                self._reap()
                if not self._signals:
                    self._start()
                if time.monotonic() > looked + 2:
                    self._show()
                    looked = time.monotonic()
                time.sleep(0.1)
        finally:
            for job in self._running:  # where this process itself has failed
                job.process.terminate()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        left = len(self._members) - self._done - self._failed
        said = f"{self._done} done, {self._failed} failed, {left} left"
        self._line.say(f"{len(self._members)} members: {said}, in {self._folder}")
        if left and (self._signals or not self._failed):
            return sweeps.STOPPED[0]
        return 1 if self._failed else 0

    def _note(self, number: int, _frame) -> None:
        self._signals += 1

    def _pass_on(self) -> None:
        if self._signals and not self._told and self._running:
            self._told = True
            self._line.say("stopping: the members save; again to kill them")
        for job in self._running:
            if self._signals > job.signalled:
                (job.process.kill if job.signalled else job.process.terminate)()
                job.signalled += 1

    def _start(self) -> None:
        for member in list(self._todo):
            if not self._free:
                return
            if self._is_done(member):
                self._todo.remove(member)
            elif log := self._take(member):
                self._todo.remove(member)
                self._launch(member, log)
        for member in self._todo:
            if not self._running and member.id not in self._waiting:
                self._waiting.add(member.id)
                self._line.say(f"{member.name} is run by another launcher: waiting for it")

    def _is_done(self, member: sweeps.Member) -> bool:
        found = sweeps.state(self._folder, member.id)
        if found.name != "done":
            return False
        self._done += 1
        self._line.say(f"{member.name} has ended already: top-1 {100 * found.top1:.2f} %")
        return True

    def _take(self, member: sweeps.Member) -> IO | None:
        """The member's log, locked; None where somebody else has it."""
        log = (self._folder / f"{member.id}.log").open("ab")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            return None
        return log

    def _launch(self, member: sweeps.Member, log: IO) -> None:
        run, slot = self._runs[member.id], self._free.pop(0)
        path = self._folder / f"{member.id}.json"
        before = sweeps.read_json(path)
        remembered = {
            "attempts": before.get("attempts", 0) + 1,
            "seconds": before.get("seconds", 0.0),
            "started": time.time(),
        }
        write_whole(path, json.dumps(remembered) + "\n")
        command = [*self._command, *run.flags]
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        fraction = sweeps.state(self._folder, member.id).fraction
        mine, cores = os.getpid(), self._share(slot)
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # The terminal's Ctrl-C comes to this process alone, which passes it on.
            start_new_session=True,
            preexec_fn=lambda: _bind(mine, cores),
        )
        began = time.monotonic()
        self._running.append(_Job(member, slot, log, process, remembered, began, fraction))

    def _share(self, slot: int) -> set[int]:
        """The cores of one of the members that run at a time; empty: all of them."""
        cores = sorted(os.sched_getaffinity(0)) if _libc is not None else []
        if len(cores) < self._jobs:
            return set()
        first, end = (len(cores) * it // self._jobs for it in (slot, slot + 1))
        return set(cores[first:end])

    def _reap(self) -> None:
        for job in [it for it in self._running if it.process.poll() is not None]:
            self._running.remove(job)
            self._free = sorted([*self._free, job.slot])
            code = job.process.returncode
            code = 128 - code if code < 0 else code
            seconds = time.monotonic() - job.began
            job.remembered |= {
                "exit_code": code,
                "ended": time.time(),
                "seconds": job.remembered["seconds"] + seconds,
            }
            text = json.dumps(job.remembered) + "\n"
            write_whole(self._folder / f"{job.member.id}.json", text)
            job.log.close()
            self._say_end(job, code, seconds)

    def _say_end(self, job: _Job, code: int, seconds: float) -> None:
        member, name = job.member, job.member.name
        found = sweeps.state(self._folder, member.id)
        if code == 0 and found.name == "done":
            self._done += 1
            self._pace.append(seconds / max(1e-3, 1 - job.fraction))
            self._line.say(f"{name} is done: top-1 {100 * found.top1:.2f} %, {duration(seconds)}")
        elif code in sweeps.STOPPED:
            where = f"{name} was stopped at step {found.step}"
            if self._signals:
                self._line.say(where)
            elif self._restarts[member.id] < _RESTARTS:
                self._restarts[member.id] += 1
                again = f"{self._restarts[member.id]} of {_RESTARTS}"
                self._line.say(f"{where}: starting it again ({again})")
                self._todo.appendleft(member)
            else:
                self._line.say(f"{where}, more than {_RESTARTS} times: passed over")
        elif job.signalled > 1:
            self._line.say(f"{name} was killed at step {found.step}")
        elif code == _USED and (self._folder / member.id / "lock.json").exists():
            self._line.say(f"{name} is passed over: {self._last_line(member)}")
        else:
            self._failed += 1
            log = self._folder / f"{member.id}.log"
            self._line.say(
                f"{name} failed with exit code {code}: {self._last_line(member)}; all of it: {log}"
            )

    def _last_line(self, member: sweeps.Member) -> str:
        text = (self._folder / f"{member.id}.log").read_bytes()[-4000:].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return next((it for it in reversed(lines) if it.startswith("error:")), lines[-1])[:300]

    def _show(self) -> None:
        now = time.monotonic()
        states = [(it, sweeps.state(self._folder, it.member.id)) for it in self._running]
        pace = list(self._pace)
        for job, found in states:
            if found.fraction - job.fraction > 0.05:
                pace.append((now - job.began) / (found.fraction - job.fraction))
        left = math.nan
        if pace:
            rest = len(self._todo) + sum(1 - found.fraction for _, found in states)
            width = max(1, min(self._jobs, len(self._todo) + len(states)))
            left = rest * sum(pace) / len(pace) / width
        running = ", ".join(f"{job.member.name} {found.fraction:.0%}" for job, found in states)
        self._line.show(
            f"{self._done} done, {len(states)} running, {self._failed} failed, {len(self._todo)} "
            f"queued; {duration(left)} left: {running}"
        )


def _bind(launcher: int, cores: set[int]) -> None:
    """In a member, before main.py: on its cores, and told to stop where its launcher is killed."""
    if cores:
        os.sched_setaffinity(0, cores)
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it was killed before this was asked for
            os._exit(sweeps.STOPPED[0])

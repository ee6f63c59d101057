"""The process: which code and machine it is of, where compiled programs are kept, how it is told to
stop, and how it keeps others out of its workdir and itself from hanging.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import faulthandler
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

import jax
from etils import epath

from halonet.files import write_whole

# Peak of one device of JAX in dense bfloat16 products, operations per second, by its device_kind.
# TPUs: the pages of each version at cloud.google.com/tpu/docs, per chip; v2, v3 and 7x show the two
# cores of a chip as two devices. GPUs: NVIDIA's data sheets of the A100, H100 and H200, without
# sparsity.
PEAK_FLOPS = {
    "TPU v2": 46e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

PREEMPTED = 75  # exit code: saved, start me again (EX_TEMPFAIL)
HUNG = 6  # exit code: no step for too long
_IMPORTED = time.perf_counter()


class Interrupted(Exception):
    """The run was asked to stop, and its state is saved."""

    exit_code = PREEMPTED


class LockedError(ValueError):
    """A workdir that another run is using. The message is one line."""

    exit_code = 2


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, unless JAX_COMPILATION_CACHE_DIR chose a place already."""
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "halonet", "xla"))


def code_version() -> str:
    """The commit of this code, with "-dirty" where files were changed since; "" if not known."""
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed, perhaps into the tree of another repository
        return ""
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "numpy", "pillow", "simplejpeg")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def process_seconds() -> float:
    """Wall-clock seconds since this process began; beside Linux, since this module was imported."""
    ticks = _start_ticks("self")
    if not ticks:
        return time.perf_counter() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _start_ticks(pid: int | str) -> int:
    """When a process of this machine began, in clock ticks since boot; 0 where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # Behind the name of the program, which may hold anything: proc(5), state, starttime.
            state, *rest = file.read().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(rest[18]) if state not in "ZX" else 0  # not those dead and not yet waited for


def _machine() -> str:
    """What process numbers are unique in: this boot of this machine, and this namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class WorkdirLock:
    """A context in which no second run may use a workdir: two would delete each other's steps.

    The lock is a small file with its owner and a heartbeat, so that it works on every file system
    and in buckets. A stale one is taken over with a notice: that of a process of this machine which
    is gone, or of another machine whose heartbeat does not change for `stale` seconds, by our clock
    alone. So a run that was killed and is started again elsewhere waits for so long.

    Args:
      workdir: made where it does not exist; may be gs://.
      force: takes the lock of a living owner too, who stops at its next heartbeat, and waits for
        that.
      enabled: False: nothing is done (one process of several holds the lock).
      heartbeat, stale: seconds.
    """

    NAME = "lock.json"

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        force: bool = False,
        enabled: bool = True,
        heartbeat: float = 10.0,
        stale: float = 45.0,
    ):
        self._path = epath.Path(workdir) / self.NAME
        self._force, self._enabled = force, enabled
        self._heartbeat, self._stale = heartbeat, stale
        self._mine = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "start_ticks": _start_ticks("self"),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
        }
        self._lost, self._new = "", False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> WorkdirLock:
        """Raises LockedError where a living process holds the lock, naming it, or where the workdir
        cannot be written."""
        if not self._enabled:
            return self
        owner = self._owner()
        if owner:
            who = self._describe(owner)
            if not self._force and self._alive(owner):
                raise LockedError(
                    f"{self._path.parent} is in use by {who}; stop that run, take another "
                    "--workdir, or --force to take it over"
                )
            print(f"taking over {self._path.parent} from {who}")
        try:
            self._new = not self._path.parent.exists()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            self._write()
            # Of two that start at once both may have found it free; the later writer has it.
            time.sleep(max(0.2, 3 * (time.monotonic() - began)))
        except OSError as error:
            raise LockedError(
                f"--workdir={self._path.parent} cannot be written: {error.strerror}"
            ) from error
        self._look()
        self.check()
        self._thread.start()
        if owner and self._force and not self._gone(owner):
            # Its save in flight and its next step are its own: nothing is read before it stopped.
            print(f"waiting {self._stale:.0f} s at most for that run to stop")
            deadline = time.monotonic() + self._stale
            while not self._gone(owner) and time.monotonic() < deadline:
                time.sleep(0.2)
        return self

    def __exit__(self, *exc_info) -> None:
        if not self._thread.ident:
            return
        self._stop.set()
        self._thread.join()
        if not self._lost:
            self._path.unlink(missing_ok=True)
            if self._new:
                with contextlib.suppress(OSError, ValueError):  # it is a run's now
                    self._path.parent.rmdir()

    def check(self) -> None:
        """Raises LockedError where another run has taken the lock since."""
        if self._lost:
            raise LockedError(f"{self._path.parent} was taken over by {self._lost}; stopping")

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat) and not self._lost:
            # A file system that is away for a while is no reason to stop a run; what a bucket
            # raises then is not always an OSError.
            with contextlib.suppress(Exception):
                self._look()
                if not self._lost:
                    self._write()

    def _look(self) -> None:
        owner = self._owner()
        if owner.get("token") != self._mine["token"]:
            self._lost = self._describe(owner) if owner else "a run that has ended since"

    def _owner(self) -> dict:
        """What is in the file; {} where there is none, or none that says anything."""
        try:
            owner = json.loads(self._path.read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        return owner if isinstance(owner, dict) and "token" in owner else {}

    def _write(self) -> None:
        write_whole(self._path, json.dumps({**self._mine, "heartbeat": time.time()}) + "\n")

    def _here(self, owner: dict) -> bool:
        """Whether the owner's process number means something here."""
        return bool(owner.get("machine")) and owner["machine"] == self._mine["machine"]

    def _gone(self, owner: dict) -> bool:
        # The number of a process that is gone is given to another one some day.
        return self._here(owner) and _start_ticks(owner.get("pid")) != owner.get("start_ticks")

    def _alive(self, owner: dict) -> bool:
        if self._here(owner):
            return not self._gone(owner)
        print(f"{self._path.parent} was used by {self._describe(owner)}; looking for a heartbeat")
        deadline = time.monotonic() + self._stale
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._stale / 20))
            if self._owner() != owner:
                return True
        return False

    def _describe(self, owner: dict) -> str:
        return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


class Watchdog:
    """A context that knows what the process does, and ends it when it makes no progress.

    A run that hangs holds its machines until somebody looks; one that ends is started again.

    Args:
      seconds: without a call of `at` that are too long; 0: never.
      before: seconds that went on starting before the context.
      leave: ends the process. By default at once: what hangs would hang its clean-up too.
    """

    def __init__(
        self, seconds: float, *, before: float = 0.0, leave: Callable[[int], None] = os._exit
    ):
        self._seconds, self._leave = seconds, leave
        self._now = ("starting", time.monotonic())
        self._spent = collections.defaultdict(float, starting=before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self.at("starting")
            self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def at(self, what: str) -> None:
        """Says that the process has come to `what`: "waiting for data", say."""
        (before, since), now = self._now, time.monotonic()
        self._spent[before] += now - since
        self._now = (what, now)

    def seconds(self) -> dict[str, float]:
        """How many went on each thing so far; 0 on any other."""
        self.at(self._now[0])
        return self._spent

    def over(self, what: str, items: Iterable) -> Iterator:
        """The items, each of which is progress, and so is having waited for it."""
        for item in items:
            self.at(what)
            yield item
            self.at(f"waiting for data, {what}")

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 4)):
            what, since = self._now
            if time.monotonic() - since > self._seconds:
                line = f"error: no progress for {self._seconds:g} s while {what}; where each "
                # The number itself: whatever has become of sys.stderr, the process has to end.
                with contextlib.suppress(OSError):
                    os.write(2, f"{line}thread stands:\n".encode())
                    faulthandler.dump_traceback(file=2, all_threads=True)
                self._leave(HUNG)
                return


class StopSignal:
    """A context in which the first SIGTERM or Ctrl-C is noted, and a second ends the process.

    Several processes must agree on the step, which a handler of one cannot bring about: there
    SIGTERM is left to JAX, who tells all, and Ctrl-C is made one.

    Args:
      alone: whether this is the only process.
    """

    def __init__(self, alone: bool):
        self.name = ""
        self._handlers = {signal.SIGINT: self._pass_on}
        if alone:
            self._handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._note)
        self._previous = {}

    def __enter__(self) -> StopSignal:
        self._previous = {it: signal.signal(it, handler) for it, handler in self._handlers.items()}
        return self

    def _next_ends(self) -> None:
        for number in self._handlers:
            # Not Python's own for Ctrl-C: its exception would wait for the threads that save.
            signal.signal(number, signal.SIG_DFL)

    def _pass_on(self, number: int, _frame) -> None:
        # A second SIGTERM ends nothing: the machines of a pod hear of one preemption seconds apart.
        self._next_ends()
        os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.name = signal.Signals(number).name
        print(f"\n{self.name}: finishing this step and saving; again to leave at once", flush=True)
        self._next_ends()

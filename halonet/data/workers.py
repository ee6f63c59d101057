"""Batches made by other processes: where many cores work, Python's lock holds threads back.

Worker w of N makes the batches w, w + N, w + 2 N, ... of a stream, and the consumer takes them in
turn: the order, and every byte, are those of one process. A batch comes over in an anonymous file
in memory (memfd), whose pages become the consumer's arrays: nothing is copied there, nothing has a
name that could be left behind, and the small /dev/shm of a container is not used.

The trainer starts one process, the nursery. It imports what batches need (never JAX, which would
take memory and reach for the devices), takes the source over once, and forks into the workers, so
that the names of 14 million files are in memory once and not a hundred times. Grain's own
mp_prefetch does none of this: each of its workers imports the main module, and JAX with it, and
holds a copy of the source; a worker that ends with code 0 is waited for without end.

What the workers are to do is sent to them pickled, once. What comes back is text and bytes: the
trainer unpickles nothing.

Signals to the whole group, as Ctrl-C and Slurm send them, do not reach the workers, for the trainer
still wants batches until it has saved. They end when the trainer's end of their socket closes,
however it went away.
"""

import collections.abc
import contextlib
import json
import logging
import math
import mmap
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import traceback
import typing
import weakref

import numpy as np

from halonet.data.errors import DataError

Batch = dict[str, np.ndarray]
Make = collections.abc.Callable[[int, int], collections.abc.Iterator[Batch]]
"""(w, N) -> the batches w, w + N, w + 2 N, ... of a stream. It is pickled."""

AVAILABLE = hasattr(os, "memfd_create")
_ALIGNMENT = 64  # bytes: what JAX takes over on a CPU without a copy
_MESSAGE = 1 << 16  # bytes, at most, of what describes a batch
_TEXT = 4000  # characters, at most, of an error: in JSON one may take 12 bytes
_POLL_SECONDS = 0.1
_STOP_SECONDS = 10.0
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class WorkerBatches:
    """An iterator of the batches of `make`, made by `count` processes that start at once.

    Args:
      make: sent to the workers, so it and all that it holds must be picklable.
      count: N, at least 1.
      ahead: batches that each worker makes before they are asked for; so many are held in memory.

    A worker's DataError is raised here, in its batch's turn; so is any other exception, as a
    DataError of one line. So is, at the next batch, that a worker died.

    Raises ValueError if `make` cannot be pickled, and NotImplementedError beside Linux.
    """

    def __init__(self, make: Make, *, count: int, ahead: int = 2):
        if not AVAILABLE:
            raise NotImplementedError(f"workers={count} needs Linux; 0 makes batches in threads")
        self._count, self._turn = count, 0
        control, theirs = multiprocessing.connection.Pipe()
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
        self._control, self._links = control, [mine for mine, _ in pairs]
        numbers = [theirs.fileno(), *(other.fileno() for _, other in pairs)]
        # Blocked signals stay blocked in what is started.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            nursery = subprocess.Popen(
                # -P: the same modules as here, whatever lies in the current folder.
                [
                    *(sys.executable, "-P", "-c"),
                    f"from halonet.data import workers; workers.run({numbers})",
                ],
                pass_fds=numbers,
                # One thread: more would not survive the fork, and cores are what workers are for.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    "OPENBLAS_NUM_THREADS": "1",
                    "OMP_NUM_THREADS": "1",
                },
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            for _, other in pairs:
                other.close()
        # Also when this is dropped, and when the program ends.
        self._stop = weakref.finalize(self, _stop, nursery, control, self._links)
        try:
            control.send(make)
            for link in self._links:
                link.send(b"+" * ahead)
        except OSError:
            self._fail()
        except Exception as error:  # of pickling there are several
            self.close()
            raise ValueError(f"workers={count} need what they make pickled: {error}") from error

    def __iter__(self) -> "WorkerBatches":
        return self

    def __next__(self) -> Batch:
        if not self._stop.alive:
            raise StopIteration
        link = self._links[self._turn % self._count]
        # A death is told as soon as it is known, not when its turn comes.
        if self._control in multiprocessing.connection.wait([link, self._control]):
            self._fail()
        message, files = b"", []
        with contextlib.suppress(ConnectionResetError):
            message, files, _, _ = socket.recv_fds(link, _MESSAGE, 1)
        if not message:  # the other end is closed: the nursery will say why
            self._fail()
        self._turn += 1
        told = json.loads(message)
        if "arrays" not in told:
            self.close()
            if "error" in told:
                raise DataError(told["error"])
            raise StopIteration
        with contextlib.suppress(OSError):  # it died since; that will be told
            link.send(b"+")
        return _opened(told, files[0])

    def close(self) -> None:
        """Ends the workers; what they have made is dropped."""
        self._stop()

    def _fail(self) -> typing.NoReturn:
        """Raises what the nursery says of a death, or of itself."""
        try:
            if not self._control.poll(_STOP_SECONDS):
                raise EOFError
            what = self._control.recv_bytes().decode()
        except (EOFError, OSError):
            what = "could not start, or were killed; what they printed may tell why"
        self.close()
        raise DataError(f"data.workers={self._count}: the worker processes {what}")


def _opened(told: dict, file: int) -> Batch:
    """The arrays of a file in memory, which lives as long as one of them."""
    try:
        # All pages at once: a fault for each would take longer.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        memory = mmap.mmap(file, told["bytes"], flags)
    finally:
        os.close(file)
    return {
        name: np.frombuffer(memory, dtype, math.prod(shape), at).reshape(shape)
        for name, (dtype, shape, at) in told["arrays"].items()
    }


def _stop(nursery: subprocess.Popen, control, links: list[socket.socket]) -> None:
    control.close()
    for link in links:
        link.close()
    try:
        nursery.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        nursery.kill()
        nursery.wait()


# In the other processes ---------------------------------------------------------------------------


def run(numbers: list[int]) -> None:
    """The nursery: forks into the workers, tells of their deaths, and ends them with the trainer.

    Args:
      numbers: of the open files of its own connection and of each worker's socket.
    """
    with multiprocessing.connection.Connection(numbers[0]) as control:
        try:
            _import_grain()
            make = control.recv()
        except EOFError:
            return
        except Exception as error:
            control.send_bytes(f"could not start: {_line(error)}".encode())
            return
        links = [socket.socket(fileno=number) for number in numbers[1:]]
        running = {}
        for index, link in enumerate(links):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    control.close()
                    for other in links:
                        if other is not link:
                            other.close()
                    _work(link, make, index, len(links))
                    code = 0
                except BaseException:  # nothing above would print it
                    traceback.print_exc()
                finally:
                    os._exit(code)
            running[pid] = index
        for link in links:
            link.close()
        try:
            while not control.poll(_POLL_SECONDS):
                pid, status = os.waitpid(-1, os.WNOHANG) if running else (0, 0)
                if pid:
                    how = os.waitstatus_to_exitcode(status)
                    control.send_bytes(_obituary(running.pop(pid), how).encode())
        except OSError:
            pass  # the trainer is gone
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _import_grain() -> None:
    """Imports Grain without JAX, for which it looks and which it can do without."""
    logging.disable(logging.WARNING)  # it says that it looked in vain
    sys.modules["jax"] = None
    try:
        import grain  # noqa: F401
    finally:
        del sys.modules["jax"]
        logging.disable(logging.NOTSET)


def _work(link: socket.socket, make: Make, index: int, count: int) -> None:
    """A worker: makes a batch for each "+" that comes, until the other end closes."""
    batches = None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other end is gone
        while asked := link.recv(_MESSAGE):
            for _ in asked:
                try:
                    batches = batches or make(index, count)
                    told, memory = _stored(next(batches))
                except StopIteration:
                    told = {"end": True}
                except DataError as error:
                    told = {"error": _cut(str(error))}
                except Exception as error:
                    told = {
                        "error": f"worker process {index} of {count} failed: "
                        f"{_cut(_line(error))}; data.workers=0 shows where"
                    }
                else:
                    with memory:
                        socket.send_fds(link, [json.dumps(told).encode()], [memory.fileno()])
                    continue
                link.send(json.dumps(told).encode())
                # Not to end: what lies in the socket is lost if an end closes with some unread.
                while link.recv(_MESSAGE):
                    pass
                return


def _stored(batch: Batch) -> tuple[dict, typing.BinaryIO]:
    """What describes a batch, and the file in memory that holds it."""
    arrays, at = {}, 0
    memory = os.fdopen(os.memfd_create("halonet-batch"), "wb")
    for name, array in batch.items():
        at = -(-at // _ALIGNMENT) * _ALIGNMENT
        memory.seek(at)
        memory.write(np.ascontiguousarray(array))
        arrays[name] = (array.dtype.str, array.shape, at)
        at += array.nbytes
    memory.flush()
    return {"arrays": arrays, "bytes": at}, memory


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]} ..."


def _line(error: Exception) -> str:
    """One line of an exception: its type, what it says and where it arose."""
    *_, last = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({os.path.basename(last.filename)}:{last.lineno})"


def _obituary(index: int, code: int) -> str:
    if code == -signal.SIGKILL:
        how = "was killed (SIGKILL), as Linux does when memory runs out; fewer workers need less"
    elif code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    else:
        how = f"ended with code {code}"
    return f"lost one: worker {index} {how}"

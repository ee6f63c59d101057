"""The processes of one run: how they find each other, agree, and leave together."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from halonet.runtime import PREEMPTED

_HEARTBEAT_SECONDS = 50  # without one from a process, the others end
_JOIN_SECONDS = 900  # the machines of a pod start minutes apart


class DistributedError(ValueError):
    """Processes that do not make one run, by their settings. The message is one line."""

    exit_code = 2


class RefusedError(ValueError):
    """What this process would do, and process 0 has refused, with the same exit code."""

    def __init__(self, exit_code: int):
        super().__init__("process 0 refused; it says why")
        self.exit_code = exit_code


class PlatformError(ValueError):
    """Devices that JAX was asked for and cannot use. The message is one line."""

    exit_code = 2


class MissingError(RuntimeError):
    """A process that did not come to where the others wait for it."""

    exit_code = 6  # it hangs, for all that the others can know


def join_processes(*, coordinator: str = "", process_id: int = -1, process_count: int = 0) -> str:
    """Joins the processes of one run, before any device is used.

    With `coordinator` ("host:port") all three must be given. Without it a cluster that says how
    many processes it started (Slurm, Open MPI, a TPU pod) is joined, and otherwise this process is
    the only one.

    Returns:
      A line for the log that says what was found.

    Raises:
      DistributedError: where only some of the settings are given, or nobody can be joined.
      PlatformError: where JAX has none of the devices that it was asked for.
    """
    if coordinator or process_id >= 0 or process_count:
        address = re.fullmatch(r".+:\d+", coordinator)
        if not (address and 0 <= process_id < process_count):
            raise DistributedError(
                f"distributed.coordinator={coordinator!r}, distributed.process_id={process_id} and "
                f"distributed.process_count={process_count} go together: host:port, and an id from "
                "0 to count - 1"
            )
        how = f"coordinator {coordinator}"
        _initialize(how, coordinator, process_count, process_id)
    elif _cluster_size() > 1:
        how = "detected from the environment"
        _initialize(how)
    else:
        return f"alone, on {_devices()} device(s)"
    devices = _devices()
    return (
        f"process {jax.process_index()} of {jax.process_count()} ({how}), "
        f"{jax.local_device_count()} of {devices} devices here"
    )


def _devices() -> str:
    """How many devices JAX uses, and of which platform."""
    try:
        return f"{jax.device_count()} {jax.default_backend()}"
    except (RuntimeError, AssertionError) as error:  # it asserts where a plugin is not installed
        line = " ".join(str(error).split()) or "its plugin is not installed"
        raise PlatformError(f"JAX_PLATFORMS={jax.config.jax_platforms or ''}: {line}") from error


def _initialize(how: str, *settings) -> None:
    # Where some never come, JAX aborts the process from its own code, which names nobody.
    print(f"joining the other processes ({how}) within {_JOIN_SECONDS} s", flush=True)
    coordinator = settings[0] if settings else ""
    local = coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")
    try:
        jax.distributed.initialize(
            *settings,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            # JAX opens the port on every interface, and it asks nobody who he is.
            coordinator_bind_address=coordinator if local else None,
        )
    except (RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise DistributedError(f"cannot join the other processes ({how}): {line}") from error


def _cluster_size() -> int:
    """Processes that the launcher of this one says it started; 1 where none says anything."""
    # Of the step, not the allocation: a shell inside salloc is one process.
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return max(1, len([h for h in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]))


def meet(where: str, seconds: float = _JOIN_SECONDS) -> None:
    """Waits until all processes have come here.

    Args:
      where: named in the error, and the same in all.
      seconds: after which the rest is waited for no more.

    Raises:
      MissingError: naming the processes that are not here by then.
    """
    if jax.process_count() == 1:
        return
    try:
        _client().wait_at_barrier(where, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        _, _, late = str(error).partition("timed out task names:")
        missing = ", ".join(re.findall(r"^(?:.*task:)?(\d+)$", late, re.MULTILINE))
        if not missing:
            raise
        raise MissingError(
            f"process {missing} of {jax.process_count()} did not come within {seconds:g} s to "
            f"where the others wait: {where}; look at what it printed last"
        ) from error


def _client():
    """Of JAX's coordination service, whose waiting can end and says for whom it waited."""
    from orbax.checkpoint import multihost  # not at the start: it takes a second

    return multihost.get_jax_distributed_client()


def check_alike(what: dict[str, Any], seconds: float = _JOIN_SECONDS) -> None:
    """Refuses processes that were started with different settings.

    Args:
      what: name -> value, as JSON can hold it.

    Raises:
      DistributedError: in all processes, with what differs from process 0 in the first that does.
      MissingError: as `meet`.
    """
    if jax.process_count() == 1:
        return
    client, folder = _client(), "halonet/settings/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(what), allow_overwrite=True)
    meet("comparing settings", seconds)
    found = {int(k.rpartition("/")[2]): json.loads(v) for k, v in client.key_value_dir_get(folder)}
    for index in sorted(found):
        differing = [
            f"{name} is {repr(found[0].get(name))[:200]} in process 0 and "
            f"{repr(found[index].get(name))[:200]} in process {index}"
            for name in sorted(found[0].keys() | found[index].keys())
            if found[0].get(name) != found[index].get(name)
        ]
        if differing:
            raise DistributedError(f"the processes are of different runs: {'; '.join(differing)}")


def agreed(find: Callable[[], int], seconds: float = _JOIN_SECONDS) -> int:
    """What process 0 finds, a number, for all processes: another might find something else.

    Where it raises, all do: nobody waits for one that has left. The others raise RefusedError, with
    the exit code of what process 0 raises; all raise MissingError as `meet` does.
    """
    found, code, error = 0, 0, None
    if jax.process_index() == 0:
        try:
            found = int(find())
        except Exception as raised:  # whatever it is, the others wait
            code, error = getattr(raised, "exit_code", 1), raised
    meet("agreeing with process 0", seconds)
    found, code = multihost_utils.broadcast_one_to_all(np.array([found, code], np.int32)).tolist()
    if code:
        raise error or RefusedError(code)
    return found


def leave_for(error: BaseException) -> NoReturn:
    """Ends the process: for an error with an exit code in one line, for others as Python tells."""
    if isinstance(error, KeyboardInterrupt):
        leave(130)
    code = getattr(error, "exit_code", None)
    if code is None:
        traceback.print_exception(error)
        code = 1
    else:
        print(f"error: {error}" if code != PREEMPTED else error, file=sys.stderr)
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code; one of several at once.

    JAX's own leaving waits minutes for the others, who wait for this one in a step that it will
    never join; when it is gone, theirs ends them.
    """
    several, first = jax.distributed.is_initialized(), False
    if several:
        # Where JAX itself is what failed, it fails again.
        with contextlib.suppress(RuntimeError, AssertionError):
            several, first = jax.process_count() > 1, jax.process_index() == 0
    if several and code not in (0, PREEMPTED):
        sys.stdout.flush()
        sys.stderr.flush()
        if first:
            time.sleep(2)  # the others end with it: those that leave too shall do so by themselves
        os._exit(code)
    sys.exit(code)

"""Sweeps as data: what their members are, whether they can run, and how far they are.

A sweep is a file of this folder with two functions of a scale, "full" (for a pod) or "smoke"
(minutes, on two cores): `get_config(scale)` and `sweep(scale)`, a generator of members, each a dict
of overrides by dotted key and the member's "name":

    def sweep(scale="full"):
        yield {"name": "b8h3", "model.block_size": 8, "model.halo_size": 3}

A member is the command `python main.py --config=experiments/FILE.py:SCALE --workdir=ROOT/SWEEP/ID
--config.key=value ...`. Its id has a hash of the overrides, so that no change of the file mixes the
runs of its members. Beside its workdir lie ID.json, what the launcher remembers of it, and ID.log,
what it printed.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import fcntl
import hashlib
import importlib.util
import json
import math
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from halonet.files import write_whole
from halonet.metrics import read_metrics
from launch import LaunchError, Run
from launch.runs import check_runs, read_config

FOLDER = pathlib.Path(__file__).parent
SMOKE = "_smoke"
RECORD = "sweep.json"
# Exit codes of what was told to stop: it has saved, or, before it could, had nothing to save.
STOPPED = (75, 143)
# A member's heartbeat, of which there is one in ten seconds, is news for so long.
_STALE_SECONDS = 60.0


class SweepError(ValueError):
    """A sweep that cannot run as it is. The message is one line."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep: its name, and overrides by dotted key, with the configuration's types."""

    name: str
    overrides: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Of its workdir: the name, and eight digits that stand for the overrides."""
        text = json.dumps(self.overrides, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep at one of its scales.

    Attributes:
      name: as on the command line: "scale", "scale_smoke".
      config: the configuration file of all members, with its argument.
      overrides: of all members, from the command line.
      members: at least one, all different.
    """

    name: str
    config: str
    overrides: Mapping[str, Any]
    members: tuple[Member, ...]

    def runs(self, root: str, topology: str = "") -> list[Run]:
        """The members as runs below the folder `root`."""
        job = self.name.replace("_", "-")
        return [
            Run(
                name=f"{job}-{member.name}",
                config=self.config,
                workdir=f"{root.rstrip('/')}/{self.name}/{member.id}",
                topology=topology,
                overrides={**self.overrides, **member.overrides},
            )
            for member in self.members
        ]

    def record(self) -> dict[str, Any]:
        """What sweep.json holds."""
        members = [
            {"name": it.name, "id": it.id, "overrides": dict(it.overrides)} for it in self.members
        ]
        # As it will be read: JSON has lists for tuples.
        whole = {"sweep": self.name, "config": self.config, "overrides": dict(self.overrides)}
        return json.loads(json.dumps({**whole, "members": members}))


def names() -> list[str]:
    """Of all sweeps, at both scales."""
    texts = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
    files = [name for name, text in texts.items() if re.search(r"^def sweep\(", text, re.M)]
    return [name + scale for name in files for scale in ("", SMOKE)]


def question(name: str) -> str:
    """What a sweep is there to answer: the first line of its file."""
    text = (FOLDER / f"{name.removesuffix(SMOKE)}.py").read_text()
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def load(name: str, settings: Sequence[str] = ()) -> Sweep:
    """Reads a sweep; no JAX is needed for it.

    Args:
      settings: for all members, "key=value".

    Raises:
      SweepError: where there is no such sweep, or its members cannot be told apart.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names())}"
        raise SweepError(f"there is no sweep '{name}'; {hint}")
    file = name.removesuffix(SMOKE)
    scale = "smoke" if name.endswith(SMOKE) else "full"
    try:
        spec = importlib.util.spec_from_file_location(f"experiments.{file}", FOLDER / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config, found = module.get_config(scale), list(module.sweep(scale))
    except Exception as error:  # the file is a program: anything can be wrong in it
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise SweepError(f"experiments/{file}.py: {line}") from error
    overrides = dict(_setting(it, config) for it in settings)
    return Sweep(
        name, f"experiments/{file}.py:{scale}", overrides, _members(name, found, overrides)
    )


def _setting(text: str, config: Any) -> tuple[str, Any]:
    """One "key=value" with the type that the configuration has there; others check the rest."""
    key, _, value = text.partition("=")
    for part in key.split("."):
        config = config.get(part) if hasattr(config, "get") else None
    try:
        return key, value if isinstance(config, str) else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _members(sweep: str, found: Sequence[Any], common: Mapping[str, Any]) -> tuple[Member, ...]:
    """Those that a sweep's generator yields, once they are known to be members and different."""
    if not found:
        raise SweepError(f"sweep {sweep} has no members")
    members: list[Member] = []
    for overrides in found:
        if not isinstance(overrides, dict) or not isinstance(overrides.get("name"), str):
            raise SweepError(
                f"sweep {sweep} yields {str(overrides)[:200]}; a member is a dict of overrides by "
                "dotted key and a 'name'"
            )
        member = Member(overrides["name"], {k: v for k, v in overrides.items() if k != "name"})
        try:
            json.dumps(member.overrides)
        except TypeError as error:
            raise SweepError(f"member '{member.name}' of sweep {sweep}: {error}") from error
        for other in members:
            if member.name == other.name:
                raise SweepError(f"sweep {sweep} has two members named '{member.name}'")
            if member.overrides == other.overrides:
                raise SweepError(
                    f"members '{other.name}' and '{member.name}' of sweep {sweep} have the same "
                    f"overrides: {member.overrides}"
                )
        for key in sorted(common.keys() & member.overrides):
            raise SweepError(
                f"--config.{key}={common[key]}: member '{member.name}' sets it to "
                f"{member.overrides[key]}; it cannot be the same for all"
            )
        members.append(member)
    return tuple(members)


def check(sweep: Sweep, *, root: str = "runs", topology: str = "", devices: int = 0) -> list[Run]:
    """Refuses a sweep of which some member could not start; builds each model, compiles nothing.

    It imports JAX and asks it for its devices, where their number is not given.

    Args:
      devices: that each member shall have; 0: those that there are.

    Raises:
      SweepError: naming the member, the key, its value and what would do.
    """
    from halonet.config import ConfigError, validate

    runs = sweep.runs(root, topology)
    try:
        check_runs(runs)
        for run in runs:
            # How many classes there are makes no difference to what can be built.
            validate(read_config(run), num_classes=1000, devices=devices)
    except LaunchError as error:
        raise SweepError(str(error)) from error
    except ConfigError as error:
        raise SweepError(f"run {run.name!r}: {error}") from error
    return runs


def write_record(sweep: Sweep, folder: epath.Path) -> None:
    """Writes sweep.json; what is there already must be of this sweep, or a part of it.

    Raises:
      SweepError: with what differs.
    """
    now, path = sweep.record(), folder / RECORD
    if path.exists():
        before = read_record(folder)
        for what in ("config", "overrides"):
            if before[what] != now[what]:
                raise SweepError(
                    f"{folder} has a sweep of other {what}: {_flags(before[what])} there, "
                    f"{_flags(now[what])} now; take another --root, or the old ones"
                )
        ids = {member["id"] for member in now["members"]}
        if gone := [member["id"] for member in before["members"] if member["id"] not in ids]:
            raise SweepError(
                f"{folder} has members that the sweep has no more, or has changed: "
                f"{', '.join(gone)}; take another --root, or remove that folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(
            f"{folder} cannot be made: {error.strerror}; take another --root"
        ) from error
    write_whole(path, json.dumps(now, indent=1) + "\n")


def read_record(folder: epath.Path) -> dict[str, Any]:
    """What sweep.json says.

    Raises:
      SweepError: where there is none that can be read.
    """
    record = read_json(folder / RECORD)
    if not record:
        raise SweepError(
            f"{folder} holds no sweep: there is no {RECORD} in it; 'run' writes it, and 'render'"
        )
    return record


def _flags(what: Any) -> str:
    if not isinstance(what, dict):
        return str(what)
    return " ".join(f"--config.{key}={value}" for key, value in what.items()) or "none"


def read_json(path: epath.Path) -> dict[str, Any]:
    """What a file holds; {} where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclasses.dataclass(frozen=True)
class State:
    """How far a member is.

    Attributes:
      name: queued, running, preempted (stopped, and not at its end), failed or done.
      exit_code: of its last start on this machine; -1 where that is not known.
      step, steps: taken, and of the whole run; 0 where that is not known.
      top1: of the newest evaluation, up to 1; not a number before the first.
      seconds: that it has run, of all its starts on this machine.
    """

    name: str
    exit_code: int = -1
    step: int = 0
    steps: int = 0
    top1: float = math.nan
    seconds: float = 0.0

    @property
    def fraction(self) -> float:
        """Of its steps that are taken."""
        return self.step / self.steps if self.steps else 0.0


def state(folder: epath.Path, member: str) -> State:
    """Reads how far a member is, from files alone.

    Args:
      folder: of the sweep; may be gs://.
      member: its id.
    """
    workdir, remembered = folder / member, read_json(folder / f"{member}.json")
    code, seconds = remembered.get("exit_code", -1), remembered.get("seconds", 0.0)
    if summary := read_json(workdir / "summary.json"):
        step, top1 = summary["step"], summary["eval/top1"]
        return State("done", code, step, step, top1, seconds)
    rows = read_metrics(workdir)
    step = max((row["step"] for row in rows), default=0)
    top1 = next((row["eval/top1"] for row in reversed(rows) if "eval/top1" in row), math.nan)
    steps = read_json(workdir / "config.json").get("train", {}).get("steps", 0)
    beat = read_json(workdir / "lock.json").get("heartbeat", 0.0)
    beating = beat > max(time.time() - _STALE_SECONDS, remembered.get("ended", 0.0))
    if beating or is_held(folder / f"{member}.log"):
        name = "running"
    elif code not in (-1, *STOPPED):
        name = "failed"
    else:
        name = "preempted" if remembered or workdir.exists() else "queued"
    return State(name, code, step, steps, top1, seconds)


def is_held(log: epath.Path) -> bool:
    """Whether a process of this machine writes a member's log, or the launcher of one does."""
    if "://" in str(log):
        return False
    try:
        file = log.open("rb")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def table(folder: epath.Path) -> str:
    """How far the members of a sweep are, a line each, and how many are how far."""
    record = read_record(folder)
    rows, counts = [("member", "state", "exit", "step", "top-1", "seconds")], {}
    for member in record["members"]:
        it = state(folder, member["id"])
        counts[it.name] = counts.get(it.name, 0) + 1
        rows.append(
            (
                member["name"],
                it.name,
                str(it.exit_code) if it.exit_code >= 0 else "-",
                f"{it.step} of {it.steps}" if it.steps else f"{it.step}",
                f"{100 * it.top1:.2f} %" if it.top1 == it.top1 else "-",
                f"{it.seconds:.0f}" if it.seconds else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{it:<{n}}" for it, n in zip(row, widths, strict=True)) for row in rows]
    said = ", ".join(f"{count} {name}" for name, count in counts.items())
    return "\n".join([*(line.rstrip() for line in lines), f"{len(rows) - 1} members: {said}"])

"""A sweep's folder as data, and its members as one table.

The folder ROOT/NAME of a sweep holds sweep.json, written before anything starts, and a run's
workdir for each member, named by the member's id.
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import json
import pathlib
import shlex
from typing import Any

from etils import epath

from experiments.sweeps import RECORD, SweepError, read_record, state
from halonet import files, metrics
from halonet.config import load_config
from halonet.report import read_summary

Row = dict[str, Any]
ROOT = pathlib.Path(__file__).parent.parent
SEED = "config.seed"

# column: (of summary.json, unit or meaning). Those of the configuration stand before them, named
# "config.KEY", and those of versions behind.
MEASURED = {
    "step": ("step", "steps taken"),
    "top1": ("eval/top1", "held-out top-1 at the last evaluation, a fraction"),
    "loss": ("eval/loss", "held-out loss at the last evaluation, nats"),
    "best_top1": ("best/top1", "held-out top-1 at the best evaluation, a fraction"),
    "best_step": ("best/step", "the step of that evaluation"),
    "examples": ("eval/count", "held-out examples"),
    "parameters": ("parameters", "trainable parameters"),
    "multiply_adds": ("multiply_adds", "multiply-adds of one image, forward"),
    "training_flops": ("", "FLOPs of all steps: 6 × multiply-adds × images"),
    "images_per_second": ("perf/images_per_second", "images trained on, on all devices; median"),
    "mfu": ("perf/mfu", "share of the devices' peak that training reached"),
    "goodput": ("goodput/step", "share of the time that went on steps"),
    "seconds": ("goodput/seconds", "since the first start, everything together"),
    "starts": ("goodput/starts", "times that the run was started"),
    "devices": ("devices", "number and kind"),
}
_TEXTS = ("devices",)
# What each table has; those of the configuration and of versions depend on the sweep.
COLUMNS = ("name", "id", "state", *MEASURED, "config", "command")


class CollectError(SweepError):
    """A sweep that cannot be collected. The message says what would do."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A member of a sweep, as far as it has come.

    Attributes:
      name, id, overrides: as sweep.json has them.
      workdir: of its run; it need not exist.
      state: as `experiments.sweeps.State` has it.
      summary: of a run that goes on, what is known of it so far.
      history: its rows of metrics.
      config: its configuration, nested; {} where there is none.
    """

    name: str
    id: str
    overrides: dict[str, Any]
    workdir: epath.Path
    state: str
    summary: dict[str, Any]
    history: list[metrics.Row]
    config: dict[str, Any]

    @property
    def made_by(self) -> list[dict[str, str]]:
        """The versions of the code that trained it, oldest first; [{}]: not recorded."""
        return self.summary.get("made_by", [{}] if self.state == "done" else [])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What `read_sweep` found: `command` is what runs it, `config` the file that defines it."""

    name: str
    config: str
    command: str
    members: list[Member]

    @property
    def finished(self) -> list[Member]:
        return [member for member in self.members if member.state == "done"]


def read_sweep(folder: epath.PathLike) -> Sweep:
    """The sweep in `folder`, with what each member has measured.

    Raises:
      CollectError: where there is none, or no member has finished.
    """
    folder = epath.Path(folder)
    try:
        saved = read_record(folder)
        name, config, common = saved["sweep"], saved["config"], saved["overrides"]
        members = [_member(folder, **member) for member in saved["members"]]
    except (KeyError, TypeError) as error:
        path = folder / RECORD
        raise CollectError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    flags = [f"--config.{key}={as_text(value)}" for key, value in common.items()]
    command = shlex.join(["python", "-m", "experiments", "run", name, *flags])
    sweep = Sweep(name, config, command, members)
    if not sweep.finished:
        raise CollectError(
            f"none of the {len(members)} members in {folder} has finished; {command} goes on"
        )
    return sweep


def _member(folder: epath.Path, name: str, id: str, overrides: dict[str, Any]) -> Member:
    workdir = folder / id
    summary, history, config = read_summary(workdir), metrics.read_metrics(workdir), {}
    if (workdir / "config.json").exists():
        config = load_config(workdir).to_dict()
    summary, now = summary or _so_far(history), state(folder, id).name
    return Member(name, id, overrides, workdir, now, summary, history, config)


def _so_far(history: list[metrics.Row]) -> dict[str, Any]:
    """The part of a summary that rows of metrics give."""
    found: dict[str, Any] = {"step": history[-1]["step"]} if history else {}
    evaluations = [row for row in history if "eval/top1" in row]
    if evaluations:
        best = metrics.best_steps(history, 1)[0]
        found |= {name: value for name, value in evaluations[-1].items() if name != "step"}
        found["best/step"] = best
        found["best/top1"] = max(row["eval/top1"] for row in evaluations if row["step"] == best)
    return found


def table(sweep: Sweep) -> list[Row]:
    """A row for each member, all with the same columns; None where there is no value.

    An override that only some members have is, for the others, what their configuration has.
    """
    keys = list(dict.fromkeys(key for member in sweep.members for key in member.overrides))
    names = dict.fromkeys(name for it in sweep.members for made in it.made_by for name in made)
    return [
        {"name": member.name, "id": member.id, "state": member.state}
        | _settings(member, keys)
        | {column: member.summary.get(name) for column, (name, _) in MEASURED.items()}
        | {"training_flops": _training_flops(member)}
        | {
            ("commit" if name == "code" else name): " then ".join(
                dict.fromkeys(made.get(name, "?") for made in member.made_by)
            )
            or None
            for name in sorted(names, key=lambda name: name != "code")
        }
        | {"config": sweep.config, "command": sweep.command}
        for member in sweep.members
    ]


def _settings(member: Member, keys: list[str]) -> Row:
    there = _flat(member.config)
    values = {key: member.overrides.get(key, there.get(key)) for key in keys}
    return {f"config.{key}": (it is not None and as_text(it)) or None for key, it in values.items()}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        inner = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def _training_flops(member: Member) -> int | None:
    """Of forward and backward pass, which multiplies twice as much; what is computed again to save
    memory does not count."""
    summary = member.summary
    if "multiply_adds" not in summary:
        return None
    return 6 * summary["multiply_adds"] * member.config["data"]["batch_size"] * summary["step"]


def as_text(value: Any) -> str:
    """A value of a configuration as a flag would have it: JSON has lists for tuples."""
    return str(tuple(value) if isinstance(value, list) else value)


def versions(sweep: Sweep) -> dict[str, list[str]]:
    """Names of finished members by the version of the code that trained them, described by what
    differs; a member that several versions trained stands with each."""
    made: dict[str, list[str]] = {}
    for member in sweep.finished:
        for version in member.made_by:
            made.setdefault(json.dumps(version, sort_keys=True), []).append(member.name)
    found = {key: json.loads(key) for key in made}
    names = dict.fromkeys(name for version in found.values() for name in version)
    differing = [
        name for name in names if len({version.get(name) for version in found.values()}) > 1
    ]
    said = {
        key: ", ".join(f"{name} {version[name]}" for name in differing if name in version)
        for key, version in found.items()
    }
    return {said[key] or "not recorded": members for key, members in made.items()}


def write_table(rows: list[Row], path: epath.Path) -> None:
    """Writes rows of `table` as CSV; an empty cell is None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_whole(path, text.getvalue())


def read_table(path: epath.PathLike) -> list[Row]:
    """Rows that `write_table` wrote.

    Raises:
      CollectError: where a line is not of them.
    """

    def value(column: str, text: str) -> Any:
        if text == "" or column not in MEASURED or column in _TEXTS:
            return text or None
        return int(text) if text.isdecimal() else float(text)

    try:
        header, *lines = csv.reader(io.StringIO(epath.Path(path).read_text()), strict=True)
        if missing := [name for name in COLUMNS if name not in header]:
            raise ValueError(f"it has no column {missing[0]}")
        return [
            {column: value(column, text) for column, text in zip(header, line, strict=True)}
            for line in lines
        ]
    except (csv.Error, ValueError) as error:
        raise CollectError(f"{path} is no table of a sweep: {error}") from error


def question(config: str) -> tuple[str, str]:
    """What a sweep asks: the first paragraph of its file's docstring, and the rest.

    Args:
      config: the file from the root of the repository, and perhaps its argument, such as
        experiments/scale.py:smoke. It is read and not run; where there is none, all is "".
    """
    path = ROOT / config.partition(":")[0]
    if not path.is_file():
        return "", ""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first, _, rest = text.partition("\n\n")
    return " ".join(first.split()), rest.strip("\n")

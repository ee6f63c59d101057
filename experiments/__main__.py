"""Sweeps: lists, starts, watches, renders and collects them.

python -m experiments list
python -m experiments run block_halo_smoke --jobs=2 [--config.train.steps=100]
python -m experiments status block_halo_smoke
python -m experiments collect block_halo_smoke
python -m experiments render scale --target=slurm --topology=gpu:8x8 --root=/shared/runs \
    --out=rendered --time=1-00:00:00
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from etils import epath

from experiments import sweeps
from experiments.launcher import Launcher
from launch import render
from launch.targets import add_flags, write


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str]) -> int:
    """Does what was asked for and returns the exit code: 2 for a sweep that is refused, and else
    that of the command."""
    parser = _Parser(prog="python -m experiments", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    known = {
        "list": "the sweeps that there are",
        "check": "refuse a sweep that could not run, and start nothing",
        "run": "train the members that are not done, on this machine",
        "status": "how far each member is",
        "collect": "all members as a table and a report",
        "render": "files that launch the members on a cluster",
    }
    each = {
        name: commands.add_parser(name, help=text, allow_abbrev=False)
        for name, text in known.items()
    }
    for name in ("check", "run", "status", "collect", "render"):
        each[name].add_argument("name", metavar="NAME", help="a sweep, such as scale_smoke")
    for name in ("run", "status", "collect", "render"):
        each[name].add_argument("--root", default="runs", help="folder of the sweeps' folders")
    for name in ("run", "render"):
        each[name].add_argument("--index", type=int, help="only this member, counted from 0")
    each["run"].add_argument("--jobs", type=int, default=1, help="members at a time")
    each["collect"].add_argument("--out", default="", help="of the report; else the sweep's folder")
    each["collect"].add_argument("--allow_mixed", action="store_true", help="versions of the code")
    each["render"].add_argument("--topology", required=True, help="v5e:16x16, or gpu:NODESxGPUS")
    add_flags(each["render"])
    if not arguments:
        parser.print_usage(sys.stderr)
        return 2
    given, rest = parser.parse_known_args(arguments)
    given = vars(given)
    command = given.pop("command")
    settings = [it.removeprefix("--config.") for it in rest]
    for flag, setting in zip(rest, settings, strict=True):
        if command not in ("check", "run", "render") or flag == setting or "=" not in setting:
            hint = "; a key is set by --config.key=value" if "config." in flag else ""
            parser.error(f"unrecognized argument: {flag}{hint}")
    if command in ("check", "run", "render"):
        given["settings"] = settings
    try:
        return COMMANDS[command](**given)
    except (ValueError, OSError) as error:
        if not hasattr(error, "exit_code"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _list() -> int:
    for name in sweeps.names():
        count = len(sweeps.load(name).members)
        print(f"{name:<24} {count:>3} members  {sweeps.question(name)}")
    return 0


def _check(name: str, settings: Sequence[str]) -> int:
    runs = sweeps.check(sweeps.load(name, settings))
    print(f"the {len(runs)} members of {name} can be built")
    return 0


def _run(name: str, settings: Sequence[str], root: str, jobs: int, index: int | None) -> int:
    if "://" in root:
        raise sweeps.SweepError(
            f"--root={root} is of no file system of this machine, on which logs are written and "
            "locked; take a local folder, or 'render' the sweep"
        )
    if jobs < 1:
        raise sweeps.SweepError(f"--jobs={jobs} must be at least 1")
    sweep = sweeps.load(name, settings)
    chosen = _chosen(sweep, index)
    # In a process of its own: JAX would keep a GPU, which the members need.
    flags = [f"--config.{it}" for it in settings]
    command = [sys.executable, "-m", "experiments", "check", name, *flags]
    if code := subprocess.run(command, cwd=sweeps.FOLDER.parent).returncode:
        return code
    folder = epath.Path(pathlib.Path(root).absolute()) / name
    sweeps.write_record(sweep, folder)
    return Launcher(chosen, folder, jobs=jobs).run()


def _status(name: str, root: str) -> int:
    print(sweeps.table(epath.Path(root) / name))
    return 0


def _collect(name: str, root: str, **options) -> int:
    folder = epath.Path(root) / name
    sweeps.read_record(folder)  # where there is none, that is said at once
    from experiments.collect import collect

    collect(folder, **options)
    return 0


def _render(
    name: str,
    settings: Sequence[str],
    root: str,
    index: int | None,
    topology: str,
    target: str,
    out: str,
    **options,
) -> int:
    sweep = sweeps.load(name, settings)
    chosen = _chosen(sweep, index)
    files = render(chosen.runs(root, topology), target, **options)
    # A chip is a device: of JAX too, in the generations that there are topologies of.
    devices = math.prod(int(it) for it in topology.partition(":")[2].split("x"))
    sweeps.check(chosen, root=root, topology=topology, devices=devices)
    write(files, target, out)
    record = pathlib.Path(out) / sweeps.RECORD
    record.write_text(json.dumps(sweep.record(), indent=1) + "\n")
    copy = "gcloud storage cp" if "://" in root else "install -D --mode=644"
    print(f"{copy} {record} {root.rstrip('/')}/{name}/{sweeps.RECORD}  # for status and collect")
    return 0


def _chosen(sweep: sweeps.Sweep, index: int | None) -> sweeps.Sweep:
    """The sweep with one of its members, or with all."""
    if index is None:
        return sweep
    if not 0 <= index < len(sweep.members):
        raise sweeps.SweepError(
            f"--index={index}: {sweep.name} has the members 0 to {len(sweep.members) - 1}"
        )
    return dataclasses.replace(sweep, members=(sweep.members[index],))


COMMANDS = {
    "list": _list,
    "check": _check,
    "run": _run,
    "status": _status,
    "collect": _collect,
    "render": _render,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

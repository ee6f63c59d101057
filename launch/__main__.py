"""Renders runs for a cluster, or rehearses one here.

python -m launch render --target=jobset --runs=runs.py --out=rendered --image=IMAGE
python -m launch rehearse --processes=2 --devices=4 -- --config=configs/mnist.py --workdir=DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from launch import LaunchError, load_runs, render
from launch.rehearsal import Rehearsal
from launch.targets import add_flags, write


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str]) -> int:
    """Does what was asked for and returns the exit code: 2 for what cannot be launched, and else a
    rehearsal's own."""
    parser = _Parser(prog="python -m launch", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{render,rehearse}")
    one = commands.add_parser("render", help="the files that launch runs", allow_abbrev=False)
    one.add_argument("--runs", required=True, help="a Python file with runs(), of launch.Run")
    add_flags(one)
    two = commands.add_parser(
        "rehearse", help="N processes here; main.py's flags come after --", allow_abbrev=False
    )
    for name, default in (("processes", 2), ("devices", 4), ("restarts", 0)):
        two.add_argument(f"--{name}", type=int, default=default)
    if not arguments:
        parser.print_usage(sys.stderr)
        return 2
    own, flags = _split(arguments)
    known = vars(parser.parse_args(own))
    if known.pop("command") == "rehearse":
        if not flags:
            parser.error("after -- come the flags of main.py: -- --config=FILE --workdir=DIR")
        for name, least in (("processes", 1), ("devices", 1), ("restarts", 0)):
            if known[name] < least:
                parser.error(f"--{name}={known[name]} must be at least {least}")
        return Rehearsal(flags, **known).run()
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return _render(**known)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is before the first "--", and what is behind."""
    arguments = list(arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _render(target: str, runs: str, out: str, **settings) -> int:
    try:
        write(render(load_runs(runs), target, **settings), target, out)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A run as data: what a launcher has to know of it, and whether it can be."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import re
import runpy
from collections.abc import Iterable, Mapping
from typing import Any

# Of Kubernetes (RFC 1035), less what is added to it: the longest name of a pod is NAME-slice-0-1023
# and six characters, 63 in all. TPU VMs, Slurm and files take such a name too.
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")


class LaunchError(ValueError):
    """Runs that cannot be launched as they are. The message is one line."""

    exit_code = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of main.py.

    Attributes:
      name: of the job; lower-case letters, digits and dashes.
      config: the configuration file, from the root of the repository, with its argument.
      workdir: what all hosts see at the same place: gs://..., or a shared folder.
      topology: a slice of TPUs such as v5e:8x8, or gpu:NODESxGPUS.
      overrides: values by dotted key, with the types of the configuration's.
    """

    name: str
    config: str
    workdir: str
    topology: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        """Of main.py; no shell has seen them yet."""
        overrides = (f"--config.{key}={value}" for key, value in self.overrides.items())
        return [f"--config={self.config}", f"--workdir={self.workdir}", *overrides]


def load_runs(path: str) -> list[Run]:
    """What the function runs() of a Python file yields.

    Raises:
      LaunchError: where there is no such file, no such function, or something else than runs.
    """
    if not pathlib.Path(path).is_file():
        raise LaunchError(f"--runs={path}: there is no such file")
    try:
        module = runpy.run_path(path)
        if not callable(module.get("runs")):
            raise LaunchError("it has no function runs()")
        runs = list(module["runs"]())
    except Exception as error:  # the file is a program: anything can be wrong in it
        raise LaunchError(f"{path}: {_one_line(error)}") from error
    for run in runs:
        if not isinstance(run, Run):
            raise LaunchError(f"{path}: runs() yields no launch.Run but {run!r}"[:300])
    return runs


def check_runs(runs: Iterable[Run]) -> None:
    """Refuses runs that could not start, or that would be in each other's way.

    Raises:
      LaunchError: naming the run, its value and what would do.
    """
    runs = list(runs)
    if not runs:
        raise LaunchError("there are no runs to launch")
    for run in runs:
        for attribute in ("name", "config", "workdir", "topology"):
            if not isinstance(getattr(run, attribute), str):
                raise LaunchError(f"{attribute} {getattr(run, attribute)!r} of a run is no text")
    for attribute in ("name", "workdir"):
        values = [getattr(run, attribute).rstrip("/") for run in runs]
        for value in values:
            if values.count(value) > 1:
                raise LaunchError(f"{values.count(value)} runs have the {attribute} {value!r}")
    for run in runs:
        if not NAME.fullmatch(run.name):
            raise LaunchError(
                f"name {run.name!r} must have lower-case letters, digits and dashes, begin with a "
                "letter, not end with a dash, and be of 40 characters at most"
            )
        for flag in run.flags:
            if not flag.isprintable():
                raise LaunchError(f"run {run.name!r}: {flag!r} has a character that no line can")
        path = pathlib.PurePosixPath(run.config.partition(":")[0])
        if path.is_absolute() or ".." in path.parts:
            raise LaunchError(
                f"run {run.name!r}: config {run.config!r} must be a path inside the repository, "
                "which is what the hosts have"
            )
        read_config(run)


def read_config(run: Run) -> Any:
    """Reads the configuration as main.py would, from the same flags, and checks each key.

    Returns:
      The ConfigDict, with the overrides.

    Raises:
      LaunchError: naming the run, the key, its value and what would do.
    """
    # Not at the start: it takes two seconds, and a rehearsal needs none of it.
    from absl import flags
    from ml_collections import config_flags

    from halonet.config import ConfigError, check_values, flatten, parse_flags

    argv = ["main.py", *(flag for flag in run.flags if not flag.startswith("--workdir="))]
    values, said = flags.FlagValues(), io.StringIO()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    try:
        with contextlib.redirect_stderr(said):
            parse_flags(argv, values)
        check_values(values.config)
    except SystemExit:
        line = said.getvalue().strip().removeprefix("error: ")
        raise LaunchError(f"run {run.name!r}: {line}") from None
    except ConfigError as error:
        raise LaunchError(f"run {run.name!r}: {error}") from error
    now = flatten(values.config)
    for key, value in run.overrides.items():
        meant = tuple(value) if isinstance(value, list) else value
        if now.get(key) != meant:
            raise LaunchError(
                f"run {run.name!r}: {key}={value!r} would be read as {now.get(key)!r}; "
                "give one value of the configuration, with its type"
            )
    return values.config


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

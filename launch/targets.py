"""What runs on a cluster: the text of a file for each run, from the templates beside this one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import re
import shlex
import string
from collections.abc import Iterable, Mapping
from typing import ClassVar

from launch.runs import LaunchError, Run, check_runs

# Exit codes of main.py. 75 is a run that was preempted and has saved. The next are of what no
# restart cures: configuration, data, a loss that is no number (the same steps would follow), want
# of memory or disk. After any other (a process died or hung, a bucket failed) it is started again.
PREEMPTED = 75
FINAL = (2, 3, 5, 7)

_PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    *("8x8x12", "8x8x16", "8x16x16"),
)


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A generation of TPUs, as Google's pages name it.

    Attributes:
      label: of GKE's nodes, cloud.google.com/gke-tpu-accelerator.
      machine: GKE's type of machine; {} stands for its chips.
      type, runtime: of `gcloud compute tpus tpu-vm create`: --type and --version.
      shapes: of its slices.
    """

    label: str
    machine: str
    type: str
    runtime: str
    shapes: tuple[str, ...]


# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and cloud.google.com/tpu/docs/runtimes
TPUS = {
    "v4": Tpu("tpu-v4-podslice", "ct4p-hightpu-{}t", "v4", "tpu-ubuntu2204-base", _CUBES),
    "v5e": Tpu(
        "tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", "v5litepod", "v2-alpha-tpuv5-lite", _PLANES
    ),
    "v5p": Tpu("tpu-v5p-slice", "ct5p-hightpu-{}t", "v5p", "v2-alpha-tpuv5", _CUBES),
    "v6e": Tpu("tpu-v6e-slice", "ct6e-standard-{}t", "v6e", "v2-alpha-tpuv6e", _PLANES),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Target:
    """A kind of cluster. Its fields are the settings that a user gives beside the runs.

    Attributes:
      max_restarts: after failures that a restart may cure; preemptions do not count.
    """

    max_restarts: int = 20

    template: ClassVar[str]
    suffix: ClassVar[str]
    start: ClassVar[str]  # the command that launches a rendered file

    def fields(self, run: Run) -> dict[str, object]:
        """What the template needs beside the settings."""
        raise NotImplementedError

    def render(self, run: Run) -> str:
        """The file of one run."""
        settings = dataclasses.asdict(self)
        values = {
            "name": run.name,
            "what": f"{run.config} on {run.topology}",
            "flags": shlex.join(run.flags),
            "preempted": PREEMPTED,
            "final": " | ".join(map(str, FINAL)),
            **settings,
            **self.fields(run),
        }
        lines = []
        for line in (pathlib.Path(__file__).parent / self.template).read_text().splitlines():
            line, marked, setting = line.partition(" #? ")  # is there where the setting is
            if not marked or settings[setting]:
                lines.append(line)
        return _Template("\n".join(lines) + "\n").substitute(values)


class _Template(string.Template):
    delimiter = "@"  # shells have the dollar


def _slice(run: Run) -> dict[str, object]:
    """What there is to say of a slice of TPUs."""
    if not run.workdir.startswith("gs://"):
        raise LaunchError(
            f"run {run.name!r}: workdir {run.workdir!r} is not what all hosts see, and is gone "
            "with them; take gs://BUCKET/..."
        )
    kind, _, shape = run.topology.partition(":")
    if kind not in TPUS or shape not in TPUS[kind].shapes:
        known = "; ".join(f"{name}: {', '.join(tpu.shapes)}" for name, tpu in TPUS.items())
        raise LaunchError(f"run {run.name!r}: no TPU slice {run.topology!r}; there are {known}")
    chips = math.prod(map(int, shape.split("x")))
    # Eight of a plane share a host where they are all; of more, four do.
    on_host = chips if chips <= 8 and shape in _PLANES else 4
    tpu = TPUS[kind]
    return {
        **dataclasses.asdict(tpu),
        "machine": tpu.machine.format(on_host),
        "shape": shape,
        "chips": on_host,
        "hosts": chips // on_host,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSet(_Target):
    """TPU slices on GKE, by the JobSet API.

    Attributes:
      image: container image with the repository as its working folder (launch/Dockerfile).
      namespace, service_account: Kubernetes'; the account needs access to the buckets.
      data_bucket: mounted at /data, read only; empty: none.
      spot: of capacity that may be taken away.
    """

    image: str
    namespace: str = "default"
    service_account: str = "default"
    data_bucket: str = ""
    spot: bool = False

    template, suffix, start = "jobset.yaml", ".yaml", "kubectl apply --filename="

    def fields(self, run: Run) -> dict[str, object]:
        command = ["python", "main.py", *run.flags]
        # JSON is YAML; Kubernetes itself replaces $(NAME), and $$ by a dollar.
        items = [json.dumps(it.replace("$", "$$"), ensure_ascii=False) for it in command]
        return {
            **_slice(run),
            "command": "\n".join(f"{20 * ' '}- {item}" for item in items),
            "codes": [PREEMPTED, *FINAL],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gcloud(_Target):
    """TPU VMs, by a script that runs where gcloud is logged in.

    Attributes:
      project, zone: Google Cloud's.
      data_bucket: mounted at /data of each host; empty: none.
      spot: of capacity that may be taken away.
    """

    project: str
    zone: str
    data_bucket: str = ""
    spot: bool = False

    template, suffix, start = "gcloud.sh", ".sh", "bash "

    def fields(self, run: Run) -> dict[str, object]:
        return _slice(run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm(_Target):
    """GPUs under Slurm, one process each.

    Attributes:
      time: limit of one start, as sbatch takes it; the job goes on in the next.
      partition, account: the cluster's; empty: the default.
      cpus_per_task: host cores of each process.
      python: of the environment, from the root of the repository.
    """

    time: str
    partition: str = ""
    account: str = ""
    cpus_per_task: int = 8
    python: str = ".venv/bin/python"

    template, suffix, start = "slurm.sh", ".sbatch", "sbatch "

    def fields(self, run: Run) -> dict[str, object]:
        shape = re.fullmatch(r"gpu:([1-9]\d{0,3})x([1-9]\d?)", run.topology)
        if not shape:
            raise LaunchError(
                f"run {run.name!r}: topology {run.topology!r} is not of Slurm's; gpu:NODESxGPUS is"
            )
        local = ("/tmp/", "/var/tmp/", "/dev/", "/run/")
        if not run.workdir.startswith(("gs://", "/")) or f"{run.workdir}/".startswith(local):
            raise LaunchError(
                f"run {run.name!r}: workdir {run.workdir!r} is not what all nodes see; take an "
                "absolute path on a shared file system, or gs://BUCKET/..."
            )
        return {"nodes": shape[1], "gpus": shape[2]}


TARGETS = {"jobset": JobSet, "gcloud": Gcloud, "slurm": Slurm}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of a command line that renders: the target, the settings of each, and the folder."""
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--out", required=True, help="folder of the files")
    settings = {field.name: field for it in TARGETS.values() for field in dataclasses.fields(it)}
    for name, field in settings.items():
        targets = [it for it, of in TARGETS.items() if name in of.__dataclass_fields__]
        kind = {"bool": {"action": "store_true"}, "int": {"type": int}}.get(field.type, {})
        parser.add_argument(
            f"--{name}", help=f"of {', '.join(targets)}", default=argparse.SUPPRESS, **kind
        )


def write(files: Mapping[str, str], target: str, out: str) -> None:
    """Writes rendered files into the folder `out`, and prints the command that launches each.

    Raises:
      LaunchError: where it cannot be written.
    """
    folder = pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
            print(f"{TARGETS[target].start}{folder / name}")
    except OSError as error:
        raise LaunchError(f"--out={out} cannot be written: {error.strerror}") from error


def render(runs: Iterable[Run], target: str, **settings: str | int | bool) -> dict[str, str]:
    """The files that launch runs, by name.

    Args:
      target: one of TARGETS.
      **settings: fields of the target's class.

    Raises:
      LaunchError: for runs or settings that would fail later, naming the value and what would do.
    """
    runs = list(runs)
    if target not in TARGETS:
        raise LaunchError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    fields = {field.name: field for field in dataclasses.fields(TARGETS[target])}
    for name, value in settings.items():
        if name not in fields:
            raise LaunchError(
                f"target {target} has no setting {name!r}; it has {', '.join(fields)}"
            )
        if isinstance(value, str) and not re.fullmatch(r"[\w./:@,+-]*", value, re.ASCII):
            raise LaunchError(f"{name}={value!r} has characters that no such name has")
        if isinstance(value, int) and value < 0:
            raise LaunchError(f"{name}={value} must not be negative")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and not settings.get(name)
    ]
    if missing:
        raise LaunchError(f"target {target} needs {', '.join(missing)}")
    check_runs(runs)
    chosen = TARGETS[target](**settings)
    return {run.name + chosen.suffix: chosen.render(run) for run in runs}

"""What a run says of itself: before its first step, and in its summary."""

from __future__ import annotations

import json
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from ml_collections import ConfigDict

from halonet import metrics as metrics_lib
from halonet import optim, runtime
from halonet.progress import Progress

# Of the last start: the step's compilation, and the process up to its first step.
STARTUP = ("perf/compile_seconds", "perf/startup_seconds")
# What a run's time goes on, by what the watchdog hears of.
SPENT = {
    "startup": ("starting",),
    "compile": ("compiling the step", "waiting for the others to compile"),
    "data_wait": ("waiting for data",),
    "step": ("waiting for the devices",),
    "checkpoint": ("saving a checkpoint",),
    "evaluation": ("evaluating", "waiting for data, evaluating", "drawing predictions"),
}


def introduce(
    progress: Progress,
    config: ConfigDict,
    workdir: epath.Path,
    params: Any,
    mesh: jax.sharding.Mesh,
    *,
    start: int,
    total: int,
) -> None:
    """Says what is about to happen, and writes the full table of parameters."""
    table = {top: parameter_overview.count_parameters(tree) for top, tree in sorted(params.items())}
    width = max(map(len, table))
    for top, count in table.items():
        progress.say(f"  {top:<{width}} {count:>12,}")
    progress.say(f"  {'parameters':<{width}} {sum(table.values()):>12,}")
    if jax.process_index() == 0:
        overview = parameter_overview.get_parameter_overview(params, include_stats=False)
        (workdir / "parameters.txt").write_text(overview + "\n")
    progress.say(
        f"training {config.model.name} on {config.data.name}: steps {start + 1} to {total}, "
        f"{config.data.batch_size} images each, on {mesh.size} {jax.default_backend()} device(s), "
        f"into {workdir}"
    )
    kind = mesh.devices.flat[0].device_kind
    if kind not in runtime.PEAK_FLOPS and jax.default_backend() != "cpu":
        progress.say(f"no perf/mfu: the peak of a {kind!r} is not in halonet.runtime.PEAK_FLOPS")
    rate, base = config.optim.learning_rate, config.optim.base_batch
    if base:
        batch = config.data.batch_size
        peak = optim.scaled(rate, batch_size=batch, base_batch=base)
        progress.say(f"learning rate up to {peak:g} = {rate:g} * batch {batch} / {base}")
    if start:
        progress.say(f"going on from the checkpoint of step {start}")


def summarise(
    rows: list[metrics_lib.Row], total: int, params: Any, seconds: float
) -> dict[str, Any]:
    """What summary.json holds: the last evaluation, the best one, size and speed."""
    evaluations = [row for row in rows if "eval/top1" in row]
    best = metrics_lib.best_steps(rows, 1)[0]
    medians = {}
    for name in ("perf/images_per_second", "perf/data_wait", "perf/mfu"):
        if values := sorted(row[name] for row in rows if name in row):
            medians[name] = values[len(values) // 2]
    return {
        "step": total,
        **{name: value for name, value in evaluations[-1].items() if name.startswith("eval/")},
        "best/step": best,
        "best/top1": max(row["eval/top1"] for row in evaluations if row["step"] == best),
        "parameters": int(parameter_overview.count_parameters(params)),
        **medians,
        **{name: row[name] for row in rows for name in STARTUP if name in row},
        "perf/seconds": seconds,
    }


def read_summary(workdir: epath.Path) -> dict[str, Any]:
    """summary.json; {} where there is none that can be read: the run has not ended then."""
    try:
        return json.loads((workdir / "summary.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def say_result(summary: dict[str, Any], workdir: epath.Path, what: str) -> None:
    if jax.process_index() != 0:
        return
    notes = {"damaged": "images stood for damaged ones", "skipped": "steps were passed over"}
    print(
        f"\n{workdir} {what}: held-out top-1 {100 * summary['eval/top1']:.2f} % of "
        f"{summary['eval/count']:.0f} after {summary['step']} steps "
        f"(best {100 * summary['best/top1']:.2f} % at step {summary['best/step']}); "
        f"{summary['perf/images_per_second']:,.0f} images/s"
        + "".join(f"; {summary[name]} {note}" for name, note in notes.items() if summary.get(name))
    )
    if "goodput/seconds" in summary:  # not in those of older versions
        names = [name for name in (*SPENT, "lost") if summary.get(f"goodput/{name}", 0) >= 0.005]
        shares = ", ".join(f"{name} {summary[f'goodput/{name}']:.0%}" for name in names)
        starts = summary["goodput/starts"]
        print(
            f"  {summary['goodput/seconds']:,.0f} s in {starts} start{'s'[: starts > 1]}: {shares}"
        )
    print(
        f"  {workdir}/curves.png, predictions.png, summary.json, metrics.jsonl, tensorboard/\n"
        f'  in Python: run = halonet.load_run("{workdir}")'
    )

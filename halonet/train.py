"""The main job: config and workdir in, a trained model out. Read it from top to bottom."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import time
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from halonet import config as config_lib
from halonet import evaluate as evaluate_lib
from halonet import files, optim, plots, processes, recipe, run, runtime, sharding, steps
from halonet import metrics as metrics_lib
from halonet.checkpoint import (
    Checkpointer,
    abstract_on,
    newest_good_step,
    read_meta,
    restore_state,
    saved_steps,
    step_folder,
)
from halonet.data import device, pipeline
from halonet.data.damage import DamageCount
from halonet.data.errors import DataError
from halonet.models import HaloNet, cost, init_function
from halonet.progress import Progress

# Steps given to the devices ahead of the one whose result was last seen: enough to keep them busy,
# few enough that the batches waiting there stay small.
STEPS_IN_FLIGHT = 2
# Of the last start: the step's compilation, and the process up to its first step.
STARTUP = ("perf/compile_seconds", "perf/startup_seconds")


class NonFinite(FloatingPointError):
    """The loss is no number any more. The checkpoints are from before."""

    exit_code = 5


def train_and_evaluate(
    config: ConfigDict, workdir: epath.PathLike, *, force: bool = False
) -> dict[str, Any]:
    """Trains, or goes on with, the run in `workdir`, and returns its summary.

    Args:
      config: as configs/default.py declares it.
      workdir: the run's folder; may be gs://.
      force: takes the workdir from another run that holds it.

    Raises:
      ConfigError, DataError: before anything compiles, in one line.
      LockedError: where another run holds the workdir.
      CheckpointError: where a checkpoint cannot be restored.
      Interrupted: after a SIGTERM or Ctrl-C, the state being saved.
      NonFinite: where the loss is no longer finite.
    """
    began = time.perf_counter()
    workdir = epath.Path(workdir)
    primary = jax.process_index() == 0

    # Data, model and mesh: everything that can be refused is refused here.
    train_source = evaluate_lib.open_split(config, config.data.train_split)
    eval_source = evaluate_lib.open_split(config, config.data.eval_split)
    model = config_lib.validate(config, num_classes=len(train_source.classes))
    mesh = evaluate_lib.make_mesh(config)
    config_lib.check_workdir(config, workdir)
    total = config_lib.total_steps(config, len(train_source))
    meta = {
        "data": {"train": train_source.fingerprint, "eval": eval_source.fingerprint},
        "classes": list(train_source.classes),
    }
    # Process 0 decides for all: a folder seen late by one of them would set them apart.
    summary = _read_summary(workdir) if max(saved_steps(workdir), default=0) == total else {}
    if processes.agreed(lambda: bool(summary)):
        _say_result(summary, workdir, "has ended already")
        return summary
    with contextlib.ExitStack() as closing:
        watchdog = closing.enter_context(runtime.Watchdog(config.train.hang_seconds))
        watchdog.at("opening the workdir")
        lock = runtime.WorkdirLock(workdir, force=force, enabled=primary)

        def open_workdir() -> int:
            closing.enter_context(lock)
            return newest_good_step(workdir, print)

        start = processes.agreed(open_workdir)
        watchdog.at("starting")
        saved_meta = read_meta(step_folder(workdir, start)) if start else {}
        if start:
            _check_same_data(saved_meta, meta, workdir)
        multihost_utils.sync_global_devices("every process has read the workdir")

        # The state, abstract first: its shardings are known before any array exists.
        schedule = recipe.schedule(config, total)
        tx = recipe.optimizer(config, schedule)
        init = functools.partial(
            sharding.seeing(mesh, steps.init_state),
            init_fn=init_function(model, config.init.scheme),
            tx=tx,
            image_size=config.data.image_size,
            ema=config.train.ema_decay > 0,
        )
        key = jax.random.key(config.seed)
        abstract_state = jax.eval_shape(init, key)
        shardings = sharding.state_shardings(abstract_state, mesh)

        # Start, from weights where the configuration names some, or go on from a checkpoint.
        placed_state, said = abstract_on(abstract_state, shardings), []
        if start:
            state = restore_state(workdir, start, placed_state)
        elif config.init.weights:
            variables, said = run.initial_variables(config, model, placed_state)
            state = steps.start_from(jax.jit(init, out_shardings=shardings)(key), variables)
        else:
            state = jax.jit(init, out_shardings=shardings)(key)
        # Not before: weights that are refused leave the workdir to the next attempt.
        if primary:
            config_lib.save_config(config, workdir)
        log = metrics_lib.MetricsLog(workdir, start_step=start, primary=primary)
        closing.callback(log.close)
        checkpointer = Checkpointer(
            workdir,
            keep_latest=config.checkpoint.keep_latest,
            best_steps=lambda: metrics_lib.best_steps(log.rows(), config.checkpoint.keep_best),
        )
        closing.callback(checkpointer.close)

        batches = device.Prefetcher(
            pipeline.train_batches(
                train_source,
                batch_size=config.data.batch_size,
                seed=config.seed,
                start_step=start,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                augment=config_lib.random_view(config),
                repeats=config.augment.repeats,
                replace_damaged=config.data.damaged == "skip",
                threads=config.data.threads,
                workers=config.data.workers,
            ),
            sharding.batch_sharding(mesh),
        )
        closing.callback(batches.close)
        train_step = jax.jit(
            recipe.train_step(config, model, tx, schedule, mesh),
            donate_argnums=0,
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        eval_step = evaluate_lib.make_eval_step(model, config, mesh)
        profile = _profiler(workdir, start) if config.log.profile else None
        damage = DamageCount(
            limit=config.data.damaged_limit,
            batch_size=config.data.batch_size,
            examples=len(train_source),
            start_step=start,
            # Not in the checkpoints of older versions.
            before=saved_meta.get("damaged", {}),
        )
        progress = Progress(
            total=total,
            start=start,
            images_per_step=config.data.batch_size,
            ideal_seconds=_ideal_seconds(model, config.data.image_size, mesh),
            enabled=primary,
        )

        def record(step: int, metrics: steps.Metrics, *, write: bool = True) -> None:
            """Writes the row of one step, having looked that its numbers are some."""
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            count = values.pop("count")
            values |= {name: values[name] / count for name in ("loss", "top1")}
            for name in ("loss", "grad_norm"):
                if not math.isfinite(values[name]):
                    raise NonFinite(
                        f"the {name} of step {step} is {values[name]}; the checkpoints in "
                        f"{workdir} are from before; a smaller optim.learning_rate or "
                        "optim.clip_norm may help"
                    )
            if not write:
                return
            row = {f"train/{name}": value for name, value in values.items()}
            row |= progress.rates(step, batches.wait_seconds)
            log.write(step, row)
            progress.show(step, row)

        def evaluate(step: int) -> None:
            """Scores the averaged weights, where they are kept, and writes the row."""
            started = time.perf_counter()
            variables = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
            scores = evaluate_lib.evaluate(
                eval_step,
                variables,
                watchdog.over("evaluating", evaluate_lib.eval_batches(config, eval_source, mesh)),
            )
            seconds = time.perf_counter() - started
            row = {f"eval/{name}": value for name, value in scores.items()}
            log.write(step, {**row, "perf/eval_seconds": seconds})
            progress.pause(seconds)
            progress.say(
                f"step {step}: held-out top-1 {100 * scores['top1']:.2f} %, "
                f"loss {scores['loss']:.4f}"
            )

        def eval_due(step: int) -> bool:
            return step == total or step % config.eval.every_steps == 0

        def evaluated() -> bool:
            return any(row["step"] == start and "eval/top1" in row for row in log.rows())

        for line in said:
            progress.say(line)
        _introduce(progress, config, workdir, abstract_state.params, mesh, start=start, total=total)
        stop = closing.enter_context(runtime.StopSignal(enabled=jax.process_count() == 1))
        # Compiled once and for all: a batch of another shape would be an error, not a compilation.
        watchdog.at("compiling the step")
        progress.say("compiling the step (kept for later starts)")
        started = time.perf_counter()
        train_step = train_step.lower(state, recipe.abstract_batch(config, mesh)).compile()
        seconds = time.perf_counter() - started
        progress.say(f"compiled the step in {seconds:.0f} s")
        progress.pause(seconds)
        if start and eval_due(start) and not processes.agreed(evaluated):
            evaluate(start)
        in_flight: collections.deque[steps.Metrics] = collections.deque()
        unrecorded = None
        for step in range(start + 1, total + 1):
            watchdog.at("waiting for data")
            batch = next(batches)
            watchdog.at("waiting for the devices")
            state, metrics = train_step(state, batch)
            # From here on the devices have work: what earlier steps returned may be read.
            if step == start + 1:
                measured = (seconds, runtime.process_seconds())
                log.write(start, dict(zip(STARTUP, measured, strict=True)))
            if unrecorded:
                record(*unrecorded)
            in_flight.append(metrics)
            if len(in_flight) > STEPS_IN_FLIGHT:
                seen = in_flight.popleft()
                seen["loss"].block_until_ready()
                damage.add(int(seen.get("damaged", 0)))
            checkpointer.check_errors()
            lock.check()
            if profile:
                profile(step)

            stopping = stop.name
            if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
                stopping = "a preemption notice"
            save = eval_due(step) or step % config.checkpoint.every_steps == 0
            # Stopping adds no row: the history stays that of an undisturbed run.
            row_due = save or step % config.log.every_steps == 0
            unrecorded = (step, metrics) if row_due else None
            if save or stopping:
                # A checkpoint never knows more than the record: its row is written first.
                record(step, metrics, write=row_due)
                unrecorded = None
                for seen in in_flight:
                    damage.add(int(seen.get("damaged", 0)))
                in_flight.clear()
                watchdog.at("saving a checkpoint")
                checkpointer.save(step, state, {**meta, "damaged": damage.counted()})
            if eval_due(step):
                evaluate(step)
            if stopping and step < total:
                raise runtime.Interrupted(
                    f"{stopping} at step {step} of {total}: saved; the same command goes on"
                )
        watchdog.at("waiting for the checkpoint")
        checkpointer.wait()
        watchdog.at("drawing predictions")
        variables = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
        evaluate_lib.draw_predictions(
            evaluate_lib.make_predict_step(model, config, mesh),
            variables,
            eval_source,
            workdir / "predictions.png",
            config=config,
            mesh=mesh,
        )
        summary = _summarise(log.rows(), total, abstract_state.params, time.perf_counter() - began)
        if config.data.damaged == "skip":
            summary["damaged"] = damage.counted()["total"]
        if primary:
            log.finish()
            plots.learning_curves(log.rows(), workdir / "curves.png")
            text = json.dumps(summary, indent=2) + "\n"
            files.write_whole(workdir / "summary.json", text)
            _say_result(summary, workdir, "is done")
        return summary


def _ideal_seconds(model: HaloNet, size: int, mesh: jax.sharding.Mesh) -> float:
    """Seconds of a training step for one image, were all devices at their peak; 0: not known."""
    peak = runtime.PEAK_FLOPS.get(mesh.devices.flat[0].device_kind, 0.0)
    multiply_adds = sum(part.cost.total for part in cost.cost(model, size, size))
    # The backward pass multiplies twice as much; what is computed again (remat) does not count.
    return 3 * 2 * multiply_adds / (peak * mesh.size) if peak else 0.0


def _check_same_data(saved: dict[str, Any], now: dict[str, Any], workdir: epath.Path) -> None:
    """Refuses to go on with a run on other data: its order and its numbers would be another's."""
    for split, fingerprint in now["data"].items():
        if saved["data"][split] != fingerprint:
            raise DataError(
                f"the {split} data of the run in {workdir} was {saved['data'][split]} and is "
                f"{fingerprint} now; restore that data or take another --workdir"
            )


def _profiler(workdir: epath.Path, start: int):
    """A trace of five steps, from the tenth of this start on, beside the TensorBoard events."""
    from clu import periodic_actions

    return periodic_actions.Profile(
        logdir=str(workdir / metrics_lib.EVENTS),
        first_profile=start + 10,
        num_profile_steps=5,
        profile_duration_ms=0,
        every_secs=None,
    )


def _introduce(
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


def _summarise(
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


def _read_summary(workdir: epath.Path) -> dict[str, Any]:
    """summary.json; {} where there is none that can be read: the run has not ended then."""
    try:
        return json.loads((workdir / "summary.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _say_result(summary: dict[str, Any], workdir: epath.Path, what: str) -> None:
    if jax.process_index() == 0:
        print(
            f"\n{workdir} {what}: held-out top-1 {100 * summary['eval/top1']:.2f} % of "
            f"{summary['eval/count']:.0f} after {summary['step']} steps "
            f"(best {100 * summary['best/top1']:.2f} % at step {summary['best/step']}); "
            f"{summary['perf/images_per_second']:,.0f} images/s, "
            f"{summary['perf/seconds']:.0f} s since its last start"
            + (f"; {n} images stood for damaged ones" if (n := summary.get("damaged")) else "")
            + f"\n"
            f"  {workdir}/curves.png, predictions.png, summary.json, metrics.jsonl, tensorboard/\n"
            f'  in Python: run = halonet.load_run("{workdir}")'
        )

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
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from halonet import config as config_lib
from halonet import evaluate as evaluate_lib
from halonet import (
    files,
    health,
    plots,
    processes,
    recipe,
    report,
    run,
    runtime,
    sharding,
    steps,
)
from halonet import metrics as metrics_lib
from halonet.checkpoint import (
    Checkpointer,
    abstract_on,
    differing_arrays,
    newest_good_step,
    read_meta,
    restore_state,
    saved_steps,
    step_folder,
)
from halonet.data import device, pipeline
from halonet.data.damage import DamageCount
from halonet.data.errors import DataError
from halonet.models import cost
from halonet.progress import Progress

# Steps given to the devices ahead of the one whose result was last seen: enough to keep them busy,
# few enough that the batches waiting there stay small.
STEPS_IN_FLIGHT = 2
# What may differ between the processes of a run: what each of them has of its own.
OF_A_PROCESS = ("data.data_dir", "data.threads", "data.workers")


def train_and_evaluate(
    config: ConfigDict, workdir: epath.PathLike, *, force: bool = False, began: float = 0.0
) -> dict[str, Any]:
    """Trains, or goes on with, the run in `workdir`, and returns its summary.

    Args:
      config: as configs/default.py declares it.
      workdir: the run's folder; may be gs://.
      force: takes the workdir from another run that holds it.
      began: when this start did, in seconds since 1970; 0: now.

    Raises:
      ConfigError, DataError, UnreachableError: before anything compiles, in one line.
      DistributedError, MissingError: where the processes are not of one run, or not all there.
      LockedError: where another run holds the workdir.
      CheckpointError: where a checkpoint is damaged or of another run.
      SaveError, WriteError: where one, or another file, cannot be written.
      Interrupted: after a SIGTERM or Ctrl-C, the state being saved.
      NonFinite: where loss, gradient or state is no longer finite.
      OutOfMemory: where devices or host have too little.
    """
    began = began or time.time()
    files.check_reachable("--workdir", workdir)
    workdir = epath.Path(workdir)
    primary = jax.process_index() == 0
    # A little before the watchdog, which names nobody.
    patience = 0.8 * config.train.hang_seconds or 86_400.0

    # Data, model and mesh: everything that can be refused is refused here.
    train_source = evaluate_lib.open_split(config, config.data.train_split)
    eval_source = evaluate_lib.open_split(config, config.data.eval_split)
    model = config_lib.validate(config, num_classes=len(train_source.classes))
    mesh = evaluate_lib.make_mesh(config)
    total = config_lib.total_steps(config, len(train_source))
    meta = {
        "data": {"train": train_source.fingerprint, "eval": eval_source.fingerprint},
        "classes": list(train_source.classes),
    }
    flat = config_lib.flatten(config)
    settings = {f"config.{key}": flat[key] for key in flat if key not in OF_A_PROCESS}
    code = runtime.versions()
    if version := runtime.code_version():
        code["code"] = version
    processes.check_alike({"--workdir": str(workdir), **settings, **meta, **code}, patience)

    # The state, abstract first: its arrays and shardings are known before any exists.
    schedule = recipe.schedule(config, total)
    tx = recipe.optimizer(config, schedule)
    init = recipe.init_state(config, model, tx, mesh)
    key = jax.random.key(config.seed)
    abstract_state = jax.eval_shape(init, key)
    config_lib.check_workdir(
        config, workdir, functools.partial(differing_arrays, workdir, abstract_state)
    )
    # Process 0 decides for all: a folder seen late by one of them would set them apart.
    summary = report.read_summary(workdir) if max(saved_steps(workdir), default=0) == total else {}
    if processes.agreed(lambda: bool(summary), patience):
        report.say_result(summary, workdir, "has ended already")
        return summary
    with contextlib.ExitStack() as closing:
        watchdog = runtime.Watchdog(config.train.hang_seconds, before=time.time() - began)
        closing.enter_context(watchdog)
        closing.enter_context(health.explained(flat, mesh.size, abstract_state.params))
        stop = closing.enter_context(runtime.StopSignal(alone=jax.process_count() == 1))
        lock = runtime.WorkdirLock(workdir, force=force, enabled=primary)

        def open_workdir() -> int:
            closing.enter_context(lock)
            return newest_good_step(workdir, print)

        start = processes.agreed(open_workdir, patience)
        saved_meta = read_meta(step_folder(workdir, start)) if start else {}
        if start:
            _check_same_data(saved_meta, meta, workdir)
        # Which code came to this state, all starts together; {}: an older version kept no record.
        made_by = saved_meta.get("made_by", [{}]) if start else []
        made_by += [code] if code not in made_by else []
        processes.meet("reading the workdir", patience)

        # Start, from weights where the configuration names some, or go on from a checkpoint.
        shardings = sharding.state_shardings(abstract_state, mesh)
        placed_state, said = abstract_on(abstract_state, shardings), []
        if start:
            state = restore_state(workdir, start, placed_state)
        elif config.init.weights:
            variables, said = run.initial_variables(config, model, placed_state)
            state = steps.start_from(jax.jit(init, out_shardings=shardings)(key), variables)
        else:
            state = jax.jit(init, out_shardings=shardings)(key)
        finite = health.FiniteCheck(
            limit=config.train.skip_nonfinite,
            workdir=workdir,
            mesh=mesh,
            before=saved_meta.get("skipped", 0),
        )
        finite.state(start, state)
        # Before the first file is written: it makes room, of a save that came to nothing.
        checkpointer = Checkpointer(
            workdir,
            keep_latest=config.checkpoint.keep_latest,
            best_steps=lambda: metrics_lib.best_steps(log.rows(), config.checkpoint.keep_best),
        )
        closing.callback(checkpointer.close)
        # Not before: weights that are refused leave the workdir to the next attempt.
        if primary:
            config_lib.save_config(config, workdir)
        log = metrics_lib.MetricsLog(workdir, start_step=start, primary=primary, began=began)
        closing.callback(log.close)

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
            functools.partial(sharding.batch_sharding, mesh),
        )
        closing.callback(batches.close)
        train_step = recipe.jitted_train_step(config, model, tx, schedule, mesh, shardings)
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
        size, kind = config.data.image_size, mesh.devices.flat[0].device_kind
        multiply_adds = sum(part.cost.total for part in cost.cost(model, size, size))
        progress = Progress(
            total=total,
            start=start,
            images_per_step=config.data.batch_size,
            ideal_seconds=_ideal_seconds(multiply_adds, mesh),
            enabled=primary,
        )

        def settle(step: int, metrics: steps.Metrics, row_due: bool) -> None:
            """Waits for a step, looks at its numbers, and writes its row where one is due."""
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            finite.step(step, values)
            damage.add(int(values.get("damaged", 0)))
            if not row_due:
                return
            count = values.pop("count")
            values |= {name: values[name] / count for name in ("loss", "top1")}
            if config.train.skip_nonfinite:
                values["skipped"] = finite.skipped
            # The numbers of a step that was passed over are none.
            row = {f"train/{name}": x for name, x in values.items() if math.isfinite(x)}
            row |= progress.rates(step, batches.wait_seconds)
            log.write(step, row)
            progress.show(step, row)

        def record_time(step: int) -> None:
            """Where the time of this start went, in a row of its own."""
            seconds = watchdog.seconds()
            log.write(
                step,
                {
                    metrics_lib.SPENT + name: sum(seconds[phase] for phase in phases)
                    for name, phases in report.SPENT.items()
                },
            )

        def evaluate(step: int) -> None:
            """Scores the averaged weights, where they are kept, and writes the row."""
            watchdog.at("waiting for data, evaluating")
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
        report.introduce(
            progress, config, workdir, abstract_state.params, mesh, start=start, total=total
        )
        # Compiled once and for all: a batch of another shape would be an error, not a compilation.
        watchdog.at("compiling the step")
        progress.say("compiling the step (kept for later starts)")
        started = time.perf_counter()
        train_step = train_step.lower(state, recipe.abstract_batch(config, mesh)).compile()
        seconds = time.perf_counter() - started
        progress.say(f"compiled the step in {seconds:.0f} s")
        progress.pause(seconds)
        # One may have found it in its cache; Gloo gives the others 30 s to come to the first step.
        watchdog.at("waiting for the others to compile")
        processes.meet("the compiled step", patience)
        if start and eval_due(start) and not processes.agreed(evaluated, patience):
            evaluate(start)
        if stop.name:
            raise runtime.Interrupted(f"{stop.name} before step {start + 1}: nothing to save")
        in_flight: collections.deque[tuple[int, steps.Metrics, bool]] = collections.deque()
        for step in range(start + 1, total + 1):
            watchdog.at("waiting for data")
            batch = next(batches)
            watchdog.at("waiting for the devices")
            state, metrics = train_step(state, batch)
            # From here on the devices have work: what earlier steps returned may be read.
            if step == start + 1:
                measured = (seconds, runtime.process_seconds())
                log.write(start, dict(zip(report.STARTUP, measured, strict=True)))
            save = eval_due(step) or step % config.checkpoint.every_steps == 0
            # Stopping adds no row: the history stays that of an undisturbed run.
            in_flight.append((step, metrics, save or step % config.log.every_steps == 0))
            if len(in_flight) > STEPS_IN_FLIGHT:
                settle(*in_flight.popleft())
            checkpointer.check_errors()
            lock.check()
            if profile:
                profile(step)

            stopping = stop.name
            # By the steps of this start: a notice before the first is for number 1, and no other.
            if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
                step - start
            ):
                stopping = "a preemption notice"
            if save or stopping:
                # A checkpoint never knows more than the record: its row is written first.
                while in_flight:
                    settle(*in_flight.popleft())
                watchdog.at("saving a checkpoint")
                finite.state(step, state)
                counts = {"damaged": damage.counted(), "skipped": finite.skipped}
                checkpointer.save(step, state, {**meta, **counts, "made_by": made_by})
                if stopping:
                    checkpointer.wait()
                record_time(step)
            if eval_due(step):
                evaluate(step)
            if stopping and step < total:
                raise runtime.Interrupted(
                    f"{stopping} at step {step} of {total}: saved; the same command goes on"
                )
        watchdog.at("saving a checkpoint")
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
        record_time(total)
        ended = time.time()
        summary = report.summarise(log.rows(), total, abstract_state.params, ended - began)
        summary |= {"multiply_adds": multiply_adds, "devices": f"{mesh.size} {kind}"}
        summary["made_by"] = made_by
        if config.data.damaged == "skip":
            summary["damaged"] = damage.counted()["total"]
        if config.train.skip_nonfinite:
            summary["skipped"] = finite.skipped
        if primary:
            summary |= metrics_lib.goodput(workdir, ended)
            log.finish()
            plots.learning_curves(log.rows(), workdir / "curves.png")
            text = json.dumps(summary, indent=2) + "\n"
            files.write_whole(workdir / "summary.json", text)
            report.say_result(summary, workdir, "is done")
        return summary


def _ideal_seconds(multiply_adds: int, mesh: jax.sharding.Mesh) -> float:
    """Seconds of a training step for one image, were all devices at their peak; 0: not known."""
    peak = runtime.PEAK_FLOPS.get(mesh.devices.flat[0].device_kind, 0.0)
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

"""Evaluation: sums over a split in which every example counts exactly once."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from halonet import plots, sharding, steps
from halonet.config import (
    ConfigError,
    center_view,
    check_devices,
    check_image_size,
    check_values,
    model_overrides,
    with_view_of,
)
from halonet.data import device, pipeline, sources
from halonet.models import HaloNet
from halonet.run import load_run


def open_split(config: ConfigDict, split: str) -> sources.Source:
    """A split of the data set that a configuration names.

    Raises:
      DataError: where the data is not there.
      ConfigError: where its name or size makes no sense.
    """
    try:
        return sources.open_source(
            config.data.name,
            split,
            data_dir=config.data.data_dir,
            image_size=config.data.image_size,
        )
    except sources.DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh that a configuration asks for.

    Raises:
      ConfigError: where it does not fit the devices.
    """
    try:
        return sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error


def make_eval_step(model: HaloNet, config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable:
    """The compiled step: (variables, batch) -> sums over the batch."""
    step = sharding.seeing(mesh, steps.eval_step)
    return jax.jit(functools.partial(step, **_apply_and_scale(model, config)))


def make_predict_step(model: HaloNet, config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable:
    """The compiled step: (variables, images) -> logits, on every device."""
    step = sharding.seeing(mesh, steps.predict_step)
    return jax.jit(
        functools.partial(step, **_apply_and_scale(model, config)),
        out_shardings=sharding.replicated(mesh),
    )


def _apply_and_scale(model: HaloNet, config: ConfigDict) -> dict[str, Any]:
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    return {"apply_fn": model.apply, "mean": mean, "std": std}


def eval_batches(
    config: ConfigDict, source: sources.Source, mesh: jax.sharding.Mesh
) -> device.Prefetcher:
    """The split as global batches on the devices, the last one padded and masked."""
    batches = pipeline.eval_batches(
        source,
        batch_size=config.eval.batch_size,
        view=center_view(config),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
        workers=config.data.workers,
    )
    return device.Prefetcher(batches, sharding.batch_sharding(mesh))


def evaluate(eval_step: Callable, variables: dict[str, Any], batches: Iterable) -> dict[str, float]:
    """Scores a split.

    Returns:
      "loss" (nats), "top1" and "top5" (fractions), and "count", the examples scored.
    """
    total: dict[str, float] = {}
    previous = None

    def add(sums: dict[str, jax.Array]) -> None:
        for name, value in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + float(value)

    for batch in batches:
        sums = eval_step(variables, batch)
        # One batch late: the device always has the next one to work on.
        if previous is not None:
            add(previous)
        previous = sums
    add(previous)
    count = total.pop("count")
    return {**{name: value / count for name, value in total.items()}, "count": count}


def draw_predictions(
    predict_step: Callable,
    variables: dict[str, Any],
    source: sources.Source,
    path: epath.PathLike,
    *,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    limit: int = 1000,
) -> None:
    """Writes the sheet of predictions over the first `limit` examples of a split.

    All processes take part; the first one draws.
    """
    logits = []
    for batch in eval_batches(config, source, mesh):
        logits.append(np.asarray(predict_step(variables, batch["image"])))
        if sum(map(len, logits)) >= min(limit, len(source)):
            break
    if jax.process_index() == 0:
        logits = np.concatenate(logits)[: min(limit, len(source))]
        examples = [source[index] for index in range(len(logits))]
        view = center_view(config)
        images = np.stack([view(example["image"]) for example in examples])
        labels = np.array([example["label"] for example in examples])
        plots.prediction_sheet(images, labels, logits, source.classes, path)


def wilson_interval(fraction: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a fraction of `count` independent trials; z=1.96 is 95 %."""
    centre = fraction + z * z / (2 * count)
    spread = z * math.sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def evaluate_checkpoint(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    step: str = "best",
    checkpoint: str = "",
    weights: str = "",
    chosen: Collection[str] = (),
) -> dict[str, Any]:
    """`--mode=evaluate`: scores a checkpoint on the evaluation split of `config`.

    Prints the result and writes it into `workdir` as evaluation.json.

    Args:
      config: names the data. The model is that of the checkpoint, but for what `config.model` sets
        besides its name: other windows or padding, say. Crop and interpolation are those of the
        checkpoint, too.
      workdir: the run, and where the result is written.
      step: "best", "latest" or a number.
      checkpoint: another run's folder, or one of its checkpoints, instead of `workdir`'s.
      weights: "ema", "raw", or "" for the averages where they were kept.
      chosen: keys of `config` that count all the same, such as "data.crop_pct".
    """
    check_values(config)
    mesh = make_mesh(config)
    check_devices("eval.batch_size", config.eval.batch_size)
    source = open_split(config, config.data.eval_split)
    where = epath.Path(checkpoint or workdir)
    try:
        on = sharding.replicated(mesh)
        run = load_run(where, step, weights=weights, sharding=on, **model_overrides(config))
    except ValueError as error:
        if hasattr(error, "exit_code"):
            raise
        raise ConfigError(f"--mode=evaluate: {error}") from error
    if len(run.classes) != len(source.classes):
        raise sources.DataError(
            f"{where} has {len(run.classes)} classes and config.data.name={config.data.name} has "
            f"{len(source.classes)}; evaluate it on the data it was trained for"
        )
    check_image_size(run.model, config.data.image_size)
    # Seen and normalised as by the run, whatever data it is scored on.
    config = with_view_of(config, run.config, chosen)
    eval_step = make_eval_step(run.model, run.config, mesh)
    scores = evaluate(eval_step, run.variables, eval_batches(config, source, mesh))
    low, high = wilson_interval(scores["top1"], scores["count"])
    result = {
        "checkpoint": str(run.workdir),
        "step": run.step,
        "weights": run.weights,
        "data": f"{config.data.name}/{config.data.eval_split}",
        "image_size": config.data.image_size,
        "crop_pct": config.data.crop_pct,
        "interpolation": config.data.interpolation,
        "count": int(scores["count"]),
        "top1": scores["top1"],
        "top1_interval_95": [low, high],
        "top5": scores["top5"],
        "loss": scores["loss"],
    }
    if jax.process_index() == 0:
        path = epath.Path(workdir) / "evaluation.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(
            f"{run.workdir} step {run.step} ({run.weights} weights) on {result['data']}: "
            f"top-1 {100 * result['top1']:.2f} % (95 % interval {100 * low:.2f} to "
            f"{100 * high:.2f}), top-5 {100 * result['top5']:.2f} %, "
            f"{result['count']} examples\nwritten to {path}"
        )
    return result

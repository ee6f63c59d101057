"""Evaluation: sums over a split in which every example counts exactly once."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from halonet import files, health, plots, runtime, sharding, steps
from halonet.config import (
    ConfigError,
    center_view,
    check_devices,
    check_image_size,
    check_values,
    flatten,
    model_overrides,
    with_view_of,
)
from halonet.data import device, pipeline, sources
from halonet.models import HaloNet
from halonet.run import load_run

# More sets with ImageNet's classes: name and split in TFDS. ReaL is the validation split with all
# the labels that people found right (Beyer et al., 2020, arXiv 2006.07159): any of them is a hit,
# and images without one do not count. V2 is a second test set (Recht et al., 2019, 1902.10811).
SUITES = {
    "real": ("imagenet2012_real", "validation"),
    "v2": ("imagenet_v2/matched-frequency", "test"),
}


def open_split(config: ConfigDict, split: str, name: str = "") -> sources.Source:
    """A split of the data set that a configuration names, or of another in the same folder.

    Raises:
      DataError: where the data is not there.
      ConfigError: where its name or size makes no sense.
    """
    try:
        return sources.open_source(
            name or config.data.name,
            split,
            data_dir=config.data.data_dir,
            image_size=config.data.image_size,
        )
    except sources.DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh that a configuration asks for, of all devices if none are given.

    Raises:
      ConfigError: where it does not fit the devices.
    """
    try:
        return sharding.make_mesh(**config.mesh.to_dict(), devices=devices)
    except ValueError as error:
        raise ConfigError(f"config.{error}") from error


def make_eval_step(model: HaloNet, config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable:
    """The compiled step: (variables, batch) -> sums over the batch."""
    step = sharding.seeing(mesh, steps.eval_step)
    return jax.jit(functools.partial(step, **_apply_and_scale(model, config)))


def make_suite_step(model: HaloNet, config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable:
    """The compiled step: (variables, batch) -> the sums of `steps.suite_step`, on every device."""
    step = sharding.seeing(mesh, steps.suite_step)
    return jax.jit(
        functools.partial(step, **_apply_and_scale(model, config)),
        out_shardings=sharding.replicated(mesh),
    )


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
    return device.Prefetcher(batches, functools.partial(sharding.batch_sharding, mesh))


def evaluate(eval_step: Callable, variables: dict[str, Any], batches: Iterable) -> dict[str, float]:
    """Scores a split.

    Returns:
      "loss" (nats), "top1" and "top5" (fractions), and "count", the examples scored.
    """
    total = {name: float(value) for name, value in add_up(eval_step, variables, batches).items()}
    count = total.pop("count")
    return {**{name: value / count for name, value in total.items()}, "count": count}


def add_up(step: Callable, variables: dict[str, Any], batches: Iterable) -> dict[str, Any]:
    """What a step gives for each batch, added up in float64: whole numbers stay exact."""
    total: dict[str, Any] = {}
    previous = None

    def add(sums: dict[str, jax.Array]) -> None:
        for name, value in jax.device_get(sums).items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)

    for batch in batches:
        sums = step(variables, batch)
        # One batch late: the device always has the next one to work on.
        if previous is not None:
            add(previous)
        previous = sums
    add(previous)
    return total


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


def score(sums: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """What the sums of `steps.suite_step` over a split say, ready for JSON.

    Returns:
      "count"; "top1", "top5" (fractions) and "top1_interval_95"; "calibration_error", the expected
      one: the mean over the examples of how far the accuracy of their bin of confidence is from its
      mean confidence; "calibration" with the bins' "count", "top1" and "confidence" (0 of an empty
      bin); and unless labels are sets, "loss" (nats) and "classes": {name: {"hits", "count"}}.

    Source of the calibration error: Guo et al., 2017, arXiv 1706.04599, equation 3.
    """
    count = int(sums["count"])
    if count == 0:
        raise sources.DataError("no example has a label, so that there is nothing to score")
    counts = sums["bin_count"]
    accuracy, confidence = (
        np.divide(sums[name], counts, out=np.zeros_like(counts), where=counts > 0)
        for name in ("bin_top1", "bin_confidence")
    )
    top1 = float(sums["top1"]) / count
    scores = {
        "count": count,
        "top1": top1,
        "top1_interval_95": list(wilson_interval(top1, count)),
        "top5": float(sums["top5"]) / count,
        "calibration_error": float(counts @ np.abs(accuracy - confidence)) / count,
        "calibration": {
            "count": counts.astype(int).tolist(),
            "top1": accuracy.tolist(),
            "confidence": confidence.tolist(),
        },
    }
    if "loss" in sums:
        pairs = zip(sums["class_top1"].tolist(), sums["class_count"].tolist(), strict=True)
        each = [{"hits": int(hits), "count": int(total)} for hits, total in pairs]
        scores["loss"] = float(sums["loss"]) / count
        scores["classes"] = dict(zip(classes, each, strict=True))
    return scores


def evaluate_checkpoint(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    step: str = "best",
    checkpoint: str = "",
    weights: str = "",
    chosen: Collection[str] = (),
    suites: Sequence[str] = (),
) -> dict[str, Any]:
    """`--mode=evaluate`: scores a checkpoint on the evaluation split of `config`, and on others.

    Prints the result, writes it into `workdir` as evaluation.json, and draws reliability.png.

    Args:
      config: names the data. The model is that of the checkpoint, but for what `config.model` sets
        besides its name: other windows or padding, say. Crop and interpolation are those of the
        checkpoint, too.
      workdir: the run, and where the result is written.
      step: "best", "latest" or a number.
      checkpoint: another run's folder, or one of its checkpoints, instead of `workdir`'s.
      weights: "ema", "raw", or "" for the averages where they were kept.
      chosen: keys of `config` that count all the same, such as "data.crop_pct".
      suites: names of `SUITES`, scored as well, under "suites" in the result.
    """
    check_values(config)
    for flag, path in (("--workdir", workdir), ("--evaluate.checkpoint", checkpoint)):
        files.check_reachable(flag, path)
    for name in suites:
        if name not in SUITES:
            raise ConfigError(f"--evaluate.suites: {name!r} is not one of {', '.join(SUITES)}")
    mesh = make_mesh(config)
    check_devices("eval.batch_size", config.eval.batch_size, rows=config.mesh.rows)
    # All are opened before any is scored: what is missing is known at once.
    found = {"": open_split(config, config.data.eval_split)}
    found |= {
        name: open_split(config, split=SUITES[name][1], name=SUITES[name][0]) for name in suites
    }
    where = epath.Path(checkpoint or workdir)
    try:
        on = sharding.replicated(mesh)
        run = load_run(where, step, weights=weights, sharding=on, **model_overrides(config))
    except ValueError as error:
        if hasattr(error, "exit_code"):
            raise
        raise ConfigError(f"--mode=evaluate: {error}") from error
    for name, source in found.items():
        data = f"--evaluate.suites={name}" if name else f"config.data.name={config.data.name}"
        _check_classes(run.classes, source.classes, where, data)
    check_image_size(run.model, config.data.image_size, config.mesh.rows)
    # Seen and normalised as by the run, whatever data it is scored on.
    config = with_view_of(config, run.config, chosen)
    suite_step = make_suite_step(run.model, run.config, mesh)
    result = {
        "checkpoint": str(run.workdir),
        "step": run.step,
        "weights": run.weights,
        "code": runtime.code_version(),
        "versions": runtime.versions(),
        "devices": f"{mesh.size} {mesh.devices.flat[0].device_kind}",
        "config": run.config.to_dict(),
        "image_size": config.data.image_size,
        "crop_pct": config.data.crop_pct,
        "interpolation": config.data.interpolation,
        "model": model_overrides(config),
        "suites": {},
    }
    settings, params = flatten(config), run.variables["params"]
    for name, source in found.items():
        with health.explained(settings, mesh.size, params, "eval.batch_size"):
            sums = add_up(suite_step, run.variables, eval_batches(config, source, mesh))
        scores = {
            "data": f"{source.name}/{source.split}",
            "fingerprint": source.fingerprint,
            **score(sums, run.classes),
        }
        result |= scores if not name else {"suites": {**result["suites"], name: scores}}
        if jax.process_index() == 0:
            print(f"{run.workdir} step {run.step} ({run.weights} weights) on {_said(scores)}")
    if jax.process_index() == 0:
        path = epath.Path(workdir) / "evaluation.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps(result, indent=2) + "\n")
        picture = path.with_name("reliability.png")
        scored = [result, *result["suites"].values()]
        plots.reliability({it["data"]: it["calibration"] for it in scored}, picture)
        print(f"written to {path} and {picture}")
    return result


def _check_classes(
    ours: Sequence[str], theirs: Sequence[str], where: epath.Path, data: str
) -> None:
    """Raises DataError unless label i means the same to a run, `where`, and to `data`."""
    if len(ours) != len(theirs):
        raise sources.DataError(
            f"{where} has {len(ours)} classes and {data} has {len(theirs)}; "
            "evaluate it on the data it was trained for"
        )
    # Numbers are no names: of converted weights, say, or of data that only counts its classes.
    numbers = [str(label) for label in range(len(ours))]
    if numbers in (list(ours), list(theirs)):
        return
    for label, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            raise sources.DataError(
                f"class {label} of {where} is {our!r} and that of {data} is {their!r}; evaluate it "
                "on the data it was trained for, with the same names in the same order"
            )


def _said(scores: dict[str, Any], worst: int = 5) -> str:
    """The scores in a line or two."""
    low, high = scores["top1_interval_95"]
    text = (
        f"{scores['data']}: top-1 {100 * scores['top1']:.2f} % (95 % interval {100 * low:.2f} to "
        f"{100 * high:.2f}), top-5 {100 * scores['top5']:.2f} %, calibration error "
        f"{100 * scores['calibration_error']:.2f} %, {scores['count']} examples"
    )
    seen = [
        (it["hits"] / it["count"], name)
        for name, it in scores.get("classes", {}).items()
        if it["count"]
    ]
    if seen:
        listed = (f"{name} {100 * top1:.0f} %" for top1, name in sorted(seen)[:worst])
        text += f"\n  worst classes: {', '.join(listed)}"
    return text

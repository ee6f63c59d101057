"""`--mode=export`: a checkpoint as a program for other runtimes, compared with the model first.

An export is a folder: what its runtime reads, `export.json` with all that is known of it, and
`manifest.json` with the hash of each file. It is written beside its name, run there by a process of
its own over real images, and gets its name only if its logits are the model's within the bound.
`halonet.exported` opens it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from halonet import exported, files, runtime, steps
from halonet.checkpoint import read_meta, step_folder
from halonet.config import (
    ConfigError,
    center_view,
    check_image_size,
    check_values,
    model_overrides,
    with_view_of,
)
from halonet.data import transforms
from halonet.data.errors import DataError
from halonet.evaluate import open_split
from halonet.models import HaloNet
from halonet.models.convert import weights as timm_weights
from halonet.run import Run, load_run

# Whose instructions the programs of stablehlo and savedmodel hold.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# The attention in them: portable, and of any number of images. The other forms are of one platform,
# or loop over the images.
IMPLEMENTATION = "xla_shift"
# So many that two numbers of images are run, 8 and 1: the program is for any.
IMAGES = 2 * exported.BATCH + 1
# The largest difference of a logit, as a share of the largest logit. Rounding alone: the export
# runs other forms of the same sums, on the CPU, whatever the model ran on. By dtype of the model.
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}


def export_checkpoint(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    format: str,
    out: str,
    step: str = "best",
    checkpoint: str = "",
    weights: str = "",
    preprocess: str = "",
    chosen: Collection[str] = (),
) -> dict[str, Any]:
    """Writes an export of a checkpoint, and prints what it is.

    Args:
      config: its evaluation split gives the images of the comparison; where it is not there,
        scikit-learn's photographs do. What `config.model` sets besides its name counts, as in
        `evaluate_checkpoint`.
      workdir: the run.
      format: "stablehlo", "savedmodel" or "timm".
      out: the folder to write, which must not exist.
      step: "best", "latest" or a number.
      checkpoint: another run's folder, or one of its checkpoints, instead of `workdir`'s.
      weights: "ema", "raw", or "" for the averages where they were kept.
      preprocess: "inside", the export takes uint8 images of the model's size and normalises them;
        "outside", it takes what is normalised already; or "", inside where the format can.
      chosen: keys of `config` that count for what the model sees, such as "data.image_size"; all
        others are the run's.

    Returns:
      The metadata.

    Raises:
      ConfigError: for what cannot be exported so, with what could.
      ExportError: where the export does not compute what the model does; nothing stays of it.
    """
    check_values(config)
    for flag, path in (("--workdir", workdir), ("--export.checkpoint", checkpoint)):
        files.check_reachable(flag, path)
    folder = _checked_out(out)
    if preprocess == "inside" and format == "timm":
        raise ConfigError(
            "--export.preprocess=inside: timm's models take normalised images; leave it out"
        )
    inside = format != "timm" and preprocess != "outside"
    try:
        run = load_run(checkpoint or workdir, step, weights=weights, **model_overrides(config))
    except ValueError as error:
        if hasattr(error, "exit_code"):
            raise
        raise ConfigError(f"--mode=export: {error}") from error
    if format == "timm":
        timm_weights.check_origin(run.config.model.name, "timm")
        timm_weights.check_conventions(run.model, run.config.model.name)
    exported.check_runtime(format)
    config = with_view_of(config, run.config, chosen)
    if "data.image_size" not in chosen:
        config.data.image_size = run.config.data.image_size
    check_image_size(run.model, config.data.image_size)
    images, source = _real_images(config)

    metadata = _metadata(run, config, format, inside)
    normalised = transforms.normalize(images, **_mean_and_std(run))
    apply = jax.jit(functools.partial(run.model.apply, train=False))
    expected = np.asarray(apply(run.variables, normalised))
    with _part(folder) as part:
        _WRITERS[format](part, run, config, inside)
        _finish(part, metadata)
        found = _run_alone(part, images if inside else normalised)
        metadata["compared"] = {
            "images": len(images),
            "of": source,
            **_compare(found, expected, BOUNDS[jnp.dtype(run.model.dtype).name]),
        }
        _finish(part, metadata)
        part.rename(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{exported.described(metadata)}\nwritten to {folder}, {size / 1e6:.1f} MB")
    return metadata


def _checked_out(out: str) -> pathlib.Path:
    """The folder to write, which is not there yet."""
    if not out:
        raise ConfigError("no --export.out: the folder to write, which must not exist yet")
    if "://" in out:
        raise ConfigError(
            f"--export.out={out} must be a folder of this machine; copy it from there"
        )
    if pathlib.Path(out).exists():
        raise ConfigError(f"--export.out={out} is there already; take another, or remove it")
    return pathlib.Path(out)


def _mean_and_std(run: Run) -> dict[str, tuple[float, ...]]:
    return {"mean": tuple(run.config.data.mean), "std": tuple(run.config.data.std)}


def _metadata(run: Run, config: ConfigDict, format: str, inside: bool) -> dict[str, Any]:
    """What `export.json` says, but for the comparison."""
    size, packages = config.data.image_size, exported.RUNTIMES[format]
    first = format == "timm"  # channels
    pixels = [3, size, size] if first else [size, size, 3]
    seen = {key: config.data[key] for key in ("image_size", "crop_pct", "interpolation")}
    found = {
        "format": format,
        "format_version": exported.FORMAT_VERSION,
        "model": run.config.model.name,
        "overrides": model_overrides(config),
        "classes": list(run.classes),
        "input": {
            "name": "images",
            "shape": ["batch", *pixels],
            "dtype": "uint8" if inside else "float32",
        },
        "output": {"name": "logits", "shape": ["batch", len(run.classes)], "dtype": "float32"},
        "preprocessing": {"where": "inside" if inside else "outside", **seen, **_mean_and_std(run)},
        "platforms": [] if format == "timm" else list(PLATFORMS),
        "checkpoint": {"workdir": str(run.workdir), "step": run.step, "weights": run.weights},
        "config": run.config.to_dict(),
        "code": runtime.code_version(),
        "versions": runtime.versions() | {it: _version(it) for it in packages},
    }
    return json.loads(json.dumps(found))  # as it will be read


def _version(module: str) -> str:
    """Of the package that a module is of: tensorflow may be tensorflow-cpu."""
    names = importlib.metadata.packages_distributions().get(module, [module])
    return importlib.metadata.version(names[0])


def _real_images(config: ConfigDict) -> tuple[np.ndarray, str]:
    """Images as the model sees them, uint8 (N, size, size, 3), and what they are of."""
    view = center_view(config)
    try:
        source = open_split(config, config.data.eval_split)
    except DataError as error:
        print(f"{error}; the export is compared on scikit-learn's photographs")
        return np.stack([view(picture) for picture in _photographs()]), "scikit-learn's photographs"
    numbers = np.linspace(0, len(source) - 1, IMAGES).astype(int).tolist()
    images = np.stack([view(source[number]["image"]) for number in numbers])
    return images, f"{source.name}/{source.split}"


def _photographs() -> Iterator[np.ndarray]:
    """Parts of the two that scikit-learn brings, uint8, three quarters as high and as wide."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    for number in range(IMAGES):
        picture, place = pictures[number % 2], number // 2
        height, width = picture.shape[0] // 4, picture.shape[1] // 4
        top, left = height * (place % 3) // 2, width * (place // 3) // 2
        yield picture[top : top + 3 * height, left : left + 3 * width]


@contextlib.contextmanager
def _part(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside the one to write, of which nothing is left at the end, whatever happens.

    What a kill left of an earlier export goes, too.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.iterdir():
            name, _, number = left.name.removesuffix(".part").rpartition(".")
            if left.suffix == ".part" and name == folder.name and not _runs(number):
                shutil.rmtree(left)
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        part.mkdir()
        yield part
    except OSError as error:
        raise files.WriteError(folder, error) from error
    finally:
        shutil.rmtree(folder.with_name(f"{folder.name}.{os.getpid()}.part"), ignore_errors=True)


def _runs(process: str) -> bool:
    """Whether there is a process of that number here."""
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):  # no number, or another's
        return True
    return True


def _finish(part: pathlib.Path, metadata: dict[str, Any]) -> None:
    (part / exported.METADATA).write_text(json.dumps(metadata, indent=2) + "\n")
    files.write_manifest(part)


def _run_alone(part: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """The logits of an export, opened as a user would, by a process that knows nothing of this one.

    On the CPU: an accelerator is this process's own.
    """
    root = pathlib.Path(__file__).parent.parent
    variables = {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        given, made = (os.path.join(scratch, name) for name in ("images.npy", "logits.npy"))
        np.save(given, images)
        done = subprocess.run(
            [
                *(sys.executable, "-m", "halonet.exported", str(part)),
                *(f"--images={given}", f"--logits={made}"),
            ],
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise exported.ExportError(f"the export does not run, and is not kept: {line}")
        return np.load(made, allow_pickle=False)


def _compare(found: np.ndarray, expected: np.ndarray, bound: float) -> dict[str, Any]:
    """How far logits are from the model's.

    Raises:
      ExportError: where that is more than `bound`, or no number.
    """
    if found.shape != expected.shape:
        raise exported.ExportError(
            f"the export is not kept: its logits are {list(found.shape)}, and the model's are "
            f"{list(expected.shape)}"
        )
    largest = float(np.abs(expected).max())
    difference = float(np.abs(found - expected).max()) / largest if largest else np.inf
    if not difference <= bound:
        raise exported.ExportError(
            f"the export is not kept: its logits differ by up to {difference:.1e} of the model's "
            f"largest, {largest:.3g}, and the bound is {bound:.0e}"
        )
    return {
        "bound": bound,
        "largest_difference": difference,
        "largest_logit": largest,
        "same_top1": int((found.argmax(-1) == expected.argmax(-1)).sum()),
    }


def program(model: HaloNet, *, mean: tuple[float, ...], std: tuple[float, ...], inside: bool):
    """What an export computes: (variables, images) -> logits, for any number of images.

    Args:
      model: any form of whose attention will do.
      mean, std: of the normalisation, per channel, white is 1.
      inside: whether images are uint8 and the normalisation part of it.
    """
    portable = model.clone(implementation=IMPLEMENTATION)

    def logits(variables, images):
        if inside:
            images = steps.normalize(images, mean, std)
        return portable.apply(variables, images, train=False)

    return logits


def _write_stablehlo(part: pathlib.Path, run: Run, config: ConfigDict, inside: bool) -> None:
    """One file, the weights in it."""
    size = config.data.image_size
    function = program(run.model, **_mean_and_std(run), inside=inside)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8 if inside else jnp.float32)
    closed = jax.jit(functools.partial(function, run.variables))
    made = jax.export.export(closed, platforms=PLATFORMS)(images)
    (part / exported.PROGRAM).write_bytes(made.serialize())


def _write_savedmodel(part: pathlib.Path, run: Run, config: ConfigDict, inside: bool) -> None:
    """TensorFlow's folder, the weights as its variables."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    from jax.experimental import jax2tf

    size = config.data.image_size
    function = jax2tf.convert(
        program(run.model, **_mean_and_std(run), inside=inside),
        polymorphic_shapes=[None, f"(batch, {size}, {size}, 3)"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    module = tf.Module()
    module.weights = tf.nest.map_structure(
        lambda array: tf.Variable(array, trainable=False), jax.device_get(run.variables)
    )
    images = tf.TensorSpec((None, size, size, 3), tf.uint8 if inside else tf.float32, "images")

    @tf.function(autograph=False, input_signature=[images])
    def serve(images):
        return {"logits": function(module.weights, images)}

    tf.saved_model.save(module, str(part), signatures={"serving_default": serve})


def _write_timm(part: pathlib.Path, run: Run, config: ConfigDict, inside: bool) -> None:
    """A folder that timm opens itself, or from the Hugging Face hub: weights and configuration."""
    meta = read_meta(step_folder(run.workdir, run.step))
    entries = timm_weights.timm_entries(run.model)
    arrays = timm_weights.from_variables(run.variables, entries, meta.get("num_batches_tracked"))
    (part / "model.safetensors").write_bytes(timm_weights.as_safetensors(arrays))
    size, count = config.data.image_size, len(run.classes)
    settings = {
        "architecture": run.config.model.name.removeprefix("timm_"),
        "num_classes": count,
        "num_features": run.model.final_width or run.model.features[-1][1],
        "global_pool": "avg",
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": bool(run.model.global_size),  # of tables for a whole map
            "interpolation": config.data.interpolation,
            "crop_pct": config.data.crop_pct,
            "crop_mode": "center",
            **_mean_and_std(run),
            "num_classes": count,
            "first_conv": entries[0].theirs.removesuffix(".weight"),
            "classifier": "head.fc",
        },
    }
    # Numbers are no names; without any, timm knows its own of ImageNet.
    if list(run.classes) != [str(number) for number in range(count)]:
        settings["label_names"] = list(run.classes)
    (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


_WRITERS: dict[str, Callable[[pathlib.Path, Run, ConfigDict, bool], None]] = {
    "stablehlo": _write_stablehlo,
    "savedmodel": _write_savedmodel,
    "timm": _write_timm,
}

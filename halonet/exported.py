"""Exports, opened: every file compared with its hash first, then run in the runtime they are for.

python -m halonet.exported PATH
python -m halonet.exported PATH --images=IMAGES.npy --logits=LOGITS.npy

The first says what an export is, with exit code 4 where a file of it is not as it was written. The
second runs it over images, eight at a time. Only the runtime of the export itself is imported: JAX
for stablehlo, TensorFlow for savedmodel, PyTorch and timm for timm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from halonet import files

FORMAT_VERSION = 1
METADATA = "export.json"
PROGRAM = "program.stablehlo"
BATCH = 8  # images at a time, from the command line
# The modules of each runtime, and how to get them.
RUNTIMES = {
    "stablehlo": ("jax", "flatbuffers"),
    "savedmodel": ("tensorflow",),
    "timm": ("torch", "timm", "safetensors"),
}
INSTALL = {
    "stablehlo": "jax flatbuffers",
    "savedmodel": "tensorflow-cpu",
    "timm": "torch torchvision timm safetensors",
}


class ExportError(ValueError):
    """An export that is damaged, or does not compute what it should. The message is one line."""

    exit_code = 4


class RuntimeMissingError(ValueError):
    """A runtime that is not installed. The message is one line."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class Export:
    """An export whose files are as they were written, open in its runtime.

    Attributes:
      path: its folder.
      metadata: what `export.json` says: format, model, classes, input, preprocessing, checkpoint,
        config, commit, versions, and how far it was from the model when it was made.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    _run: Callable[[np.ndarray], np.ndarray]

    def logits(self, images: Shaped[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n classes"]:
        """Logits for any number of images, in float32.

        Args:
          images: of the size in `metadata["preprocessing"]`: uint8 where the preprocessing is
            inside, else float32, normalised; channels last in every format.

        Raises:
          ValueError: for images of another dtype or size.
        """
        wanted = self.metadata["preprocessing"]
        dtype = "uint8" if wanted["where"] == "inside" else "float32"
        size = wanted["image_size"]
        if images.dtype != dtype or images.shape[1:] != (size, size, 3) or not len(images):
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}; {self.path} takes {dtype} of "
                f"shape (n, {size}, {size}, 3), of one image or more"
            )
        return np.asarray(self._run(images), np.float32)


def load_export(path: str | pathlib.Path) -> Export:
    """Opens an export: `halonet.load_export("digits").logits(images)`.

    What it opens are programs, run by JAX, TensorFlow or PyTorch: the hashes show damage, not who
    made them.

    Raises:
      ExportError: where it is none, or a file is missing or not as it was written, naming it.
      RuntimeMissingError: where its runtime is not installed.
    """
    path = pathlib.Path(path)
    metadata = verify(path)
    check_runtime(metadata["format"])
    return Export(path, metadata, _OPENERS[metadata["format"]](path))


def verify(path: str | pathlib.Path) -> dict[str, Any]:
    """Compares each file of an export with its manifest.

    Returns:
      The metadata.

    Raises:
      ExportError: see `load_export`.
    """
    path = pathlib.Path(path)
    if not (path / files.MANIFEST).is_file():
        raise ExportError(f"{path} is no export, or not all of one: it has no {files.MANIFEST}")
    try:
        damaged = files.damaged(path)
        if damaged:
            raise ExportError(f"{path} is damaged: not as they were written: {damaged}")
        metadata = json.loads((path / METADATA).read_text())
        version = metadata["format_version"]
        known = version <= FORMAT_VERSION and metadata["format"] in RUNTIMES
    except ExportError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{path} is damaged: {line}") from error
    if not known:
        raise ExportError(
            f"{path} has format {metadata['format']!r} of version {version}; this program knows "
            f"{', '.join(RUNTIMES)} up to version {FORMAT_VERSION}; update halonet"
        )
    return metadata


def check_runtime(name: str) -> None:
    """Raises RuntimeMissingError, with what to install, unless a format's runtime is there."""
    import importlib.util

    missing = [it for it in RUNTIMES[name] if importlib.util.find_spec(it) is None]
    if missing:
        raise RuntimeMissingError(
            f"{name} needs {' and '.join(missing)}, not installed here: pip install {INSTALL[name]}"
        )


def _open_stablehlo(path: pathlib.Path) -> Callable[[np.ndarray], Any]:
    import jax
    from jax import export

    return jax.jit(export.deserialize(bytearray((path / PROGRAM).read_bytes())).call)


def _open_savedmodel(path: pathlib.Path) -> Callable[[np.ndarray], Any]:
    import tensorflow as tf

    model = tf.saved_model.load(str(path))
    # With the model, which would else be deleted under its function.
    return lambda images, model=model: model.signatures["serving_default"](
        images=tf.constant(images)
    )["logits"]


def _open_timm(path: pathlib.Path) -> Callable[[np.ndarray], Any]:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{path.resolve()}", pretrained=True).eval()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    return run


_OPENERS = {
    "stablehlo": _open_stablehlo,
    "savedmodel": _open_savedmodel,
    "timm": _open_timm,
}


def described(metadata: dict[str, Any]) -> str:
    """An export in a few lines."""
    made, compared = metadata["checkpoint"], metadata["compared"]
    takes, where = metadata["input"], metadata["preprocessing"]["where"]
    return (
        f"{metadata['format']} of {metadata['model']}, {len(metadata['classes'])} classes: takes "
        f"{takes['dtype']} images {takes['shape']}, preprocessing {where}\n"
        f"step {made['step']} of {made['workdir']} ({made['weights']} weights), code "
        f"{metadata['code'] or 'of no known commit'}\n"
        f"compared with the model on {compared['images']} images of {compared['of']}: largest "
        f"difference {compared['largest_difference']:.1e} of the largest logit, bound "
        f"{compared['bound']:.0e}; the same first class in {compared['same_top1']}"
    )


def main(arguments: list[str]) -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m halonet.exported", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="PATH", help="the export, a folder")
    parser.add_argument("--images", help="an .npy file of images, as the export takes them")
    parser.add_argument("--logits", help="the .npy file for what it makes of them")
    chosen = parser.parse_args(arguments)
    if bool(chosen.images) != bool(chosen.logits):
        parser.error("--images and --logits go together")
    try:
        if not chosen.images:
            print(f"{chosen.path} is whole\n{described(verify(chosen.path))}")
            return
        images, export = np.load(chosen.images, allow_pickle=False), load_export(chosen.path)
        starts = range(0, len(images), BATCH)
        found = [export.logits(images[start : start + BATCH]) for start in starts]
        np.save(chosen.logits, np.concatenate(found))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main(sys.argv[1:])

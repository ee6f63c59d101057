"""Weights of timm and MindCV as a run of ours, and back.

python -m halonet.models.convert timm FILE --model=halonet50ts --out=DIR [--classes=FILE]
python -m halonet.models.convert mindcv FILE.ckpt --model=halonet_50t --out=DIR [--classes=FILE]
python -m halonet.models.convert timm DIR --to=FILE.safetensors

FILE is .safetensors, or .pth, .pt or .bin where PyTorch, 2.6 or newer, is installed. DIR holds
float32; halonet.load_run opens it, main.py --mode=evaluate --evaluate.checkpoint=DIR scores it.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath

from halonet import checkpoint
from halonet.files import write_whole
from halonet.models import VARIANTS, create_model
from halonet.models.convert import readers, weights
from halonet.models.convert.weights import UsageError, check_conventions, check_origin
from halonet.run import load_run

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "", "name of the model that the weights are of")
flags.DEFINE_string("out", "", "folder for the converted weights; may be gs://")
flags.DEFINE_string("classes", "", "file of class names, one a line; empty: 0, 1, 2, ...")
flags.DEFINE_string("to", "", "the way back: the .safetensors file to write")


def convert(kind: str, file: str, *, model: str, out: str, classes: str = "") -> str:
    """Writes the weights of a file, as float32, as a run folder.

    Args:
      kind: "timm" or "mindcv": whose names are in the file.
      file: see `readers.read_weights`.
      model: a registered model of that origin.
      out: a new or empty folder, or one of an earlier conversion, which is replaced.
      classes: a file of class names, one a line; "" names them 0, 1, 2, ...

    Returns:
      What whoever asked for it wants to know next.
    """
    check_origin(model, kind)
    folder = epath.Path(out)
    if folder.exists() and not _is_free(folder):
        raise UsageError(f"--out={out} holds something else; take another folder")
    arrays = readers.read_weights(file)
    layer = "head.fc." if kind == "timm" else "classifier.1."
    head = arrays.get(f"{layer}weight", arrays.get(f"{layer}bias", np.zeros(0)))
    count = len(head) if head.ndim and head.size else 1000
    names = _class_names(classes, count)
    network = create_model(model, num_classes=count)
    try:
        entries = weights.ENTRIES[kind](network)
        variables, counts = weights.to_variables(arrays, entries, network)
    except weights.WeightsError as error:
        raise weights.WeightsError(f"{file} does not hold {model}: {error}") from error
    variables = jax.tree.map(lambda x: x.astype(np.float32), variables)

    variant = VARIANTS[model]
    source = {
        "format": kind,
        "file": pathlib.Path(file).name,
        "sha256": hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest(),
    }
    # What load_run reads; all other keys of a configuration are of training.
    config = {
        "model": {"name": model},
        "data": {
            key: getattr(variant, key)
            for key in ("image_size", "crop_pct", "interpolation", "mean", "std")
        },
        "train": {"ema_decay": 0.0},
        "converted_from": source,
    }
    meta = {"classes": names, "converted_from": source, "num_batches_tracked": counts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Before the arrays: what an interruption leaves is known as a conversion, and replaceable.
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
        checkpoint.save_variables(folder, variables, meta)
    except OSError as error:
        raise UsageError(f"--out={out} cannot be written: {error.strerror or error}") from error
    size = sum(x.size for x in jax.tree.leaves(variables["params"]))
    return (
        f"{model} of {kind}: {size:,} parameters, {count} classes, "
        f"images of {variant.image_size} px, from {source['file']} "
        f"(sha256 {source['sha256'][:12]})\n"
        f'in Python: run = halonet.load_run("{out}"); run.predict(images)\n'
        f"score it:  python main.py --mode=evaluate --evaluate.checkpoint={out} "
        "--config=CONFIG --workdir=WORKDIR\n"
        f"train on: python main.py --config=configs/finetune.py --config.init.weights={out} "
        f"--config.model.name={model} --config.data.data_dir=FOLDER --workdir=WORKDIR"
        + "".join(f"\nnote: {note}" for note in notes(arrays, kind))
    )


def notes(arrays: dict[str, np.ndarray], kind: str) -> Iterator[str]:
    """What one should know of weights that are converted all the same, each in one line."""
    if any(array.dtype == np.float64 for array in arrays.values()):
        yield "float64 arrays are stored as float32"
    odd = [key for key, x in arrays.items() if not np.isfinite(x.astype(np.float32)).all()]
    if odd:
        yield f"numbers in {min(odd)}, the first of {len(odd)} such arrays, are no finite float32"
    if kind == "mindcv":
        yield (
            "MindSpore's own Unfold orders windows otherwise than MindCV's source expects, so "
            "the published weights may not compute here what they computed there"
        )


def convert_back(workdir: str, to: str) -> str:
    """Writes the weights of a run, averaged where it kept them, as timm's state dict.

    Args:
      workdir: of a conversion, or of a run that trained one of timm's models.
      to: the .safetensors file; under its name there is never half of it.

    Returns:
      What whoever asked for it wants to know next.
    """
    if pathlib.Path(to).suffix != ".safetensors":
        raise UsageError(f"--to={to} must end in .safetensors")
    run = load_run(workdir)
    name = run.config.model.name
    check_origin(name, "timm")
    check_conventions(run.model, name)
    meta = checkpoint.read_meta(checkpoint.step_folder(run.workdir, run.step))
    arrays = weights.from_variables(
        run.variables, weights.timm_entries(run.model), meta.get("num_batches_tracked")
    )
    path = pathlib.Path(to)
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_bytes(weights.as_safetensors(arrays))
        part.replace(path)
    except OSError as error:
        raise UsageError(f"--to={to} cannot be written: {error.strerror}") from error
    return (
        f"step {run.step} of {workdir} ({run.weights} weights), {len(arrays)} arrays\n"
        f"in Python: timm.create_model({name.removeprefix('timm_')!r}, "
        f"num_classes={len(run.classes)}, checkpoint_path={to!r})"
    )


def _is_free(folder: epath.Path) -> bool:
    """Whether a folder is empty or of an earlier conversion."""
    config = folder / "config.json"
    try:
        if not config.exists():
            return not any(folder.iterdir())
        return bool(json.loads(config.read_text())["converted_from"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _class_names(path: str, count: int) -> list[str]:
    if not path:
        return [str(number) for number in range(count)]
    try:
        names = epath.Path(path).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"--classes={path} cannot be read as text") from error
    if len(names) != count:
        raise UsageError(
            f"--classes={path} has {len(names)} lines; the weights have {count} classes"
        )
    return names


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with flags before and behind the words, and one line for what it refuses."""
    flags.FLAGS.set_gnu_getopt(True)
    try:
        return FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # app.run turns Orbax's own progress on
    kind, path = argv[1:] if len(argv) == 3 else ("", "")
    incoming = (FLAGS.model, FLAGS.out)
    try:
        fits = not any((*incoming, FLAGS.classes)) if FLAGS.to else all(incoming)
        if kind not in weights.ENTRIES or not fits:
            raise UsageError(
                "one of these: timm FILE --model=NAME --out=DIR, mindcv FILE --model=NAME "
                "--out=DIR, timm DIR --to=FILE.safetensors; --help tells more"
            )
        if FLAGS.to and kind != "timm":
            raise UsageError("--to writes timm's files only")
        if FLAGS.to:
            print(convert_back(path, FLAGS.to))
        else:
            print(convert(kind, path, model=FLAGS.model, out=FLAGS.out, classes=FLAGS.classes))
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        # The keys of a file are anyone's: nothing in them moves the cursor.
        line = "".join(letter if letter.isprintable() else " " for letter in str(error))
        print(f"error: {line}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)

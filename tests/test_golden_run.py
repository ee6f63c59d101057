"""A run of the past, which must open, compute the same and go on for ever.

tests/golden/run was made by the trainer, with all that a state can hold (averages, two moments):

    PYTHONPATH=. python -m tests.test_golden_run

makes one anew, into a folder that must not exist: another format gets a golden run of its own, and
the old one stays. Its model is far smaller than any that is registered, for the repository's sake.
"""

import functools
import hashlib
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from halonet import checkpoint, load_run, metrics
from halonet.config import load_config
from halonet.data.sources import open_source
from halonet.models import VARIANTS
from halonet.models.registry import Variant
from halonet.train import train_and_evaluate
from tests.small_run import saved_arrays, small_config

GOLDEN = pathlib.Path(__file__).parent / "golden" / "run"
EXPECTED = GOLDEN.with_name("run.json")
NAME = "halonet_golden"
FIELDS = {
    "block_size": 4,
    "halo_size": 1,
    "out_ratio": 2.0,
    "depths": (1, 1),
    "widths": (4, 8),
    "heads": (1, 2),
    "stem_widths": (4,),
    "stem_kernel": 3,
    "stem_pool": "none",
}
STEP, TOTAL = 200, 208
SETTINGS = {
    "model.name": NAME,
    "train.steps": TOTAL,
    "train.ema_decay": 0.5,
    "eval.every_steps": TOTAL,
    "checkpoint.every_steps": STEP,
    "log.every_steps": 4,
    # Large to the end, so that what comes after the checkpoint tells one state from another.
    "optim.learning_rate": 0.01,
    "optim.floor": 0.005,
    "augment.mixup": 0.0,
}
STATE = ("step", "params", "batch_stats", "opt_state", "ema")
KEPT = ("config.json", "checkpoints", "metrics")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(VARIANTS, NAME, Variant(32, 0, FIELDS, "ours"))


def digits():
    """Three held-out digits, uint8."""
    source = open_source("mnist5k", "test", data_dir="", image_size=32)
    return np.stack([source[index]["image"] for index in (0, 500, 999)])


def logits(run):
    apply = jax.jit(functools.partial(run.model.apply, train=False))
    return np.asarray(apply(run.variables, run.preprocess(digits())))


def digests(workdir):
    """Field of the state -> SHA-256 of its arrays, with the paths they are stored under."""
    found = {field: hashlib.sha256() for field in STATE}
    for name, array in sorted(saved_arrays(workdir, STEP).items()):
        found[name.split("'")[1]].update(name.encode() + b"\0" + array)
    return {field: digest.hexdigest() for field, digest in found.items()}


def losses(workdir):
    """Of the steps behind the checkpoint."""
    rows = [row for row in metrics.read_metrics(workdir) if row["step"] > STEP]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def expected():
    return json.loads(EXPECTED.read_text())


def test_every_array_is_as_it_was_saved():
    assert checkpoint.read_meta(GOLDEN / "checkpoints" / str(STEP))["format_version"] == 2
    assert digests(GOLDEN) == expected()["sha256"]
    assert {name.split("'")[1] for name in saved_arrays(GOLDEN, STEP)} == set(STATE)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_it_computes_what_it_computed(weights):
    run = load_run(GOLDEN, weights=weights)
    assert (run.step, run.classes) == (STEP, tuple("0123456789"))
    # Rounding of float32, which other processors and versions of XLA do otherwise.
    np.testing.assert_allclose(logits(run), expected()["logits"][weights], rtol=0, atol=1e-5)


def of_version(version, workdir):
    """A copy of the golden run, as that version of the format has it."""
    shutil.copytree(GOLDEN, workdir)
    folder = workdir / "checkpoints" / str(STEP)
    if version == 1:  # which had no manifest
        (folder / checkpoint.MANIFEST).unlink()
    meta = folder / "meta" / "metadata"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format_version": version}))
    return workdir


def test_that_of_the_first_format_computes_the_same(tmp_path):
    run = load_run(of_version(1, tmp_path / "run"))
    np.testing.assert_allclose(logits(run), expected()["logits"]["ema"], rtol=0, atol=1e-5)


def test_that_of_a_newer_format_is_refused(tmp_path):
    newer = checkpoint.FORMAT_VERSION + 1
    workdir = of_version(newer, tmp_path / "run")
    message = f"^[^\n]*/{STEP} has format version {newer}, newer than .*; update halonet$"
    with pytest.raises(checkpoint.CheckpointError, match=message) as refused:
        load_run(workdir)
    assert refused.value.exit_code == 4


@pytest.mark.middle
@pytest.mark.parametrize("version", [1, 2])
def test_it_goes_on(tmp_path, capsys, version):
    workdir = of_version(version, tmp_path / "run")
    train_and_evaluate(load_config(workdir), workdir)
    assert f"going on from the checkpoint of step {STEP}" in capsys.readouterr().out
    # With the same averages of gradients and statistics, or the losses would be others.
    np.testing.assert_allclose(losses(workdir), expected()["losses"], rtol=1e-4)


def test_it_is_small():
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 250_000


def make(workdir):
    """Trains a golden run and forgets the second half of it."""
    VARIANTS[NAME] = Variant(32, 0, FIELDS, "ours")
    train_and_evaluate(small_config(**SETTINGS), workdir)
    record = {"losses": losses(workdir)}
    shutil.rmtree(workdir / "checkpoints" / str(TOTAL))
    for path in workdir.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in workdir.rglob("commit_success.txt"):  # which say where they were made
        path.write_text(path.read_text().replace(str(workdir), workdir.name))
    record["logits"] = {
        weights: logits(load_run(workdir, weights=weights)).tolist() for weights in ("ema", "raw")
    }
    record["sha256"] = digests(workdir)
    EXPECTED.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if GOLDEN.exists():
        sys.exit(f"error: {GOLDEN} is there, and kept")
    make(GOLDEN)

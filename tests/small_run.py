"""A run that takes seconds, and what one run can be compared with another by."""

import json

import jax
import numpy as np

from configs import mnist
from halonet import checkpoint, metrics

# The digits config at a size for tests.
SETTINGS = {
    "train.epochs": 0,
    "train.steps": 30,
    "data.batch_size": 16,
    "model.bn_group": 2,
    # What a step draws must be drawn again after an interruption, on any devices.
    "model.drop_path": 0.1,
    "augment.mixup": 0.2,
    "eval.batch_size": 200,
    "eval.every_steps": 15,
    "checkpoint.every_steps": 13,
    "checkpoint.keep_best": 2,
    "log.every_steps": 4,
}


def small_config(**overrides):
    """configs/mnist.py with SETTINGS; overrides by dotted key."""
    config = mnist.get_config()
    for key, value in {**SETTINGS, **overrides}.items():
        *groups, name = key.split(".")
        group = config
        for part in groups:
            group = group[part]
        group[name] = value
    return config


def saved_arrays(workdir, step):
    """Every array of a checkpoint, by path, as bytes."""
    folder = checkpoint.step_folder(workdir, step)
    with checkpoint.ocp.Checkpointer(checkpoint.ocp.PyTreeCheckpointHandler()) as checkpointer:
        structure = checkpointer.metadata(folder / "state").item_metadata.tree
        args = jax.tree.map(
            lambda _: checkpoint.ocp.RestoreArgs(restore_type=np.ndarray), structure
        )
        tree = checkpointer.restore(
            folder / "state", args=checkpoint.ocp.args.PyTreeRestore(restore_args=args)
        )
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def history(workdir):
    """The reproducible part of metrics.jsonl, as its lines."""
    lines = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {name: row[name] for name in row if name.startswith(("train/", "eval/"))}
        if kept:
            lines.append(json.dumps({"step": row["step"], **kept}))
    return lines


def rows(workdir, prefix):
    """Of each row of metrics the names that begin so, and the step."""
    return [
        {name: value for name, value in row.items() if name.startswith(("step", prefix))}
        for row in metrics.read_metrics(workdir)
        if any(name.startswith(prefix) for name in row)
    ]

"""What a notebook opens: a finished or running run, restored in one line, without its data set."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from halonet import checkpoint, metrics, processes, steps
from halonet.config import ConfigError, build_model, center_view, flatten, load_config
from halonet.data import transforms, views
from halonet.models import HaloNet, resize_tables

WEIGHTS = ("ema", "raw")

# What a fine-tuning may change without a word: what the same weights compute stays the same.
_FREE = ("model.dtype", "model.bn_group", "model.remat", "model.drop_path", "model.dropout")


@dataclasses.dataclass(frozen=True)
class Run:
    """A restored checkpoint and all that is needed to use it.

    Attributes:
      workdir, step: where it came from.
      config: of the run.
      classes: names, one for each logit.
      weights: "ema" or "raw", which of the two were restored.
      model: the Flax module; `model.apply(variables, images, train=False)`.
      variables: {"params", "batch_stats"}.
    """

    workdir: epath.Path
    step: int
    config: ConfigDict
    classes: tuple[str, ...]
    weights: str
    model: HaloNet
    variables: dict[str, Any]

    def preprocess(self, images: Sequence[Any] | np.ndarray) -> Float[np.ndarray, "n h w 3"]:
        """Images as the model wants them: square, of the run's size, normalised.

        Args:
          images: a list, of any sizes: paths of image files, Pillow images, uint8 arrays (H, W, 3)
            or (H, W). Or one array (N, H, W, 3).

        Raises:
          DataError: for a file that is missing, damaged or no image; exit code 3.
          ValueError: for one image that is in no list, and for other arrays.
        """
        shape = np.shape(images) if isinstance(images, np.ndarray) else ()
        if isinstance(images, str | os.PathLike) or (len(shape) == 3 and shape[-1] == 3):
            what = f"images has shape {shape}, that of" if shape else f"images={str(images)!r} is"
            raise ValueError(f"{what} one image; give a list: [image]")
        view = center_view(self.config)
        squares = np.stack([view(views.pixels(image)) for image in images])
        mean, std = tuple(self.config.data.mean), tuple(self.config.data.std)
        return transforms.normalize(squares, mean, std)

    def predict(self, images: Sequence[Any] | np.ndarray) -> Float[np.ndarray, "n classes"]:
        """Probabilities of the classes for images as `preprocess` takes them.

        For images of other sizes than the run's, and for feature maps, `model.apply` is the way.
        """
        if self.model.features_only:
            raise ValueError("features_only: no classes to predict; run.model.apply gives the maps")
        logits = self._apply(self.variables, self.preprocess(images))
        return np.asarray(jax.nn.softmax(logits, axis=-1))

    @functools.cached_property
    def _apply(self):
        return jax.jit(functools.partial(self.model.apply, train=False))


def load_run(
    workdir: epath.PathLike,
    step: str | int = "best",
    *,
    weights: str = "",
    sharding: jax.sharding.Sharding | None = None,
    **overrides: Any,
) -> Run:
    """Restores a run: `run = halonet.load_run("runs/demo")`.

    Args:
      workdir: folder of the run, or one checkpoint of it (`WORKDIR/checkpoints/STEP`).
      step: "best" (highest eval/top1 of those kept), "latest" or a number.
      weights: "ema" or "raw"; "" takes the averages where the run kept them.
      sharding: where the arrays shall lie; None is the first device. Where it spans processes, all
        of them call this, and process 0 says which step.
      **overrides: of the model's fields, such as `pad_to_blocks=True` for images of any size or
        `features_only=True`; another `block_size` or `halo_size` resizes the relative tables.

    Raises:
      ConfigError: where there is no run.
      CheckpointError: where there is no such checkpoint, listing the steps there are.
      ValueError: for a step or weights that make no sense, and for overrides that need other
        weights, listing them.
    """
    workdir = epath.Path(workdir)
    if workdir.parent.name == checkpoint.FOLDER and workdir.name.isdecimal():
        workdir, step = workdir.parent.parent, int(workdir.name)

    def found() -> int:
        load_config(workdir)
        checkpoint.step_folder(workdir, number := resolve_step(workdir, step))
        return number

    # On a run that goes on, each process might find another.
    together = sharding is not None and not sharding.is_fully_addressable
    step = processes.agreed(found) if together else found()
    config, folder = load_config(workdir), checkpoint.step_folder(workdir, step)
    meta = checkpoint.read_meta(folder)
    checkpoint.verify(folder)

    kept = bool(config.train.ema_decay)
    weights = weights or ("ema" if kept else "raw")
    if weights not in WEIGHTS or (weights == "ema" and not kept):
        raise ValueError(f"weights={weights!r} are not in this run; 'raw' are")
    num_classes = len(meta["classes"])
    model = build_model(config, num_classes=num_classes)
    size = config.data.image_size
    variables = model.abstract_variables(size, size)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = checkpoint.abstract_on(variables, sharding)
    if weights == "ema":
        variables = checkpoint.restore_arrays(folder, {"ema": target})["ema"]
    else:
        variables = checkpoint.restore_arrays(folder, target)
    if overrides:
        saved, model = model, _overridden(config, num_classes, overrides)
        variables = resize_tables(variables, saved, model)
        _check_fit(variables, model, size)
    return Run(workdir, step, config, tuple(meta["classes"]), weights, model, variables)


def initial_variables(
    config: ConfigDict, model: HaloNet, state: steps.TrainState
) -> tuple[dict[str, Any], list[str]]:
    """The variables that `config.init` makes a fresh run start with.

    Relative tables of another block or halo are resized by offset. Everything else fits as it is
    or is named in `init.skip`.

    Args:
      config: of the fresh run.
      model: of the fresh run.
      state: its abstract state, with shardings.

    Returns:
      {"params", "batch_stats"} on the shardings of `state`, abstract where they shall stay fresh,
      and what to tell about it, line by line.

    Raises:
      ConfigError: where `init.weights` is no run, or of another model, or `init.skip` names
        nothing.
      CheckpointError: where weights are missing, left over or of another shape: one error that
        lists them all.
    """
    where, skip = config.init.weights, [part for part in config.init.skip.split(",") if part]
    for part in skip:
        if not any(_in_part(name, part) for name in _named(state.params)):
            raise ConfigError(
                f"config.init.skip={config.init.skip!r}: {config.model.name} has no part {part!r}; "
                f"it has {', '.join(state.params)}"
            )
    try:
        run = load_run(where, sharding=state.step.sharding)
    except ConfigError as error:
        raise ConfigError(f"config.init.weights={error}") from error
    if run.config.model.name != config.model.name:
        raise ConfigError(
            f"config.init.weights={where} is of {run.config.model.name}, and config.model.name is "
            f"{config.model.name}; set --config.model.name={run.config.model.name}"
        )
    try:
        theirs = resize_tables(run.variables, run.model, model)
    except ValueError as error:
        raise ConfigError(f"config.init.weights={where}: {error}") from error

    def kept(tree: Any) -> dict[str, Any]:
        return {
            name: leaf
            for name, leaf in _named(tree).items()
            if not any(_in_part(name.partition("/")[2], part) for part in skip)
        }

    wanted = {"params": state.params, "batch_stats": state.batch_stats}
    given, needed = kept(theirs), kept(wanted)
    if differing := checkpoint.differences(given, needed):
        left = f"what config.init.skip={config.init.skip} names is left out already"
        raise checkpoint.CheckpointError(
            f"the weights in {where} do not fit: {'; '.join(differing)}; "
            f"{left if skip else '--config.init.skip=head would leave out the classifier'}"
        )
    onto = jax.tree.map(lambda leaf: leaf.sharding, needed)
    placed = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=onto)(given)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: placed.get(checkpoint.path_name(path), leaf), wanted
    )
    count = sum(leaf.size for name, leaf in placed.items() if name.startswith("params/"))
    fresh = [name for name in _named(state.params) if f"params/{name}" not in placed]
    said = [
        f"starting from step {run.step} of {where} ({run.weights} weights): loaded {len(placed)} "
        f"arrays ({count:,} parameters), fresh: {', '.join(fresh) or 'none'}"
    ]
    there, here = flatten(run.config), flatten(config)
    keys = [key for key in there if key.startswith("model.") and key not in _FREE]
    unlike = [
        f"{key} {there[key]!r} there, {here[key]!r} here"
        for key in (*keys, "data.mean", "data.std")
        if there[key] != here.get(key, there[key])
    ]
    return variables, said + ([f"  unlike them: {'; '.join(unlike)}"] if unlike else [])


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path: {"head/bias": ..., ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {checkpoint.path_name(path): leaf for path, leaf in leaves}


def _in_part(name: str, part: str) -> bool:
    return f"{name}/".startswith(f"{part}/")


def _overridden(config: ConfigDict, num_classes: int, overrides: dict[str, Any]) -> HaloNet:
    for key in ("name", "num_classes"):
        if key in overrides:
            raise ValueError(
                f"{key}={overrides[key]!r} is another model: build it with create_model, "
                "initialise it and copy what it shares with run.variables"
            )
    model = build_model(config, num_classes=num_classes, **overrides)
    model.check_fields()
    return model


def _check_fit(variables: dict[str, Any], model: HaloNet, size: int) -> None:
    """Raises ValueError unless `variables` are those of `model`; maps alone leave some unused."""
    # Padded, a model takes every size, and no variable depends on either.
    needed = model.clone(pad_to_blocks=True).abstract_variables(size, size)
    differing = checkpoint.differences(variables, needed)
    if model.features_only:
        differing = [text for text in differing if not text.endswith("nothing wanted")]
    if differing:
        raise ValueError(f"the weights do not fit that model: {'; '.join(differing)}")


def resolve_step(workdir: epath.PathLike, step: str | int) -> int:
    """The number that "best", "latest" or a number stands for, among the steps saved."""
    steps = checkpoint.saved_steps(workdir)
    if isinstance(step, int) or step.isdecimal():
        return int(step)
    if step not in ("best", "latest"):
        raise ValueError(f"step={step!r} is not 'best', 'latest' or a number")
    if not steps:
        raise checkpoint.CheckpointError(f"no checkpoint in {workdir}")
    rows = [row for row in metrics.read_metrics(workdir) if row["step"] in steps]
    best = metrics.best_steps(rows, 1)
    return best[0] if step == "best" and best else steps[-1]

"""What a notebook opens: a finished or running run, restored in one line, without its data set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from halonet import checkpoint, metrics
from halonet.config import build_model, load_config
from halonet.data import transforms
from halonet.models import HaloNet, resize_tables

WEIGHTS = ("ema", "raw")


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
          images: uint8 arrays (H, W, 3) or (H, W), or PIL images, of any sizes.
        """
        size = self.config.data.image_size
        squares = []
        for image in images:
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim not in (2, 3):
                raise ValueError(
                    f"an image is {image.dtype} of shape {image.shape}; it must be uint8, "
                    "(height, width, 3) or (height, width)"
                )
            if image.ndim == 2:
                image = np.repeat(image[..., None], 3, axis=-1)
            squares.append(transforms.center_crop(transforms.resize_shorter(image, size), size))
        mean, std = tuple(self.config.data.mean), tuple(self.config.data.std)
        return transforms.normalize(np.stack(squares), mean, std)

    def predict(self, images: Sequence[Any] | np.ndarray) -> Float[np.ndarray, "n classes"]:
        """Probabilities of the classes for images as `preprocess` takes them."""
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
      sharding: where the arrays shall lie; None is the first device.
      **overrides: of the model's fields, such as `pad_to_blocks=True` for images of any size;
        another `block_size` or `halo_size` resizes the relative tables.

    Raises:
      ConfigError: where there is no run.
      CheckpointError: where there is no such checkpoint, listing the steps there are.
      ValueError: for a step or weights that make no sense.
    """
    workdir = epath.Path(workdir)
    if workdir.parent.name == checkpoint.FOLDER and workdir.name.isdigit():
        workdir, step = workdir.parent.parent, int(workdir.name)
    config = load_config(workdir)
    step = resolve_step(workdir, step)
    folder = checkpoint.step_folder(workdir, step)
    meta = checkpoint.read_meta(folder)

    kept = bool(config.train.ema_decay)
    weights = weights or ("ema" if kept else "raw")
    if weights not in WEIGHTS or (weights == "ema" and not kept):
        raise ValueError(f"weights={weights!r} are not in this run; 'raw' are")
    num_classes = len(meta["classes"])
    model = build_model(config, num_classes=num_classes)
    size = config.data.image_size
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False)
    )
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = checkpoint.abstract_on(variables, sharding)
    if weights == "ema":
        variables = checkpoint.restore_arrays(folder, {"ema": target})["ema"]
    else:
        variables = checkpoint.restore_arrays(folder, target)
    if overrides:
        saved, model = model, build_model(config, num_classes=num_classes, **overrides)
        variables = resize_tables(variables, saved, model)
    return Run(workdir, step, config, tuple(meta["classes"]), weights, model, variables)


def resolve_step(workdir: epath.PathLike, step: str | int) -> int:
    """The number that "best", "latest" or a number stands for, among the steps saved."""
    steps = checkpoint.saved_steps(workdir)
    if isinstance(step, int) or step.isdigit():
        return int(step)
    if step not in ("best", "latest"):
        raise ValueError(f"step={step!r} is not 'best', 'latest' or a number")
    if not steps:
        raise checkpoint.CheckpointError(f"no checkpoint in {workdir}")
    rows = [row for row in metrics.read_metrics(workdir) if row["step"] in steps]
    best = metrics.best_steps(rows, 1)
    return best[0] if step == "best" and best else steps[-1]

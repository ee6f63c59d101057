"""What may go wrong inside a step: numbers that are none, and memory that is not enough."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from halonet import sharding, steps


class NonFinite(FloatingPointError):
    """The numbers of a run are none any more. The checkpoints are from before."""

    exit_code = 5


class OutOfMemory(MemoryError):
    """A step that the devices or the host have no memory for. The message is one line."""

    exit_code = 7


class FiniteCheck:
    """Looks at the loss and the gradient of each step, and at a state before it is saved.

    All processes see the same numbers and so stop at the same step.

    Args:
      limit: steps of the run that may be passed over for their numbers; 0: the first ends it.
      workdir: for the message.
      mesh: of the states.
      before: how many were passed over before this start.
    """

    def __init__(
        self, *, limit: int, workdir: epath.PathLike, mesh: jax.sharding.Mesh, before: int = 0
    ):
        self._limit, self._workdir, self.skipped = limit, workdir, before
        self._flags = jax.jit(steps.finite_leaves, out_shardings=sharding.replicated(mesh))

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """Counts a step with these metrics, if it was passed over.

        Raises:
          NonFinite: where none may be, or too many were. Naming the step.
        """
        wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if not wrong:
            return
        self.skipped += 1
        if self.skipped > self._limit:
            many = f" ({self.skipped} of the run; config.train.skip_nonfinite={self._limit})"
            raise NonFinite(
                f"the {wrong[0]} of step {number} is {values[wrong[0]]}"
                f"{many if self._limit else ''}; the checkpoints in {self._workdir} are from "
                "before; a smaller optim.learning_rate or optim.clip_norm may help"
            )

    def state(self, number: int, state: Any) -> None:
        """Raises NonFinite, naming arrays, where a state is not to be saved or gone on from."""
        flags = np.asarray(self._flags(state))
        if not flags.all():
            leaves = jax.tree_util.tree_leaves_with_path(state)
            names = [
                jax.tree_util.keystr(path, simple=True, separator="/")
                for (path, _), fine in zip(leaves, flags, strict=True)
                if not fine
            ]
            raise NonFinite(
                f"the state of step {number} is not finite and is saved no further: "
                f"{', '.join(names[:3])}"
                + (f" and {len(names) - 3} more arrays" if names[3:] else "")
            )


# What the memory of a step depends on, and what would need less of it, by the key of its batch.
_NEEDS = {
    "data.batch_size": (
        (
            *("data.image_size", "train.accumulate", "model.remat", "model.dtype"),
            *("mesh.fsdp", "mesh.rows"),
        ),
        "a smaller batch needs less, or train.accumulate=2 and up, model.remat=block, "
        "model.dtype=bfloat16, more devices; mesh.fsdp splits the parameters, mesh.rows the images",
    ),
    "eval.batch_size": (
        ("data.image_size", "model.dtype"),
        "a smaller batch needs less, or model.dtype=bfloat16, or more devices",
    ),
}


@contextlib.contextmanager
def explained(
    settings: Mapping[str, Any], devices: int, params: Any, batch: str = "data.batch_size"
) -> Iterator[None]:
    """A context whose want of memory is told with what needs it and what would need less.

    Args:
      settings: keys of the configuration, with dots, to values.
      devices: that share a batch, and each image if `mesh.rows` says so.
      params: the model's, or their abstract shapes.
      batch: the key of the batch's size: "data.batch_size" in training, or "eval.batch_size".

    Raises:
      OutOfMemory: instead of JAX's error or Python's MemoryError.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        size, rows, (names, advice) = settings[batch], settings["mesh.rows"], _NEEDS[batch]
        line = (str(error).splitlines() or ["MemoryError"])[0][:300]
        each = f" times {rows}" if rows > 1 else ""
        raise OutOfMemory(
            f"not enough memory for config.{batch}={size}, {size * rows // devices} on each of "
            f"{devices // rows}{each} devices, with "
            f"{', '.join(f'{name}={settings[name]}' for name in names)} and {count:,} parameters; "
            f"{advice} ({line})"
        ) from error

"""Optimizers and learning-rate schedules, by name."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

OPTIMIZERS = ("adamw", "sgd", "lamb", "rmsprop")


def scaled(learning_rate: float, *, batch_size: int, base_batch: int) -> float:
    """The linear rule: a learning rate meant for `base_batch` examples a step, for `batch_size`.

    `base_batch` 0 leaves it as it is. Source: Goyal et al., 2017, arXiv 1706.02677.
    """
    return learning_rate * batch_size / base_batch if base_batch else learning_rate


def warmup_cosine(
    *, peak: float, total_steps: int, warmup: float, floor: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from 0 over the fraction `warmup` of the run, then a cosine to `floor`.

    Args:
      peak: the highest learning rate.
      floor: the last one.
      total_steps: optimizer steps of the whole run.
      warmup: fraction of `total_steps`, in [0, 1).
    """
    warmup_steps = min(round(warmup * total_steps), total_steps - 1)
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else peak,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=floor,
    )


def decay_mask(params: Any, *, tables: bool = False) -> Any:
    """True for the leaves that weight decay shrinks: kernels, and relative tables where asked.

    Norms and biases are spared: decay would pull them from values that mean something (a scale of
    one), not towards a simpler function. So it would relative tables, from a distance, and we spare
    them too; but timm and MindCV do not.
    """
    decayed = ("kernel", "row_table", "col_table") if tables else ("kernel",)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) in decayed, params
    )


def make_optimizer(
    name: str,
    *,
    learning_rate: optax.Schedule,
    momentum: float,
    weight_decay: float,
    clip_norm: float,
    decay_tables: bool = False,
) -> optax.GradientTransformation:
    """Builds the chain: clip the gradient, then the named optimizer.

    Args:
      name: "adamw" and "lamb" (decoupled weight decay; the latter as timm has it, moving by an
        array's own norm only what weight decay may shrink); "sgd" (Nesterov) and "rmsprop" (both
        add the decay to the gradient; the latter as EfficientNet was trained: TensorFlow's, with
        decay 0.9, epsilon 0.001 within the root and squares that start at 1).
      learning_rate: step -> learning rate.
      momentum: of SGD and RMSProp; b1 of AdamW and LAMB.
      weight_decay: coefficient, applied where `decay_mask` is true.
      clip_norm: largest global norm of the gradient; 0 does not clip.
      decay_tables: whether `decay_mask` takes in the relative tables.

    Raises:
      ValueError: for an unknown name.
    """
    mask = functools.partial(decay_mask, tables=decay_tables)
    decay = optax.add_decayed_weights(weight_decay, mask=mask)
    if name == "adamw":
        optimizer = optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay, mask=mask)
    elif name == "lamb":
        optimizer = optax.chain(
            optax.scale_by_adam(b1=momentum, eps=1e-6),
            decay,
            optax.masked(optax.scale_by_trust_ratio(), mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    elif name == "sgd":
        optimizer = optax.chain(decay, optax.sgd(learning_rate, momentum=momentum, nesterov=True))
    elif name == "rmsprop":
        optimizer = optax.chain(
            decay,
            optax.rmsprop(learning_rate, decay=0.9, eps=1e-3, initial_scale=1.0, momentum=momentum),
        )
    else:
        raise ValueError(f"unknown optimizer '{name}'; there are: {', '.join(OPTIMIZERS)}")
    if clip_norm:
        return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    return optimizer

"""Optimizers and learning-rate schedules, by name."""

from __future__ import annotations

from typing import Any

import jax
import optax

OPTIMIZERS = ("adamw", "sgd")


def warmup_cosine(*, peak: float, total_steps: int, warmup: float) -> optax.Schedule:
    """Linear warm-up from 0 over the fraction `warmup` of the run, then a cosine to 0.

    Args:
      peak: the highest learning rate.
      total_steps: optimizer steps of the whole run.
      warmup: fraction of `total_steps`, in [0, 1).
    """
    warmup_steps = min(round(warmup * total_steps), total_steps - 1)
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else peak,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
    )


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay shrinks: kernels.

    Norms, biases and relative-position tables are spared: decay would pull them from values that
    mean something (a scale of one, a distance), not towards a simpler function.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


def make_optimizer(
    name: str,
    *,
    learning_rate: optax.Schedule,
    momentum: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformation:
    """Builds the chain: clip the gradient, then the named optimizer.

    Args:
      name: "adamw" (decoupled weight decay) or "sgd" (Nesterov; decay added to the gradient).
      learning_rate: step -> learning rate.
      momentum: SGD's momentum, AdamW's b1.
      weight_decay: coefficient, applied where `decay_mask` is true.
      clip_norm: largest global norm of the gradient; 0 does not clip.

    Raises:
      ValueError: for an unknown name.
    """
    if name == "adamw":
        optimizer = optax.adamw(
            learning_rate, b1=momentum, weight_decay=weight_decay, mask=decay_mask
        )
    elif name == "sgd":
        optimizer = optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.sgd(learning_rate, momentum=momentum, nesterov=True),
        )
    else:
        raise ValueError(f"unknown optimizer '{name}'; there are: {', '.join(OPTIMIZERS)}")
    if clip_norm:
        return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    return optimizer

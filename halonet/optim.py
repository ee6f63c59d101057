"""Optimizers and learning-rate schedules, by name."""

from __future__ import annotations

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
      name: "adamw" and "lamb" (decoupled weight decay); "sgd" (Nesterov) and "rmsprop" (both add
        the decay to the gradient; the latter as EfficientNet was trained: TensorFlow's, with
        decay 0.9, epsilon 0.001 within the root and squares that start at 1).
      learning_rate: step -> learning rate.
      momentum: of SGD and RMSProp; b1 of AdamW and LAMB.
      weight_decay: coefficient, applied where `decay_mask` is true.
      clip_norm: largest global norm of the gradient; 0 does not clip.

    Raises:
      ValueError: for an unknown name.
    """
    if name == "adamw":
        optimizer = optax.adamw(
            learning_rate, b1=momentum, weight_decay=weight_decay, mask=decay_mask
        )
    elif name == "lamb":
        optimizer = optax.lamb(
            learning_rate, b1=momentum, weight_decay=weight_decay, mask=decay_mask
        )
    elif name == "sgd":
        optimizer = optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.sgd(learning_rate, momentum=momentum, nesterov=True),
        )
    elif name == "rmsprop":
        optimizer = optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.rmsprop(learning_rate, decay=0.9, eps=1e-3, initial_scale=1.0, momentum=momentum),
        )
    else:
        raise ValueError(f"unknown optimizer '{name}'; there are: {', '.join(OPTIMIZERS)}")
    if clip_norm:
        return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    return optimizer

"""One training step, one evaluation step, and the state between them: pure functions.

Nothing here knows a configuration or a model: the step is handed `apply_fn`. Randomness, where a
step needs it, is `fold_in(key(seed), state.step)`; the state holds arrays only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

Batch = dict[str, Array]
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on from where it is: arrays only, or their abstract shapes.

    Attributes:
      step: optimizer steps taken so far, int32 scalar.
      params, batch_stats: the model's variables.
      opt_state: the optimizer's.
      ema: moving averages {"params", "batch_stats"}, or {} where none are kept.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any


def init_state(
    key: Array,
    *,
    init_fn: Callable,
    tx: optax.GradientTransformation,
    image_size: int,
    ema: bool,
) -> TrainState:
    """A fresh state.

    Args:
      key: a typed PRNG key.
      init_fn: the model's `init`.
      tx: the optimizer, whose state is made too.
      image_size: pixels; parameters do not depend on it, but the model checks it.
      ema: whether moving averages are kept.
    """
    images = jnp.zeros((1, image_size, image_size, 3))
    variables = init_fn(key, images, train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    averages = {"params": params, "batch_stats": batch_stats} if ema else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        # Copies: the state is donated, and a buffer can be given away only once.
        ema=jax.tree.map(jnp.copy, averages),
    )


def normalize(
    images: UInt8[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """Pixels in [0, 255] to float32 of about zero mean and unit variance.

    Args:
      mean, std: per channel, in units of the full scale (white is 1).
    """
    channels = (1, 1, 1, len(mean))
    scaled = images.astype(jnp.float32) / 255
    return (scaled - jnp.array(mean).reshape(channels)) / jnp.array(std).reshape(channels)


def cross_entropy(
    logits: Float[Array, "n classes"], labels: Int[Array, " n"], label_smoothing: float
) -> Float[Array, " n"]:
    """Cross-entropy in nats, against targets of which `label_smoothing` is spread evenly."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def hits(logits: Float[Array, "n classes"], labels: Int[Array, " n"], k: int) -> Float[Array, " n"]:
    """1.0 where the label's logit is among the k largest, else 0.0.

    Ties count against the model, and so do NaNs: logits that say nothing score nothing.
    """
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    rivals = (~(logits < label_logit)).sum(axis=-1) - 1
    known = ~jnp.isnan(label_logit[:, 0])
    # float32, as all sums are: counts in another type would need an all-reduce of their own.
    return ((rivals < k) & known).astype(jnp.float32)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    apply_fn: Callable,
    tx: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    label_smoothing: float,
    ema_decay: float,
) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    Args:
      state: donated by the caller.
      batch: "image" uint8 (N, H, W, 3) and "label" int32 (N,).
      apply_fn: the model's `apply`.
      tx: the optimizer.
      learning_rate: step -> learning rate, for the record; `tx` holds its own.
      mean, std: of the images, see `normalize`.
      label_smoothing: see `cross_entropy`.
      ema_decay: of the moving averages; ignored where the state has none.

    Returns:
      The next state, and sums over the batch: "loss", "top1" and "count", beside the scalars
      "grad_norm" (before clipping) and "learning_rate".
    """
    images = normalize(batch["image"], mean, std)
    labels = batch["label"]

    def loss_fn(params: Any) -> tuple[Array, tuple[Any, Metrics]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = apply_fn(variables, images, train=True, mutable=["batch_stats"])
        losses = cross_entropy(logits, labels, label_smoothing)
        sums = {
            "loss": losses.sum(),
            "top1": hits(logits, labels, 1).sum(),
            "count": jnp.float32(len(losses)),
        }
        return losses.mean(), (updates["batch_stats"], sums)

    grads, (batch_stats, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)

    ema = state.ema
    if ema:
        # The decay warms up, so that the average is not held by the initial weights: the rule of
        # TensorFlow's ExponentialMovingAverage with num_updates.
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(
            lambda old, new: old * decay.astype(old.dtype) + new * (1 - decay).astype(old.dtype),
            ema,
            {"params": params, "batch_stats": batch_stats},
        )
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics


def eval_step(
    variables: dict[str, Any],
    batch: Batch,
    *,
    apply_fn: Callable,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Metrics:
    """Sums over the examples of a batch whose "mask" is 1: "loss", "top1", "top5" and "count"."""
    logits = predict_step(variables, batch["image"], apply_fn=apply_fn, mean=mean, std=std)
    labels = batch["label"]
    mask = batch["mask"].astype(jnp.float32)
    return {
        "loss": (cross_entropy(logits, labels, 0.0) * mask).sum(),
        "top1": (hits(logits, labels, 1) * mask).sum(),
        "top5": (hits(logits, labels, 5) * mask).sum(),
        "count": mask.sum(),
    }


def predict_step(
    variables: dict[str, Any],
    images: UInt8[Array, "n h w c"],
    *,
    apply_fn: Callable,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "n classes"]:
    """Logits of images as they come from the pipeline."""
    return apply_fn(variables, normalize(images, mean, std), train=False)

"""One training step, one evaluation step, and the state between them: pure functions.

Nothing here knows a configuration or a model: the step is handed `apply_fn`. Randomness is
`fold_in(key(seed), state.step)`, so that a run that goes on draws what it would have drawn; the
state holds arrays only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

CALIBRATION_BINS = 15  # as Guo et al., 2017, arXiv 1706.04599, have them

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


def start_from(state: TrainState, variables: dict[str, Any]) -> TrainState:
    """A fresh state with other variables, which the moving averages, where kept, start from too.

    Args:
      state: of no step yet, so that nothing in the optimizer's state depends on the parameters.
      variables: {"params", "batch_stats"}; where one is abstract, that of `state` stays.
    """
    own = {"params": state.params, "batch_stats": state.batch_stats}
    variables = jax.tree.map(
        lambda ours, theirs: ours if isinstance(theirs, jax.ShapeDtypeStruct) else theirs,
        own,
        variables,
    )
    averages = variables if state.ema else {}
    return dataclasses.replace(state, **variables, ema=jax.tree.map(jnp.copy, averages))


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


def smooth_targets(
    labels: Int[Array, " n"], num_classes: int, label_smoothing: float
) -> Float[Array, "n classes"]:
    """Distributions over the classes, of which `label_smoothing` is spread evenly."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)


def cross_entropy(
    logits: Float[Array, "n classes"], targets: Float[Array, "n classes"]
) -> Float[Array, " n"]:
    """Cross-entropy in nats."""
    return optax.softmax_cross_entropy(logits, targets)


def binary_cross_entropy(
    logits: Float[Array, "n classes"], targets: Float[Array, "n classes"], threshold: float
) -> Float[Array, " n"]:
    """Cross-entropy in nats of one yes or no a class, averaged over the classes.

    Args:
      threshold: targets above it count as 1, the others as 0; 0 takes them as they are.

    Source: Wightman et al., ResNet strikes back, 2021, arXiv 2110.00476, section 3: an image made
    of two shows both of its classes.
    """
    if threshold:
        targets = (targets > threshold).astype(targets.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)


@dataclasses.dataclass(frozen=True)
class Mixing:
    """MixUp and CutMix of a batch, one or the other: what to draw, and among whom.

    An image is mixed with its mirror in its group of consecutive examples, the first with the last,
    as timm does in a whole batch: groups stay on one device, and their order is random anyway.

    Attributes:
      mixup, cutmix: alpha of the Beta(alpha, alpha) that the share of an image is drawn from, one
        share for the whole batch; 0: never.
      cutmix_probability: of CutMix for a batch, where both are on.
      group: examples of a group, which divide the batch.

    Source: Zhang et al., mixup, arXiv 1710.09412; Yun et al., CutMix, arXiv 1905.04899.
    """

    mixup: float
    cutmix: float
    cutmix_probability: float
    group: int

    def __call__(
        self, key: Array, images: Float[Array, "n h w c"]
    ) -> tuple[Float[Array, "n h w c"], Float[Array, ""]]:
        """Returns mixed images, and the share that each keeps; its partner has the rest."""
        choice, share, place = jax.random.split(key, 3)
        partners = self.partners(images)

        def blend(alpha: float) -> tuple[Array, Array]:
            kept = jax.random.beta(share, alpha, alpha)
            return images * kept + partners * (1 - kept), kept

        def paste(alpha: float) -> tuple[Array, Array]:
            box = cutmix_box(place, jax.random.beta(share, alpha, alpha), images.shape[1:3])
            inside = box[None, :, :, None]
            return jnp.where(inside, partners, images), 1 - box.mean(dtype=jnp.float32)

        if not self.cutmix:
            return blend(self.mixup)
        if not self.mixup:
            return paste(self.cutmix)
        pasted = jax.random.bernoulli(choice, self.cutmix_probability)
        return jax.lax.cond(pasted, lambda: paste(self.cutmix), lambda: blend(self.mixup))

    def partners(self, x: Array) -> Array:
        """Puts each example's partner in its place."""
        return x.reshape(-1, self.group, *x.shape[1:])[:, ::-1].reshape(x.shape)


def cutmix_box(key: Array, kept: Float[Array, ""], size: tuple[int, int]) -> Bool[Array, "h w"]:
    """True in a box of 1 - `kept` of the area around a random pixel, where it is in the image."""
    sides = [jnp.floor(length * jnp.sqrt(1 - kept)).astype(jnp.int32) for length in size]
    along = []
    for axis_key, length, side in zip(jax.random.split(key), size, sides, strict=True):
        center = jax.random.randint(axis_key, (), 0, length)
        pixels = jnp.arange(length)
        along.append((pixels >= center - side // 2) & (pixels < center + side // 2))
    return along[0][:, None] & along[1][None, :]


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
    loss: Callable = cross_entropy,
    mixing: Mixing | None = None,
    seed: int = 0,
    accumulate: int = 1,
    shares: int = 1,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    Args:
      state: donated by the caller.
      batch: "image" uint8 (N, H, W, 3) and "label" int32 (N,); perhaps "damaged" int32 (N,), above
        0 where another image stands for a damaged one.
      apply_fn: the model's `apply`; it draws from the stream "dropout".
      tx: the optimizer.
      learning_rate: step -> learning rate, for the record; `tx` holds its own.
      mean, std: of the images, see `normalize`.
      label_smoothing: see `smooth_targets`.
      ema_decay: of the moving averages; ignored where the state has none.
      loss: (logits, targets) -> one number an example.
      mixing: of images and of labels, or None.
      seed: of what the step draws: shares and boxes of `mixing`, and the model's dropout.
      accumulate: parts of the batch, whose gradients are averaged one after the other: the step
        of the whole batch in the memory of a part. Batch statistics are the same where groups of
        `BatchNorm` lie within a part.
      shares: devices that share the batch; a part has as much of each.
      skip_nonfinite: where loss, gradient or update is no number, nothing but counts moves on.

    Returns:
      The next state, and sums over the batch: "loss", "top1" and "count", beside the scalars
      "grad_norm" (before clipping) and "learning_rate", and "damaged", a count, if the batch has
      it. Of mixed images, "top1" asks for the label of the larger share.
    """
    batch = dict(batch)
    damaged = batch.pop("damaged", None)
    mix_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))

    def loss_fn(params: Any, part: Batch, key: Array) -> tuple[Array, tuple[Any, Metrics]]:
        images, labels = normalize(part["image"], mean, std), part["label"]
        kept, others = jnp.float32(1), labels
        if mixing:
            # One draw for all parts.
            images, kept = mixing(mix_key, images)
            others = mixing.partners(labels)
        logits, updates = apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        targets = smooth_targets(labels, logits.shape[-1], label_smoothing)
        if mixing:
            of_others = smooth_targets(others, logits.shape[-1], label_smoothing)
            targets = targets * kept + of_others * (1 - kept)
        losses = loss(logits, targets)
        sums = {
            "loss": losses.sum(),
            "top1": hits(logits, jnp.where(kept < 0.5, others, labels), 1).sum(),
            "count": jnp.float32(len(losses)),
        }
        return losses.mean(), (updates["batch_stats"], sums)

    def gradients(part: Batch, key: Array) -> tuple[Any, Any, Metrics]:
        grads, (batch_stats, sums) = jax.grad(loss_fn, has_aux=True)(state.params, part, key)
        return grads, batch_stats, sums

    if accumulate == 1:
        grads, batch_stats, metrics = gradients(batch, drop_key)
    else:
        # Every part starts from the same running statistics, which are linear in those of a batch.
        parts = jax.tree.map(lambda x: _parts(x, accumulate, shares), batch)
        keys = jax.random.split(drop_key, accumulate)
        first = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts), keys[0])
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, gradients(*part)), None),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first),
            (parts, keys),
        )
        *means, metrics = total
        grads, batch_stats = jax.tree.map(lambda x: x / accumulate, means)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = jnp.asarray(learning_rate(state.step), jnp.float32)
    if damaged is not None:
        metrics["damaged"] = (damaged > 0).sum(dtype=jnp.float32)

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
    new = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
    if skip_nonfinite:
        # An update that is none is told by the gradient's norm too.
        fine = jnp.isfinite(optax.tree.norm(updates))
        metrics["grad_norm"] = jnp.where(fine, metrics["grad_norm"], jnp.nan)
        taken = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        def chosen(moved: Array, before: Array) -> Array:
            # Counts of steps go on, those of the optimizer's schedule among them.
            floating = jnp.issubdtype(moved.dtype, jnp.floating)
            return jnp.where(taken, moved, before) if floating else moved

        new = jax.tree.map(chosen, new, state)
    return new, metrics


def finite_leaves(tree: Any) -> Bool[Array, " leaves"]:
    """Of each array of a tree, in the order of its leaves, whether all its numbers are some."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def _parts(x: Array, parts: int, shares: int) -> Array:
    """(N, ...) to (parts, N / parts, ...), with an equal piece of each device's share in a part."""
    x = x.reshape(shares, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(parts, -1, *x.shape[3:])


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
        "loss": (cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])) * mask).sum(),
        "top1": (hits(logits, labels, 1) * mask).sum(),
        "top5": (hits(logits, labels, 5) * mask).sum(),
        "count": mask.sum(),
    }


def set_hits(
    logits: Float[Array, "n classes"], sets: Bool[Array, "n classes"], k: int
) -> Float[Array, " n"]:
    """1.0 where the largest logit of a set of labels is among the k largest, else 0.0.

    Ties and NaNs as in `hits`, which this is for sets of one; an empty set scores 0.
    """
    best = jnp.max(logits, axis=-1, keepdims=True, where=sets, initial=-jnp.inf)
    rivals = (~(logits < best) & ~sets).sum(axis=-1)
    known = sets.any(axis=-1) & ~jnp.isnan(best[:, 0])
    return ((rivals < k) & known).astype(jnp.float32)


def suite_step(
    variables: dict[str, Any],
    batch: Batch,
    *,
    apply_fn: Callable,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Metrics:
    """The sums of `eval_step`, and those of which calibration and each class's accuracy are made.

    Args:
      batch: as for `eval_step`. With "labels", int32 (N, classes), 1 for each label that is right,
        examples without any do not count, and there is neither a loss nor an accuracy of classes.

    Returns:
      "top1", "top5" and "count"; of each of `CALIBRATION_BINS` equal ranges of confidence, the
      greatest probability, "bin_count", "bin_top1" and "bin_confidence"; and unless there are sets
      of labels, "loss" and of each class "class_count" and "class_top1".
    """
    logits = predict_step(variables, batch["image"], apply_fn=apply_fn, mean=mean, std=std)
    labels, mask = batch["label"], batch["mask"]
    classes = logits.shape[-1]
    if "labels" in batch:
        sets = batch["labels"] > 0
        mask &= sets.any(axis=-1)
        top1, top5 = (set_hits(logits, sets, k) for k in (1, 5))
    else:
        top1, top5 = (hits(logits, labels, k) for k in (1, 5))
    mask = mask.astype(jnp.float32)
    top1, top5 = top1 * mask, top5 * mask
    # NaNs have no confidence; a bin holds its upper end, as Guo et al. have it.
    confidence = jnp.nan_to_num(jax.nn.softmax(logits).max(axis=-1))
    place = jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1
    place = jnp.clip(place, 0, CALIBRATION_BINS - 1)

    def shared(values: Array, among: Array, length: int) -> Array:
        return jnp.zeros(length, jnp.float32).at[among].add(values)

    sums = {
        "top1": top1.sum(),
        "top5": top5.sum(),
        "count": mask.sum(),
        "bin_count": shared(mask, place, CALIBRATION_BINS),
        "bin_top1": shared(top1, place, CALIBRATION_BINS),
        "bin_confidence": shared(confidence * mask, place, CALIBRATION_BINS),
    }
    if "labels" in batch:
        return sums
    losses = cross_entropy(logits, jax.nn.one_hot(labels, classes))
    return sums | {
        "loss": (losses * mask).sum(),
        "class_count": shared(mask, labels, classes),
        "class_top1": shared(top1, labels, classes),
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

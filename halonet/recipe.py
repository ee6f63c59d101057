"""What a configuration trains by: its schedule, its optimizer and its step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from halonet import optim, sharding, steps
from halonet.models import HaloNet, init_function


def schedule(config: ConfigDict, total: int) -> Callable:
    """The learning rate of each step, under the linear rule where the configuration asks for it."""
    rule = {"batch_size": config.data.batch_size, "base_batch": config.optim.base_batch}
    return optim.warmup_cosine(
        peak=optim.scaled(config.optim.learning_rate, **rule),
        total_steps=total,
        warmup=config.optim.warmup,
        floor=optim.scaled(config.optim.floor, **rule),
    )


def optimizer(config: ConfigDict, schedule: Callable) -> optax.GradientTransformation:
    """The optimizer of a configuration, which the learning rate of each step drives."""
    return optim.make_optimizer(
        config.optim.name,
        learning_rate=schedule,
        momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
        decay_tables=config.optim.decay_tables,
    )


def init_state(
    config: ConfigDict,
    model: HaloNet,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> Callable:
    """What makes a fresh state, uncompiled: key -> state."""
    return functools.partial(
        sharding.seeing(mesh, steps.init_state),
        init_fn=init_function(model, config.init.scheme),
        tx=tx,
        image_size=config.data.image_size,
        ema=config.train.ema_decay > 0,
    )


def train_step(
    config: ConfigDict,
    model: HaloNet,
    tx: optax.GradientTransformation,
    schedule: Callable,
    mesh: jax.sharding.Mesh,
) -> Callable:
    """The step, uncompiled: (state, batch) -> (state, metrics)."""
    return functools.partial(
        sharding.seeing(mesh, steps.train_step),
        apply_fn=model.apply,
        tx=tx,
        learning_rate=schedule,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        label_smoothing=config.train.label_smoothing,
        ema_decay=config.train.ema_decay,
        loss=_loss(config),
        mixing=_mixing(config),
        seed=config.seed,
        accumulate=config.train.accumulate,
        shares=mesh.size // mesh.shape["rows"],
        skip_nonfinite=config.train.skip_nonfinite > 0,
    )


def jitted_train_step(
    config: ConfigDict,
    model: HaloNet,
    tx: optax.GradientTransformation,
    schedule: Callable,
    mesh: jax.sharding.Mesh,
    shardings: Any,
) -> Callable:
    """The step, to be lowered for a state of these shardings, which is donated, and a batch."""
    of_batch = jax.tree.map(lambda x: x.sharding, abstract_batch(config, mesh))
    return jax.jit(
        train_step(config, model, tx, schedule, mesh),
        donate_argnums=0,
        in_shardings=(shardings, of_batch),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )


def abstract_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """The shapes of a global training batch, as the pipeline makes it."""
    n, size = config.data.batch_size, config.data.image_size

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        where = sharding.batch_sharding(mesh, len(shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    batch = {"image": array((n, size, size, 3), "uint8"), "label": array((n,), "int32")}
    return batch | ({"damaged": array((n,), "int32")} if config.data.damaged == "skip" else {})


def _loss(config: ConfigDict) -> Callable:
    if config.train.loss == "cross_entropy":
        return steps.cross_entropy
    threshold = config.train.target_threshold
    return functools.partial(steps.binary_cross_entropy, threshold=threshold)


def _mixing(config: ConfigDict) -> steps.Mixing | None:
    if not config.augment.mixup and not config.augment.cutmix:
        return None
    return steps.Mixing(
        mixup=config.augment.mixup,
        cutmix=config.augment.cutmix,
        cutmix_probability=config.augment.cutmix_probability,
        group=config.model.bn_group,
    )

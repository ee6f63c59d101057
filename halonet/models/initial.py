"""Initial weights other than those that the models' own layers draw."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from halonet.models.halonet import HaloNet
from halonet.models.tables import TABLES

SCHEMES = ("own", "mindcv")


def init_function(model: HaloNet, scheme: str) -> Callable[..., dict[str, Any]]:
    """What initialises a model: (key, images, train=False) -> {"params", "batch_stats"}.

    Args:
      scheme: "own" is `model.init`. "mindcv" draws kernels as MindCV's halonet_50t does, uniformly
        with variance 2 / fan_in, those of queries, keys and values and of the classifier too; and
        relative tables normally, of deviation 0.02, cut off at two. Scales are 1, also those of
        the last norm of each branch, so that no branch starts switched off.

    Raises:
      ValueError: for an unknown scheme.

    Source: mindcv/models/halonet.py at 94ef850, and MindSpore's HeUniform and TruncatedNormal.
    """
    if scheme == "own":
        return model.init
    if scheme != "mindcv":
        raise ValueError(f"unknown scheme '{scheme}'; there are: {', '.join(SCHEMES)}")

    def init(key: Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
        variables = model.init(key, *args, **kwargs)
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: _mindcv(key, path, leaf), variables["params"]
        )
        return {**variables, "params": params}

    return init


def _mindcv(key: Array, path: tuple, leaf: Array) -> Array:
    name = path[-1].key
    # By the path, so that what is drawn does not hang on what else there is.
    key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
    if name == "kernel":
        he_uniform = nn.initializers.variance_scaling(2.0, "fan_in", "uniform")
        return he_uniform(key, leaf.shape, leaf.dtype)
    if name in TABLES:
        return nn.initializers.truncated_normal(0.02)(key, leaf.shape, leaf.dtype)
    return jnp.ones_like(leaf) if name == "scale" else leaf

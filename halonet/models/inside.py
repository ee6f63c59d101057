"""Inside a model: what a query attends to, and which pixels of the image a place depends on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from halonet.models.halonet import HaloNet
from halonet.ops import attention_weights


def attention_layers(model: HaloNet) -> dict[str, str]:
    """The layers that `attention_map` can show, in order: name -> kind, a letter of the plan.

    The names are those of the blocks: {"stage1_block1": "h", ...}.
    """
    return {
        f"stage{stage}_block{number}": block.kind
        for stage, blocks in enumerate(model.stages(), start=1)
        for number, block in enumerate(blocks, start=1)
        if block.kind in "hb"
    }


def attention_map(
    model: HaloNet,
    variables: dict[str, Any],
    images: Float[Array, "n h w 3"],
    *,
    layer: str,
    query: tuple[int, int],
) -> Float[Array, "n heads h2 w2"]:
    """The weights that one query of a layer gives to the pixels of the layer's map.

    Args:
      model: that of a run, `run.model`.
      variables: likewise, `run.variables`.
      images: normalised, as `run.preprocess` gives them, of a size that the model takes.
      layer: one of `attention_layers(model)`.
      query: row and column among the layer's queries: those of its output, but for layers that
        pool it (`downsample="pool"`, global attention), where they are those of its input.

    Returns:
      Weights on the map of the layer's keys, its input: for each head they sum to 1, less what the
      border outside of the map has (`border="zeros"`); 0 beyond the window.

    Raises:
      ValueError: for an unknown layer, listing those there are, and a query that it does not have.
    """
    layers = attention_layers(model)
    if layer not in layers:
        known = ", ".join(layers) or "none"
        raise ValueError(f"layer {layer!r} has no attention to show; these do: {known}")
    queries, keys = _queries_and_keys(model, layer)(variables, images)
    everywhere = layers[layer] == "b"
    block, halo = (model.global_size, 0) if everywhere else (model.block_size, model.halo_size)
    height, width = keys.shape[1:3]
    stride = -(-height // queries.shape[1])
    tables = variables["params"][layer]["attention"]
    weights = attention_weights(
        queries,
        keys,
        tables["row_table"],
        tables["col_table"],
        query=query,
        block=block,
        halo=halo,
        stride=stride,
        border=model.border,
        positions=model.positions,
        scale_positions=model.scale_positions,
    )
    # The whole map with room around it for every window, of which the middle is left.
    top, left = (stride * at // block * block for at in query)
    beyond = block + halo
    room = (*weights.shape[:2], height + 2 * beyond, width + 2 * beyond)
    canvas = jnp.zeros(room, weights.dtype)
    canvas = jax.lax.dynamic_update_slice(canvas, weights, (0, 0, top + block, left + block))
    return canvas[:, :, beyond : beyond + height, beyond : beyond + width]


def receptive_field(
    model: HaloNet,
    variables: dict[str, Any],
    images: Float[Array, "n h w 3"],
    *,
    stage: int,
    place: tuple[int, int],
    draws: int = 8,
) -> Float[Array, "n h w"]:
    """How much one place of a stage's map depends on each pixel of the image.

    That is the Frobenius norm of the derivative of the place's channels by the pixel's three, at
    these images: exactly 0 where nothing of the pixel arrives. Its square is estimated as the mean
    over random cotangents z of the norm of z's pull-back, squared, which is right on average.

    Args:
      model: as of `attention_map`.
      variables: likewise.
      images: likewise.
      stage: from 1; see `model.features` for the strides of the maps.
      place: row and column in the stage's map.
      draws: random cotangents, of a fixed seed.

    Raises:
      ValueError: for a stage or a place that the model does not have.

    Source: effective receptive fields, Luo et al., 2016, arXiv 1701.04128; the estimate of the norm
    is Hutchinson's.
    """
    if not 1 <= stage <= len(model.depths):
        raise ValueError(f"stage {stage} of {len(model.depths)}; they count from 1")
    height, width = (-(-size // model.features[stage - 1][0]) for size in images.shape[1:3])
    if not (0 <= place[0] < height and 0 <= place[1] < width):
        raise ValueError(f"place {place} is not in the map of stage {stage}, {height} x {width}")
    return _norms(model.clone(features_only=True), stage, draws)(variables, images, *place)


# Compiled once a model, whatever is asked of it then.
@functools.lru_cache(maxsize=8)
def _queries_and_keys(model: HaloNet, layer: str):
    backbone = model.clone(features_only=True)

    def found(variables, images):
        _, sown = backbone.apply(variables, images, train=False, mutable=["intermediates"])
        return sown["intermediates"][layer]["attention"]["queries_keys"][0]

    return jax.jit(found)


@functools.lru_cache(maxsize=8)
def _norms(backbone: HaloNet, stage: int, draws: int):
    def norms(variables, images, row, column):
        def channels(images):
            return backbone.apply(variables, images, train=False)[stage - 1][:, row, column]

        out, pull = jax.vjp(channels, images)

        def squared(key: Array) -> Float[Array, "n h w"]:
            (gradient,) = pull(jax.random.normal(key, out.shape, out.dtype))
            return jnp.square(gradient).sum(axis=-1)

        return jnp.sqrt(jax.lax.map(squared, jax.random.split(jax.random.key(0), draws)).mean(0))

    return jax.jit(norms)

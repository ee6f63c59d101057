"""What a model costs, part by part: multiply-adds of one image, told apart, and parameters.

Counted are the products of convolutions, dense layers and attention; not norms, activations, sums,
pooling and ECA's gates, a few thousand products. (timm's published figures hold two more for each
value that batch norm touches, and then agree with these in every digit: `tests/test_cost.py`.)
"""

from __future__ import annotations

import collections
import dataclasses

import jax

from halonet.models.block import BlockShape
from halonet.models.halonet import HaloNet
from halonet.models.hybrids import LambdaLayer, squeezed_width


@dataclasses.dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one image.

    Attributes:
      projections: convolutions of any size (queries, keys, values and shortcuts among them), dense
        layers, squeeze-and-excitation. Attention projects before it pads.
      content: queries times keys: whole windows, also where they reach out of the image, and whole
        blocks, also where they are padded.
      position: queries times relative tables: each query times 2(b+2h)-1 rows of either table, as
        timm computes it; what it needs are b+2h of them. 0 for a model without positions.
      value: weights times values, whole windows as in `content`.

    Of a lambda layer, `content` and `position` are its two kinds of lambda, made and applied.
    """

    projections: int = 0
    content: int = 0
    position: int = 0
    value: int = 0

    def __add__(self, other: MultiplyAdds) -> MultiplyAdds:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return MultiplyAdds(*(mine + theirs for mine, theirs in pairs))

    @property
    def attention(self) -> int:
        return self.content + self.position + self.value

    @property
    def total(self) -> int:
        return self.projections + self.attention


@dataclasses.dataclass(frozen=True)
class Part:
    """The stem, a stage or the head of a network.

    Attributes:
      name: "stem", "stage1" and so on, "head".
      kinds: of a stage, a letter a block, see `stage_plan`.
      height, width, channels: of the map that it makes.
      block, halo, heads: of its attention; 0 where there is none.
      cost: for one image.
    """

    name: str
    kinds: str
    height: int
    width: int
    channels: int
    block: int
    halo: int
    heads: int
    cost: MultiplyAdds


def cost(model: HaloNet, height: int, width: int) -> list[Part]:
    """Returns the parts of a model and what one image of height x width pixels costs in each.

    Raises:
      ValueError: for sizes and fields that the model refuses.
    """
    model.check_fields()
    model.check_image_size(height, width)
    stem, height, width = _stem(model, height, width)
    channels = model.stem_widths[-1]
    parts = [Part("stem", "", height, width, channels, 0, 0, 0, stem)]
    for number, blocks in enumerate(model.stages(), start=1):
        spent = MultiplyAdds()
        for shape in blocks:
            spent += _block(model, shape, height, width)
            height, width, channels = *strided(height, width, shape.stride), shape.out_width
        kinds = "".join(shape.kind for shape in blocks)
        window = {"h": (model.block_size, model.halo_size), "b": (model.global_size, 0)}
        block, halo = next((window[kind] for kind in kinds if kind in window), (0, 0))
        heads = 0 if set(kinds) == {"c"} else blocks[0].heads
        name = f"stage{number}"
        parts.append(Part(name, kinds, height, width, channels, block, halo, heads, spent))
    if not model.features_only:
        final = height * width * channels * model.final_width
        dense = (model.final_width or channels) * model.num_classes
        head = MultiplyAdds(final + dense)
        parts.append(Part("head", "", 1, 1, model.num_classes, 0, 0, 0, head))
    return parts


def parameters(model: HaloNet, height: int, width: int) -> dict[str, int]:
    """Returns the trainable parameters of each part, by name; nothing is computed for it."""
    # Which implementation makes no difference to the parameters, but this one is traced fast.
    model = model.clone(implementation="xla_shift")
    counts = collections.Counter()
    for name, tree in model.abstract_variables(height, width)["params"].items():
        part = name.split("_")[0]  # stem_conv1, stage1_block1, final_conv
        part = "head" if part == "final" else part
        counts[part] += sum(leaf.size for leaf in jax.tree.leaves(tree))
    return dict(counts)


def strided(height: int, width: int, stride: int) -> tuple[int, int]:
    """The size of every `stride`-th pixel of a map."""
    return -(-height // stride), -(-width // stride)


def _stem(model: HaloNet, height: int, width: int) -> tuple[MultiplyAdds, int, int]:
    """Returns the cost of the stem and the size of the map that it makes."""
    spent, channels = 0, 3
    for features, stride in zip(model.stem_widths, model.stem_strides, strict=True):
        height, width = strided(height, width, stride)
        spent += height * width * model.stem_kernel**2 * channels * features
        channels = features
    if model.stem_pool != "none":
        height, width = strided(height, width, 2)
    return MultiplyAdds(spent), height, width


def _block(model: HaloNet, shape: BlockShape, height: int, width: int) -> MultiplyAdds:
    """The cost of a block, for a map of height x width that enters it."""
    entering = height * width
    out_height, out_width = strided(height, width, shape.stride)
    leaving = out_height * out_width
    spent = entering * shape.in_width * shape.width
    spent += leaving * shape.value_width * shape.out_width
    if shape.shortcut == "project":
        spent += leaving * shape.in_width * shape.out_width
    if model.channel_attention == "se" and shape.kind in model.channel_attention_in:
        channels = shape.value_width
        spent += 2 * channels * squeezed_width(channels, model.squeeze_ratio)
    outside = MultiplyAdds(spent)

    if shape.kind == "c":
        group = model.group_width or shape.width
        return outside + MultiplyAdds(leaving * 9 * group * shape.value_width)
    if shape.kind == "l":
        return outside + _lambda(shape, entering)
    return outside + _attention(model, shape, height, width)


def _attention(model: HaloNet, shape: BlockShape, height: int, width: int) -> MultiplyAdds:
    everywhere = shape.kind == "b"
    block, halo = (model.global_size, 0) if everywhere else (model.block_size, model.halo_size)
    # Pooling comes after the attention of all queries.
    pooled = everywhere or model.downsample == "pool"
    stride = 1 if pooled else shape.stride
    kept_height, kept_width = strided(height, width, stride)
    projected = kept_height * kept_width * shape.key_width
    projected += height * width * (shape.key_width + shape.value_width)

    blocks_down, blocks_across = strided(height, width, block)
    queries = blocks_down * blocks_across * (block // stride) ** 2
    side = block + 2 * halo
    return MultiplyAdds(
        projections=projected * shape.width,
        content=queries * side**2 * shape.key_width,
        position=0 if model.positions == "none" else queries * 2 * (2 * side - 1) * shape.key_width,
        value=queries * side**2 * shape.value_width,
    )


def _lambda(shape: BlockShape, pixels: int) -> MultiplyAdds:
    keys, values = LambdaLayer.key_dim, shape.value_width // shape.heads
    applied = pixels * shape.heads * keys * values
    return MultiplyAdds(
        projections=pixels * shape.width * (shape.heads * keys + keys + values),
        content=pixels * keys * values + applied,
        position=pixels * LambdaLayer.radius**2 * keys * values + applied,
    )

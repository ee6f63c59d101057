"""HaloNet: a ResNet whose 3x3 convolutions are halo attention, wholly or in part.

Source: Vaswani et al. 2021, arXiv 2103.12731. No official code exists; where the paper is silent
the choice made here is named beside the line that makes it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from halonet.models.attention import DOWNSAMPLES, LAYER_POSITIONS
from halonet.models.block import (
    ACTIVATIONS,
    KINDS,
    REMATS,
    BlockShape,
    BottleneckBlock,
    call,
    stage_plan,
)
from halonet.models.hybrids import CHANNEL_ATTENTIONS
from halonet.models.layers import (
    BatchNorm,
    Conv1x1,
    HalvingConv,
    convolution,
    he_normal,
    matmul_precision,
)
from halonet.models.pool import max_pool, max_pool_zeros
from halonet.ops import BORDERS, IMPLEMENTATIONS

STEM_POOLS = ("none", "max", "max_zeros")
SHORTCUTS = ("project", "matching")


class HaloNet(nn.Module):
    """HaloNet: images (N, H, W, 3), already normalised, to logits (N, num_classes) in float32.

    `model.apply(variables, images, train=False)` evaluates; with `train=True` the collection
    "batch_stats" is updated and must be mutable.

    Attributes:
      num_classes: width of the logits.
      block_size, halo_size: b and h of the paper, in pixels of each stage's map.
      depths: blocks per stage; the first block of every stage but the first halves the map.
      plan: what each stage or block is made of, see `stage_plan`.
      widths: d per stage, the channels inside a block.
      heads: attention heads per stage.
      value_ratio: r_v of the paper; values, or what a 3x3 convolution makes, have d * r_v channels.
      key_ratio: queries and keys have d * key_ratio channels; one number, or one a stage.
      out_ratio: r_b of the paper; a block makes d * r_b channels; one number, or one a stage.
      expand_ratio: 0, or RegNetZ's blocks: inside them this times the channels that enter, no
        shortcut where shapes differ and no activation after the sum; they make `widths` channels.
      final_width: d_f, channels of the 1x1 convolution before pooling; 0 leaves it out.
      stem_widths, stem_kernel: channels of the stem's convolutions, and their size in pixels. The
        first one has stride 2; the last of several too, where no pooling follows.
      stem_pool: "max", a 3x3 max-pool of stride 2; "max_zeros", where the zeros around the map take
        part; or "none".
      first_stride: of the first stage.
      group_width: channels per group of the 3x3 convolutions; 0 is one group.
      channel_attention: "none", "se" (squeeze-and-excitation) or "eca".
      channel_attention_in: letters of the plan, the kinds of block that have it.
      squeeze_ratio: width of squeeze-and-excitation's inner layer.
      activation: "relu" or "silu".
      shortcut: where a 1x1 convolution leads around a block: "project", around the first block of
        each stage (ours, as the counts of the wider models need it), or "matching", only where the
        shapes differ.
      downsample, border, positions, scale_positions: conventions of the attention, see
        `HaloAttention`.
      global_size: side in pixels of the map that a "b" block attends to as a whole.
      pad_to_blocks: takes images of any size: the input of an attention layer is padded to whole
        blocks, and its output cropped.
      features_only: returns the tuple of the stages' maps (N, H/stride, W/stride, channels)
        instead of logits, for detectors; see `features`.
      implementation: see `halonet.halo_attention`.
      bn_group: examples per group of batch-norm statistics, see `BatchNorm`.
      remat: what the backward pass computes again instead of keeping it from the forward pass:
        "none", "attention" (queries, keys, values and what comes of them) or "block" (whole
        residual blocks: only their outputs are kept). The results are the same to rounding.
      drop_path: probability that the last block's branch is left out for an example in training;
        it grows linearly from 0 at the first block. What is kept is scaled up.
      dropout: probability of each pooled channel to be zero in training, before the classifier.
        Both draw from the random stream "dropout".
      dtype, param_dtype: of the computation and of the parameters.

    Raises:
      ValueError: for image sizes that the blocks do not divide, naming the nearest that work, and
        for attributes that do not fit together.
    """

    num_classes: int
    block_size: int = 8
    halo_size: int = 3
    depths: tuple[int, ...] = (3, 3, 7, 3)
    plan: str = ""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    heads: tuple[int, ...] = (4, 8, 8, 8)
    value_ratio: float = 1.0
    key_ratio: float | tuple[float, ...] = 1.0
    out_ratio: float | tuple[float, ...] = 1.0
    expand_ratio: float = 0.0
    final_width: int = 0
    stem_widths: tuple[int, ...] = (64,)
    stem_kernel: int = 7
    stem_pool: str = "max"
    first_stride: int = 1
    group_width: int = 0
    channel_attention: str = "none"
    channel_attention_in: str = "ch"
    squeeze_ratio: float = 1 / 16
    activation: str = "relu"
    shortcut: str = "project"
    downsample: str = "queries"
    border: str = "zeros"
    positions: str = "exact"
    scale_positions: bool = True
    global_size: int = 0
    pad_to_blocks: bool = False
    features_only: bool = False
    implementation: str | None = None
    bn_group: int = 0
    remat: str = "none"
    drop_path: float = 0.0
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32

    def stages(self) -> tuple[tuple[BlockShape, ...], ...]:
        """The blocks of each stage, in numbers."""
        for name in ("depths", "widths", "heads", "stem_widths"):
            numbers = getattr(self, name)
            if not numbers or not all(isinstance(it, int) and it > 0 for it in numbers):
                raise ValueError(f"{name} {numbers} must be positive whole numbers")
        for name in ("widths", "heads", "key_ratio", "out_ratio"):
            numbers = getattr(self, name)
            if isinstance(numbers, Sequence) and len(numbers) != len(self.depths):
                raise ValueError(
                    f"{name} {numbers} must have {len(self.depths)} numbers, one a stage"
                )
        stages, in_width = [], self.stem_widths[-1]
        for stage, letters in enumerate(stage_plan(self.plan, self.depths)):
            blocks = []
            for block, kind in enumerate(letters):
                blocks.append(self._block(stage, block, kind, in_width))
                in_width = blocks[-1].out_width
            stages.append(tuple(blocks))
        return tuple(stages)

    def _block(self, stage: int, block: int, kind: str, in_width: int) -> BlockShape:
        first, heads = block == 0, self.heads[stage]
        stride = 1 if not first else self.first_stride if stage == 0 else 2
        out_width = round(self.widths[stage] * _of_stage(self.out_ratio, stage))
        width = round(self.expand_ratio * in_width) or self.widths[stage]
        if kind != "c" and width % heads:
            raise ValueError(f"width {width} cannot be shared by {heads} heads")
        differs = in_width != out_width or stride > 1
        shortcut = "identity"
        if differs or (first and self.shortcut == "project"):
            shortcut = "none" if self.expand_ratio else "project"
        block = BlockShape(
            kind=kind,
            in_width=in_width,
            width=width,
            out_width=out_width,
            key_width=heads * round(width / heads * _of_stage(self.key_ratio, stage)),
            # A convolution's channels are of no head.
            value_width=round(width * self.value_ratio)
            if kind == "c"
            else heads * round(width / heads * self.value_ratio),
            heads=heads,
            stride=stride,
            shortcut=shortcut,
        )
        if min(dataclasses.astuple(block)[1:-1]) < 1:
            raise ValueError(f"a block of stage {stage + 1} would have no channels: {block}")
        return block

    @property
    def stem_strides(self) -> tuple[int, ...]:
        """Of the stem's convolutions: the first halves, and the last of several without a pool."""
        last = len(self.stem_widths) - 1
        ends = {0} if self.stem_pool != "none" else {0, last}
        return tuple(2 if number in ends else 1 for number in range(last + 1))

    @property
    def stem_stride(self) -> int:
        """Pixels of the image per pixel of the map that enters the first stage."""
        return math.prod(self.stem_strides) * (1 if self.stem_pool == "none" else 2)

    @property
    def features(self) -> tuple[tuple[int, int], ...]:
        """(stride, channels) of each stage's map, as `features_only` returns them."""
        stride, found = self.stem_stride, []
        for blocks in self.stages():
            stride *= math.prod(block.stride for block in blocks)
            found.append((stride, blocks[-1].out_width))
        return tuple(found)

    @property
    def size_unit(self) -> int:
        """Image heights and widths must be multiples of this many pixels."""
        stride, unit = self.stem_stride, 1
        for block in (block for blocks in self.stages() for block in blocks):
            if block.kind == "h" and not self.pad_to_blocks:
                unit = math.lcm(unit, stride * self.block_size)
            stride *= block.stride
        return unit

    def check_image_size(self, height: int, width: int) -> None:
        """Raises ValueError unless every attention layer can take its map."""
        for what, size in (("height", height), ("width", width)):
            if size < 1:
                raise ValueError(f"image {what} {size} is not positive")
        stride = self.stem_stride
        for block in (block for blocks in self.stages() for block in blocks):
            size = self.global_size * stride
            if block.kind == "b" and (height, width) != (size, size):
                raise ValueError(
                    f"image size {height}x{width} does not fit the tables of global attention, "
                    f"{self.global_size}x{self.global_size} at stride {stride}: {size}x{size} does"
                )
            stride *= block.stride
        unit = self.size_unit
        for what, size in (("height", height), ("width", width)):
            if size % unit:
                below, above = size // unit * unit, (size // unit + 1) * unit
                nearest = f"{below} and {above}" if below > 0 else f"{above}"
                raise ValueError(
                    f"image {what} {size} cannot be cut into blocks of {self.block_size} in every "
                    f"stage (the last has stride {unit // self.block_size}); the nearest that "
                    f"work: {nearest}; with pad_to_blocks any size does"
                )

    def check_row_devices(self, height: int, devices: int) -> None:
        """Raises ValueError unless so many devices can share the rows of all maps, in whole blocks.

        Args:
          height: of images, in pixels; one that `check_image_size` takes.
          devices: along the mesh axis "rows".
        """
        if devices == 1:
            return
        # Of each stage, what its devices cannot divide further, in pixels of the image.
        stride, units = self.stem_stride, []
        for stage, blocks in enumerate(self.stages(), start=1):
            for block in blocks:
                if block.kind in "bl":
                    raise ValueError(
                        f"mesh.rows={devices}, but stage {stage} has {KINDS[block.kind]}, of which "
                        "every pixel needs the whole map: mesh.rows can be 1"
                    )
                if block.kind == "h":
                    units.append((stride * self.block_size, f"rows of blocks of stage {stage}"))
                stride *= block.stride
                units.append((stride, f"rows of the maps of stage {stage}"))
        for unit, what in units:
            if height % (unit * devices):
                can = [
                    number
                    for number in range(1, height + 1)
                    if number == 1 or not any(height % (unit * number) for unit, _ in units)
                ]
                least = math.lcm(*(unit for unit, _ in units)) * devices
                below = height // least * least
                sizes = f"{below} or {below + least}" if below else f"{least}"
                raise ValueError(
                    f"mesh.rows={devices} does not divide the {what}, {-(-height // unit)}; for "
                    f"{height} pixels mesh.rows can be {' or '.join(map(str, can))}, and with "
                    f"mesh.rows={devices} an image can have {sizes} pixels"
                )

    def check_fields(self) -> None:
        """Raises ValueError where an attribute makes no sense or some do not fit together."""
        choices = {
            "downsample": DOWNSAMPLES,
            "border": BORDERS,
            "positions": LAYER_POSITIONS,
            "stem_pool": STEM_POOLS,
            "channel_attention": CHANNEL_ATTENTIONS,
            "activation": tuple(ACTIVATIONS),
            "shortcut": SHORTCUTS,
            "implementation": (None, *IMPLEMENTATIONS),
            "remat": REMATS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                named = ", ".join(map(str, known))
                raise ValueError(f"{name} {value!r} is unknown; there are: {named}")
        least = {"halo_size": 0, "final_width": 0, "group_width": 0, "global_size": 0}
        least |= dict.fromkeys(("num_classes", "block_size", "first_stride", "stem_kernel"), 1)
        for name, number in least.items():
            value = getattr(self, name)
            if value < number:
                raise ValueError(f"{name} {value} must be at least {number}")
        for name in ("drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        if self.stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel {self.stem_kernel} must be odd")
        blocks = [block for blocks in self.stages() for block in blocks]
        kinds = {block.kind for block in blocks}
        for block in blocks:
            self._check_block(block)
        if self.channel_attention != "none" and not kinds & set(self.channel_attention_in):
            raise ValueError(
                f"channel_attention {self.channel_attention!r} is in no block: this model has none "
                f"of the kinds {self.channel_attention_in!r}"
            )
        if "b" in kinds and not self.global_size:
            raise ValueError("b blocks need global_size, the side of the map that they see")

    def _check_block(self, block: BlockShape) -> None:
        subsampled = block.kind == "h" and self.downsample == "queries"
        if subsampled and self.block_size % block.stride:
            raise ValueError(
                f"block_size {self.block_size} is odd, and queries are kept by twos; take an even "
                "one, or downsample 'pool'"
            )
        group = self.group_width or 1
        if block.kind == "c" and (block.width % group or block.value_width % group):
            raise ValueError(
                f"group_width {group} does not divide the {block.width} channels of a block"
            )

    def abstract_variables(self, height: int, width: int) -> dict[str, Any]:
        """Shapes and dtypes of the variables, for images of a size that the model takes."""
        images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        init = functools.partial(self.init, jax.random.key(0), train=False)
        return jax.eval_shape(init, images)

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w c"], *, train: bool
    ) -> Float[Array, "n num_classes"] | tuple[Float[Array, "n _ _ _"], ...]:
        self.check_fields()
        self.check_image_size(*images.shape[1:3])
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        act = ACTIVATIONS[self.activation]

        x = self._stem(images, train=train)
        maps = []
        stages = self.stages()
        drop_paths = iter(np.linspace(0, self.drop_path, sum(map(len, stages))).tolist())
        for stage, blocks in enumerate(stages, start=1):
            for number, shape in enumerate(blocks, start=1):
                block = BottleneckBlock(
                    shape=shape,
                    block_size=self.block_size,
                    halo_size=self.halo_size,
                    group_width=self.group_width,
                    channel_attention=self.channel_attention,
                    channel_attention_in=self.channel_attention_in,
                    squeeze_ratio=self.squeeze_ratio,
                    activation=self.activation,
                    activate_sum=not self.expand_ratio,
                    downsample=self.downsample,
                    border=self.border,
                    positions=self.positions,
                    scale_positions=self.scale_positions,
                    pad_to_blocks=self.pad_to_blocks,
                    global_size=self.global_size,
                    implementation=self.implementation,
                    bn_group=self.bn_group,
                    remat=self.remat,
                    drop_path=next(drop_paths),
                    name=f"stage{stage}_block{number}",
                    **dtypes,
                )
                x = call(block, x, remat=self.remat == "block", train=train)
            maps.append(x)
        if self.features_only:
            return tuple(maps)

        if self.final_width:
            x = Conv1x1(self.final_width, name="final_conv", **dtypes)(x)
            # Norm and activation here are ours, as timm and keras_cv_attention_models have them.
            x = act(BatchNorm(self.bn_group, name="final_bn", **dtypes)(x, train=train))
        x = x.mean(axis=(1, 2), dtype=jnp.promote_types(jnp.float32, x.dtype))
        if self.dropout:
            x = nn.Dropout(self.dropout, name="dropout_head")(x, deterministic=not train)
        # The classifier is float32 under bfloat16: it costs nothing and the loss needs it.
        return nn.Dense(
            self.num_classes,
            dtype=x.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(0.01),
            precision=jax.lax.Precision.HIGHEST,
            name="head",
        )(x)

    def _stem(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h2 w2 c2"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layers = zip(self.stem_widths, self.stem_strides, strict=True)
        for number, (width, stride) in enumerate(layers, start=1):
            name = f"stem_conv{number}"
            if number == 1:
                x = HalvingConv(width, self.stem_kernel, name=name, **dtypes)(x)
            else:
                x = nn.Conv(
                    width,
                    (self.stem_kernel, self.stem_kernel),
                    strides=stride,
                    padding=self.stem_kernel // 2,
                    use_bias=False,
                    kernel_init=he_normal,
                    precision=matmul_precision(self.dtype),
                    conv_general_dilated=convolution,
                    name=name,
                    **dtypes,
                )(x)
            x = BatchNorm(self.bn_group, name=f"stem_bn{number}", **dtypes)(x, train=train)
            x = ACTIVATIONS[self.activation](x)
        if self.stem_pool == "none":
            return x
        return max_pool(x) if self.stem_pool == "max" else max_pool_zeros(x)


def _of_stage(ratio: float | Sequence[float], stage: int) -> float:
    """A field that is one number, or one a stage."""
    return ratio[stage] if isinstance(ratio, Sequence) else ratio

"""The residual block of every model here, and the strings that say what stands inside it."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from halonet.models.attention import HaloAttention
from halonet.models.hybrids import EfficientChannelAttention, LambdaLayer, SqueezeExcite
from halonet.models.layers import (
    BatchNorm,
    Conv1x1,
    average_pool,
    convolution,
    he_normal,
    matmul_precision,
)

KINDS = {"c": "convolution", "h": "halo attention", "b": "global attention", "l": "lambda layer"}
ACTIVATIONS = {"relu": nn.relu, "silu": nn.silu}
REMATS = ("none", "attention", "block")


def call(layer: nn.Module, x: Array, *, remat: bool, **kwargs) -> Array:
    """`layer(x, **kwargs)`; with `remat` only x is kept for the backward pass, which starts there.

    Around a call, because `nn.remat` of a class would make a traced value of `train`.
    """
    if not remat:
        return layer(x, **kwargs)
    return nn.remat(lambda layer, x: layer(x, **kwargs))(layer, x)


def stage_plan(plan: str, depths: tuple[int, ...]) -> tuple[str, ...]:
    """Spells a plan out: one string a stage, one letter a block.

    Args:
      plan: stages separated by "/", each one letter for all of its blocks or a letter a block:
        "c/c/h/h", "ccc/ccch/chchch/chc". "" is halo attention everywhere.
      depths: blocks per stage.

    Raises:
      ValueError: for letters not in `KINDS` and for lengths that do not fit `depths`.
    """
    stages = plan.split("/") if plan else ["h"] * len(depths)
    if len(stages) != len(depths):
        raise ValueError(
            f"plan {plan!r} has {len(stages)} stages; depths {depths} have {len(depths)}"
        )
    for number, (letters, depth) in enumerate(zip(stages, depths, strict=True), start=1):
        for letter in letters:
            if letter not in KINDS:
                known = ", ".join(f"{key} ({kind})" for key, kind in KINDS.items())
                raise ValueError(f"plan {plan!r} has a block {letter!r}; there are {known}")
        if len(letters) not in (1, depth):
            raise ValueError(
                f"plan {plan!r} has {len(letters)} blocks in stage {number}; "
                f"write one letter, or {depth}"
            )
    return tuple(
        letters * depth if len(letters) == 1 else letters
        for letters, depth in zip(stages, depths, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """One block of a network, in numbers.

    Attributes:
      kind: a letter of the plan, what stands between the two 1x1 convolutions.
      in_width, width, out_width: channels that enter the block, inside it, and that leave it.
      key_width, value_width: channels of queries and of keys, and of values, over all heads; a
        convolution makes `value_width` channels of `width`.
      heads: of attention.
      stride: of the block.
      shortcut: "project" (a strided 1x1 convolution), "identity" or "none".
    """

    kind: str
    in_width: int
    width: int
    out_width: int
    key_width: int
    value_width: int
    heads: int
    stride: int
    shortcut: str


class BottleneckBlock(nn.Module):
    """1x1 convolution, convolution or attention, 1x1 convolution, and a shortcut around them.

    (N, H, W, in_width) -> (N, ceil(H/stride), ceil(W/stride), out_width). The attributes are those
    of `HaloNet`.
    """

    shape: BlockShape
    block_size: int
    halo_size: int
    group_width: int
    channel_attention: str
    channel_attention_in: str
    squeeze_ratio: float
    activation: str
    activate_sum: bool
    downsample: str
    border: str
    positions: str
    scale_positions: bool
    pad_to_blocks: bool
    global_size: int
    implementation: str | None
    bn_group: int
    remat: str
    drop_path: float
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h2 w2 f"]:
        shape, act = self.shape, ACTIVATIONS[self.activation]
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(y: Array, name: str, **kwargs) -> Array:
            return BatchNorm(self.bn_group, name=name, **dtypes, **kwargs)(y, train=train)

        y = Conv1x1(shape.width, name="conv1", **dtypes)(x)
        y = act(norm(y, "bn1"))
        y = self._mix(y, train=train)
        y = act(norm(y, "bn2"))
        if shape.kind in self.channel_attention_in:
            if self.channel_attention == "se":
                y = SqueezeExcite(self.squeeze_ratio, name="channel_attention", **dtypes)(y)
            elif self.channel_attention == "eca":
                y = EfficientChannelAttention(name="channel_attention", **dtypes)(y)
        y = Conv1x1(shape.out_width, name="conv3", **dtypes)(y)
        # Zero: each residual branch starts switched off, and the network as its shortcuts.
        alone = shape.shortcut == "none"
        y = norm(y, "bn3", scale_init=nn.initializers.ones if alone else nn.initializers.zeros)
        if self.drop_path and not alone:
            # Of a whole example: Huang et al., Deep networks with stochastic depth, 1603.09382.
            drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), name="drop_path")
            y = drop(y, deterministic=not train)
        if shape.shortcut == "project":
            x = Conv1x1(shape.out_width, shape.stride, name="shortcut_conv", **dtypes)(x)
            x = norm(x, "shortcut_bn")
        y = y if alone else x + y
        return act(y) if self.activate_sum else y

    def _mix(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h2 w2 v"]:
        """The layer between the 1x1 convolutions: where pixels meet."""
        shape = self.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if shape.kind == "c":
            return nn.Conv(
                shape.value_width,
                (3, 3),
                strides=shape.stride,
                padding=1,
                feature_group_count=shape.width // self.group_width if self.group_width else 1,
                use_bias=False,
                kernel_init=he_normal,
                precision=matmul_precision(self.dtype),
                conv_general_dilated=convolution,
                name="conv2",
                **dtypes,
            )(x)
        if shape.kind == "l":
            options = {"bn_group": self.bn_group, **dtypes}
            y = LambdaLayer(shape.heads, shape.value_width, name="lambda", **options)(
                x, train=train
            )
            return average_pool(y, shape.stride) if shape.stride > 1 else y
        everywhere = shape.kind == "b"
        attention = HaloAttention(
            block_size=self.global_size if everywhere else self.block_size,
            halo_size=0 if everywhere else self.halo_size,
            heads=shape.heads,
            head_dim=shape.key_width // shape.heads,
            value_head_dim=shape.value_width // shape.heads,
            out_projection=False,
            stride=shape.stride,
            downsample="pool" if everywhere else self.downsample,
            border=self.border,
            positions=self.positions,
            scale_positions=self.scale_positions,
            pad_to_blocks=self.pad_to_blocks,
            implementation=self.implementation,
            # As the BoTNet authors initialise theirs; the norm that follows sets the scale.
            kernel_init=nn.initializers.normal(0.01),
            name="attention",
            **dtypes,
        )
        return call(attention, x, remat=self.remat == "attention")

"""HaloNet: a ResNet whose 3x3 convolutions are halo attention.

Source: Vaswani et al. 2021, arXiv 2103.12731. No official code exists; where the paper is silent
the choice made here is named beside the line that makes it.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from halonet.models.attention import HaloAttention
from halonet.models.layers import BatchNorm, Conv1x1, he_normal, matmul_precision


class HaloBlock(nn.Module):
    """A bottleneck block: 1x1 convolution, halo attention, 1x1 convolution, shortcut.

    (N, H, W, C) -> (N, H/stride, W/stride, width * out_ratio). `value_ratio` widens the values
    only, `out_ratio` the output only; both follow from the published parameter counts.

    Attributes:
      width: channels of queries and keys, the d of the stage.
      project_shortcut: whether the shortcut is a strided 1x1 convolution (the first block of each
        stage; ours, as the counts of the wider models need it) or the identity.
    """

    width: int
    block_size: int
    halo_size: int
    heads: int
    value_ratio: float
    out_ratio: float
    stride: int
    project_shortcut: bool
    border: str
    implementation: str | None
    bn_group: int
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h2 w2 f"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(y: Array, name: str, **kwargs) -> Array:
            return BatchNorm(self.bn_group, name=name, **dtypes, **kwargs)(y, train=train)

        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be shared by {self.heads} heads")
        head_dim = self.width // self.heads
        y = Conv1x1(self.width, name="conv1", **dtypes)(x)
        y = nn.relu(norm(y, "bn1"))
        y = HaloAttention(
            block_size=self.block_size,
            halo_size=self.halo_size,
            heads=self.heads,
            head_dim=head_dim,
            value_head_dim=round(head_dim * self.value_ratio),
            out_projection=False,
            stride=self.stride,
            border=self.border,
            implementation=self.implementation,
            # As the BoTNet authors initialise theirs; the norm that follows sets the scale.
            kernel_init=nn.initializers.normal(0.01),
            name="attention",
            **dtypes,
        )(y)
        y = nn.relu(norm(y, "bn2"))
        y = Conv1x1(round(self.width * self.out_ratio), name="conv3", **dtypes)(y)
        # Zero: each residual branch starts switched off, and the network as its shortcuts.
        y = norm(y, "bn3", scale_init=nn.initializers.zeros)
        if self.project_shortcut:
            x = Conv1x1(y.shape[-1], self.stride, name="shortcut_conv", **dtypes)(x)
            x = norm(x, "shortcut_bn")
        return nn.relu(x + y)


class HaloNet(nn.Module):
    """HaloNet: images (N, H, W, 3), already normalised, to logits (N, num_classes) in float32.

    `model.apply(variables, images, train=False)` evaluates; with `train=True` the collection
    "batch_stats" is updated and must be mutable.

    Attributes:
      num_classes: width of the logits.
      block_size, halo_size: b and h of the paper, in pixels of each stage's map.
      value_ratio, out_ratio: r_v and r_b of the paper.
      depths: blocks per stage; the first block of every stage but the first halves the map inside
        its attention.
      widths: d per stage, the channels of queries and keys.
      heads: attention heads per stage.
      final_width: d_f, channels of the 1x1 convolution before pooling; 0 leaves it out.
      stem_width, stem_kernel: the stem's strided convolution.
      stem_pool: whether a 3x3 max-pool halves the map again after it.
      bn_group: examples per group of batch-norm statistics, see `BatchNorm`.
      border, implementation: see `halonet.halo_attention`.
      dtype, param_dtype: of the computation and of the parameters.

    Raises:
      ValueError: for image sizes that the blocks do not divide, naming the nearest that work.
    """

    num_classes: int
    block_size: int
    halo_size: int
    value_ratio: float
    out_ratio: float
    depths: tuple[int, ...]
    final_width: int = 0
    widths: tuple[int, ...] = (64, 128, 256, 512)
    heads: tuple[int, ...] = (4, 8, 8, 8)
    stem_width: int = 64
    stem_kernel: int = 7
    stem_pool: bool = True
    bn_group: int = 0
    border: str = "zeros"
    implementation: str | None = None
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @property
    def size_unit(self) -> int:
        """Image heights and widths must be multiples of this many pixels."""
        stem_stride = 4 if self.stem_pool else 2
        return stem_stride * 2 ** (len(self.depths) - 1) * self.block_size

    def check_image_size(self, height: int, width: int) -> None:
        """Raises ValueError unless every stage's map can be cut into whole blocks."""
        unit = self.size_unit
        for what, size in (("height", height), ("width", width)):
            if size % unit or size <= 0:
                below, above = size // unit * unit, (size // unit + 1) * unit
                nearest = f"{below} and {above}" if below > 0 else f"{above}"
                raise ValueError(
                    f"image {what} {size} cannot be cut into blocks of {self.block_size} in every "
                    f"stage (the last has stride {unit // self.block_size}); "
                    f"the nearest that work: {nearest}"
                )

    @nn.compact
    def __call__(
        self, images: Float[Array, "n h w c"], *, train: bool
    ) -> Float[Array, "n num_classes"]:
        self.check_image_size(*images.shape[1:3])
        if not len(self.depths) == len(self.widths) == len(self.heads):
            raise ValueError(
                f"depths {self.depths}, widths {self.widths} and heads {self.heads} must have one "
                "number a stage"
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        precision = matmul_precision(self.dtype)

        pad = self.stem_kernel // 2
        x = nn.Conv(
            self.stem_width,
            (self.stem_kernel, self.stem_kernel),
            strides=2,
            padding=pad,
            use_bias=False,
            kernel_init=he_normal,
            precision=precision,
            name="stem_conv",
            **dtypes,
        )(images)
        x = nn.relu(BatchNorm(self.bn_group, name="stem_bn", **dtypes)(x, train=train))
        if self.stem_pool:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

        for stage, (depth, width, heads) in enumerate(
            zip(self.depths, self.widths, self.heads, strict=True), start=1
        ):
            for block in range(1, depth + 1):
                x = HaloBlock(
                    width=width,
                    block_size=self.block_size,
                    halo_size=self.halo_size,
                    heads=heads,
                    value_ratio=self.value_ratio,
                    out_ratio=self.out_ratio,
                    stride=2 if block == 1 and stage > 1 else 1,
                    project_shortcut=block == 1,
                    border=self.border,
                    implementation=self.implementation,
                    bn_group=self.bn_group,
                    name=f"stage{stage}_block{block}",
                    **dtypes,
                )(x, train=train)

        if self.final_width:
            x = Conv1x1(self.final_width, name="final_conv", **dtypes)(x)
            # Norm and activation here are ours, as timm and keras_cv_attention_models have them.
            x = nn.relu(BatchNorm(self.bn_group, name="final_bn", **dtypes)(x, train=train))
        x = x.mean(axis=(1, 2), dtype=jnp.promote_types(jnp.float32, x.dtype))
        # The classifier is float32 under bfloat16: it costs nothing and the loss needs it.
        return nn.Dense(
            self.num_classes,
            dtype=x.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.normal(0.01),
            precision=jax.lax.Precision.HIGHEST,
            name="head",
        )(x)

"""What the published hybrids need besides halo attention: channel attention and lambda layers.

BoTNet's global attention is halo attention with one block and no halo; RegNetZ's blocks are an
option of `BottleneckBlock`.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from halonet.models.layers import BatchNorm, Conv1x1, he_normal, matmul_precision

CHANNEL_ATTENTIONS = ("none", "se", "eca")


def squeezed_width(channels: int, ratio: float) -> int:
    """Channels between the two layers of squeeze-and-excitation: a multiple of 8, as timm's."""
    return max(8, int(channels * ratio + 4) // 8 * 8)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: gates (N, H, W, C) by two dense layers over the mean of each channel.

    Source: Hu et al. 2018, arXiv 1709.01507.
    """

    ratio: float
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                kernel_init=he_normal,
                precision=matmul_precision(self.dtype),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        channels = x.shape[-1]
        gate = nn.relu(dense(squeezed_width(channels, self.ratio), "reduce")(x.mean((1, 2))))
        gate = nn.sigmoid(dense(channels, "expand")(gate))
        return x * gate[:, None, None, :]


class EfficientChannelAttention(nn.Module):
    """Gates (N, H, W, C) by a convolution over the means of neighbouring channels.

    Its kernel grows with the logarithm of C. Source: Wang et al. 2020, arXiv 1910.03151.
    """

    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        size = int((math.log2(x.shape[-1]) + 1) / 2)
        size = max(3, size + 1 - size % 2)  # odd
        init = nn.initializers.normal(size**-0.5)
        kernel = self.param("kernel", init, (size,), self.param_dtype).astype(self.dtype)
        means = jnp.pad(x.mean((1, 2)), ((0, 0), (size // 2, size // 2)))
        shifted = [means[:, i : i + x.shape[-1]] * kernel[i] for i in range(size)]
        return x * nn.sigmoid(sum(shifted))[:, None, None, :]


class LambdaLayer(nn.Module):
    """A lambda layer with local positions: (N, H, W, C) -> (N, H, W, features).

    Each query is multiplied by a small matrix (a lambda) made of all values: one of their content,
    shared by all pixels, and one of their places, by a convolution of radius x radius pixels.

    Source: Bello 2021, arXiv 2102.08602; depth 1 and the sizes of timm's lamhalobotnet50ts.
    """

    heads: int
    features: int
    bn_group: int
    dtype: jax.typing.DTypeLike
    param_dtype: jax.typing.DTypeLike
    radius: int = 13
    key_dim: int = 16

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h w f"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        precision = matmul_precision(self.dtype)
        n, height, width, _ = x.shape
        d_v = self.features // self.heads

        q = Conv1x1(self.heads * self.key_dim, name="query", **dtypes)(x)
        q = BatchNorm(self.bn_group, name="query_bn", **dtypes)(q, train=train)
        q_nyxad = q.reshape(n, height, width, self.heads, self.key_dim)
        k = Conv1x1(self.key_dim, name="key", **dtypes)(x)
        k = nn.softmax(k, axis=(1, 2))
        v = Conv1x1(d_v, name="value", **dtypes)(x)
        v = BatchNorm(self.bn_group, name="value_bn", **dtypes)(v, train=train)

        # Letters: y, x pixel; a head; d, e channel of keys, of values.
        content = jnp.einsum("nyxd,nyxe->nde", k, v, precision=precision)
        shape = (self.radius, self.radius, self.key_dim)
        init = nn.initializers.normal(self.key_dim**-0.5)
        kernel = self.param("position_kernel", init, shape, self.param_dtype)
        bias = self.param("position_bias", nn.initializers.zeros, shape[-1:], self.param_dtype)
        # The same kernel for every channel of the values, each an image of its own.
        position = lax.conv_general_dilated(
            v.transpose(0, 3, 1, 2).reshape(n * d_v, height, width, 1),
            kernel[:, :, None, :].astype(self.dtype),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )
        position = position + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        position_neyxd = position.reshape(n, d_v, height, width, self.key_dim)
        out = jnp.einsum("nyxad,nde->nyxae", q_nyxad, content, precision=precision)
        out += jnp.einsum("nyxad,neyxd->nyxae", q_nyxad, position_neyxd, precision=precision)
        return out.reshape(n, height, width, self.features)

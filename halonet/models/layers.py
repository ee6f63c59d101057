"""The layers around the attention: convolutions, dense products, grouped batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from halonet.ops import on_each_device, row_devices, with_neighbours

# He's initialisation with fan-in, as in the BoTNet authors' code (shared authors; HaloNet's own
# is unpublished).
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def matmul_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """The precision at which products of this dtype keep what the dtype promises.

    A TPU multiplies float32 in one bfloat16 pass unless asked otherwise; whoever chose float32
    asked for float32.
    """
    wide = jnp.dtype(dtype) in (jnp.dtype(jnp.float32), jnp.dtype(jnp.float64))
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def average_pool(x: Float[Array, "n h w c"], size: int) -> Float[Array, "n h2 w2 c"]:
    """Averages squares of `size` pixels; at the end of an odd map, what there is of one."""

    def pool(x: Array) -> Array:
        ends = [(0, -length % size) for length in x.shape[1:3]]
        window = (size, size)
        return nn.avg_pool(x, window, strides=window, padding=ends, count_include_pad=False)

    return pool(x) if row_devices() == 1 else on_each_device(pool, (x,), ())


@jax.custom_vjp
def narrow_product(x: Float[Array, "n c"], kernel: Float[Array, "c f"]) -> Float[Array, "n f"]:
    """x @ kernel in the dtype of x, whose gradient for the kernel comes out in the kernel's dtype.

    By itself that gradient would be rounded to the dtype of x, and only then added up over the
    devices that share the batch: on TPU in bfloat16, the worse the more there are.
    """
    return jnp.dot(x, kernel.astype(x.dtype))


def _narrow_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return narrow_product(x, kernel), (x, kernel)


def _narrow_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    to_kernel = jnp.einsum("nc,nf->cf", x, g, preferred_element_type=kernel.dtype)
    return jnp.einsum("nf,cf->nc", g, kernel.astype(g.dtype)), to_kernel


narrow_product.defvjp(_narrow_forward, _narrow_backward)


def product1x1(x: Float[Array, "n h w c"], kernel: Float[Array, "c f"]) -> Array:
    """A 1x1 convolution as a matrix product, in the dtype of x: (N, H, W, C) -> (N, H, W, F)."""
    # Flat as a whole, images that devices share both by number and by rows would be gathered.
    return (
        on_each_device(_product1x1, (x,), (kernel,))
        if row_devices() > 1
        else _product1x1(x, kernel)
    )


def _product1x1(x: Float[Array, "n h w c"], kernel: Float[Array, "c f"]) -> Array:
    *pixels, channels = x.shape
    # Flat, because XLA's CPU backend transposes a whole activation for the kernel's gradient where
    # it has to contract three axes; one it contracts in place, at twice the speed.
    x = x.reshape(-1, channels)
    precision = matmul_precision(x.dtype)
    if precision == jax.lax.Precision.DEFAULT:
        y = narrow_product(x, kernel)
    else:
        y = jnp.dot(x, kernel.astype(x.dtype), precision=precision)
    return y.reshape(*pixels, kernel.shape[-1])


class Kernel1x1(nn.Module):
    """The parameter of a 1x1 convolution alone, for kernels that share a product."""

    features: int
    kernel_init: Callable = he_normal
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, channels: int) -> Float[Array, "c f"]:
        return self.param("kernel", self.kernel_init, (channels, self.features), self.param_dtype)


class Conv1x1(nn.Module):
    """A 1x1 convolution without bias: (N, H, W, C) -> (N, H/stride, W/stride, features).

    Odd sizes are rounded up. Written as a matrix product over the kept pixels, which every backend
    runs at full speed.
    """

    features: int
    stride: int = 1
    kernel_init: Callable = he_normal
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if self.stride > 1:
            x = x[:, :: self.stride, :: self.stride]
        return product1x1(x.astype(self.dtype), kernel)


def convolution(
    x: Float[Array, "n h w c"],
    kernel: Float[Array, "size size2 c2 f"],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "n h2 w2 f"]:
    """`jax.lax.conv_general_dilated`, also of images whose rows several devices share.

    There `padding` of the rows is that of a map of rounded-up halves: half of the kernel's size on
    the first side, and what the stride needs on the other. Kernels are not dilated.
    """
    options |= {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def convolve(x: Array, kernel: Array, rows: tuple[int, int]) -> Array:
        around = (rows, padding[1])
        return jax.lax.conv_general_dilated(x, kernel, window_strides, around, **options)

    if row_devices() == 1:
        return convolve(x, kernel, padding[0])
    above = padding[0][0]
    below = max(0, kernel.shape[0] - above - window_strides[0])

    def part(x: Array, kernel: Array) -> Array:
        return convolve(with_neighbours(x, above, below), kernel, (0, 0))

    return on_each_device(part, (x,), (kernel,))


class HalvingConv(nn.Module):
    """A convolution of stride 2 over few channels: (N, H, W, C) -> (N, H/2, W/2, features).

    The kernel is square, of odd size and without bias; odd maps are rounded up. Computed as a
    convolution of stride 1 over squares of 2x2 pixels, whose four times as many channels a TPU's
    matrix units have more use for. The same products are summed: the parameter stays what it is.
    """

    features: int
    size: int
    kernel_init: Callable = he_normal
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        n, height, width, channels = x.shape
        shape = (self.size, self.size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        # The padding on the left, made even by a kernel that begins with a row of zeros, is so many
        # squares; the kernel is as many in all.
        padding = self.size // 2
        first = padding % 2
        before, squares = (padding + first) // 2, (self.size + 1) // 2
        zeros = (first, 1 - first)
        kernel = jnp.pad(kernel.astype(self.dtype), (zeros, zeros, (0, 0), (0, 0)))
        kernel = kernel.reshape(squares, 2, squares, 2, channels, self.features)
        kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(squares, squares, -1, self.features)

        x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        rows, cols = x.shape[1] // 2, x.shape[2] // 2
        x = x.reshape(n, rows, 2, cols, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        around = (before, squares - 1 - before)
        return convolution(
            x.reshape(n, rows, cols, 4 * channels),
            kernel,
            window_strides=(1, 1),
            padding=(around, around),
            precision=matmul_precision(self.dtype),
        )


class BatchNorm(nn.Module):
    """Batch normalisation over fixed groups of consecutive examples.

    In training, each run of `group` examples is normalised by its own mean and variance over
    (group, H, W), and the averages of the groups' statistics enter the running ones. So the forward
    pass needs no communication between devices and the result does not depend on how many there
    are, as long as `group` divides each device's share; gradient accumulation equals the large
    batch for the same reason. `group` 0 takes the whole batch as one group.

    Statistics are float32 whatever the compute dtype. Momentum 0.9 and epsilon 1e-5 are those of
    the BoTNet authors' code.
    """

    group: int = 0
    momentum: float = 0.9
    epsilon: float = 1e-5
    scale_init: Callable = nn.initializers.ones
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], *, train: bool) -> Float[Array, "n h w c"]:
        n, h, w, c = x.shape
        scale = self.param("scale", self.scale_init, (c,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (c,), self.param_dtype)
        stats_dtype = jnp.promote_types(jnp.float32, x.dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,), jnp.float32)

        if train:
            group = self.group or n
            if n % group:
                raise ValueError(
                    f"batch norm groups of {group} do not divide a batch of {n}; "
                    f"take a batch that is a multiple of {group}, or a smaller model.bn_group"
                )
            x = x.reshape(n // group, group, h, w, c)
            wide = x.astype(stats_dtype)
            mean = wide.mean(axis=(1, 2, 3), keepdims=True)
            # One pass over x for both moments; rounding may leave the difference below zero.
            var = (wide**2).mean(axis=(1, 2, 3), keepdims=True) - mean**2
            var = jnp.maximum(var, 0.0)
            if not self.is_initializing():
                keep = self.momentum
                for running, new in ((running_mean, mean), (running_var, var)):
                    new = new.mean(axis=0).reshape(c).astype(jnp.float32)
                    running.value = keep * running.value + (1 - keep) * new
        else:
            mean = running_mean.value.astype(stats_dtype).reshape(1, 1, 1, c)
            var = running_var.value.astype(stats_dtype).reshape(1, 1, 1, c)

        gain = jax.lax.rsqrt(var + self.epsilon) * scale.astype(stats_dtype).reshape(
            (1,) * (x.ndim - 1) + (c,)
        )
        shift = bias.astype(stats_dtype).reshape((1,) * (x.ndim - 1) + (c,)) - mean * gain
        return (x * gain + shift).reshape(n, h, w, c).astype(self.dtype)

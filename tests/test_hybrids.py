"""Channel attention and lambda layers against their definitions; timm's own are in tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models.hybrids import (
    EfficientChannelAttention,
    LambdaLayer,
    SqueezeExcite,
    squeezed_width,
)

DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def randomised(layer, x, **options):
    """The layer's variables with random values, statistics included."""
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, **options))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 + rng.uniform(size=leaf.shape), leaf.dtype), shapes
    )


def image(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_squeeze_and_excitation():
    x = image(2, 4, 6, 32)
    layer = SqueezeExcite(ratio=0.25, **DTYPES)
    variables = randomised(layer, x)
    p = jax.tree.map(np.asarray, variables["params"])
    assert p["reduce"]["kernel"].shape == (32, 8)
    means = np.asarray(x).mean((1, 2))
    inner = np.maximum(means @ p["reduce"]["kernel"] + p["reduce"]["bias"], 0)
    gate = sigmoid(inner @ p["expand"]["kernel"] + p["expand"]["bias"])
    expected = np.asarray(x) * gate[:, None, None, :]
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "ratio", "width"), [(64, 1 / 16, 8), (256, 1 / 16, 16), (144, 0.25, 40)]
)
def test_the_squeezed_width_is_a_multiple_of_8(channels, ratio, width):
    assert squeezed_width(channels, ratio) == width


@pytest.mark.parametrize(("channels", "size"), [(16, 3), (64, 3), (128, 5), (256, 5)])
def test_efficient_channel_attention(channels, size):
    x = image(2, 3, 4, channels)
    layer = EfficientChannelAttention(**DTYPES)
    variables = randomised(layer, x)
    kernel = np.asarray(variables["params"]["kernel"])
    assert kernel.shape == (size,)
    means = np.asarray(x).mean((1, 2))
    gate = np.zeros_like(means)
    for channel in range(channels):
        for i in range(size):
            neighbour = channel + i - size // 2
            if 0 <= neighbour < channels:
                gate[:, channel] += kernel[i] * means[:, neighbour]
    expected = np.asarray(x) * sigmoid(gate)[:, None, None, :]
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, rtol=1e-5, atol=1e-6)


def test_a_lambda_is_made_of_content_and_of_places():
    n, height, width, heads, features = 2, 5, 4, 2, 6
    x = image(n, height, width, 8)
    layer = LambdaLayer(heads, features, bn_group=0, radius=3, key_dim=4, **DTYPES)
    variables = randomised(layer, x, train=False)
    p, stats = (jax.tree.map(np.asarray, variables[k]) for k in ("params", "batch_stats"))

    def norm(y, name):
        y = (y - stats[name]["mean"]) / np.sqrt(stats[name]["var"] + 1e-5)
        return y * p[name]["scale"] + p[name]["bias"]

    q = norm(np.asarray(x) @ p["query"]["kernel"], "query_bn").reshape(n, height, width, heads, 4)
    k = np.exp(np.asarray(x) @ p["key"]["kernel"])
    k /= k.sum((1, 2), keepdims=True)
    v = norm(np.asarray(x) @ p["value"]["kernel"], "value_bn")
    expected = np.zeros((n, height, width, features))
    for image_, row, col in np.ndindex(n, height, width):
        content = np.einsum("yxd,yxe->de", k[image_], v[image_])
        place = np.repeat(p["position_bias"][:, None], features // heads, 1)
        for i, j in np.ndindex(3, 3):
            y, z = row + i - 1, col + j - 1
            if 0 <= y < height and 0 <= z < width:
                place = place + np.outer(p["position_kernel"][i, j], v[image_, y, z])
        expected[image_, row, col] = (q[image_, row, col] @ (content + place)).ravel()
    found = jax.jit(lambda v: layer.apply(v, x, train=False))(variables)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

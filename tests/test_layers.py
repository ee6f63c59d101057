"""Grouped batch normalisation against NumPy, and the 1x1 convolution."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models.layers import (
    BatchNorm,
    Conv1x1,
    HalvingConv,
    average_pool,
    matmul_precision,
    narrow_product,
)


@pytest.fixture
def images():
    values = np.random.default_rng(0).normal(2.0, 3.0, (8, 3, 4, 5))
    return jnp.asarray(values, jnp.float32)


def variables(images, **kwargs):
    norm = BatchNorm(**kwargs)
    init = norm.init(jax.random.key(0), images, train=True)
    params = {"scale": jnp.linspace(0.5, 2.0, 5), "bias": jnp.linspace(-1.0, 1.0, 5)}
    return norm, {"params": params, "batch_stats": init["batch_stats"]}


def by_numpy(group, scale, bias):
    mean = group.mean(axis=(0, 1, 2))
    var = group.var(axis=(0, 1, 2))
    return (group - mean) / np.sqrt(var + 1e-5) * scale + bias, mean, var


@pytest.mark.parametrize("group", [1, 2, 4, 8, 0])
def test_training_normalises_each_group_by_its_own_statistics(images, group):
    norm, init = variables(images, group=group)
    output, updated = norm.apply(init, images, train=True, mutable=["batch_stats"])
    scale, bias = np.asarray(init["params"]["scale"]), np.asarray(init["params"]["bias"])
    size = group or len(images)
    parts = [
        by_numpy(np.asarray(images[i : i + size], np.float64), scale, bias)
        for i in range(0, len(images), size)
    ]
    np.testing.assert_allclose(output, np.concatenate([part[0] for part in parts]), atol=2e-5)
    mean = np.mean([part[1] for part in parts], axis=0)
    var = np.mean([part[2] for part in parts], axis=0)
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-5)


def test_groups_do_not_see_each_other(images):
    norm, init = variables(images, group=4)

    def second_half(x):
        return norm.apply(init, x, train=True, mutable=["batch_stats"])[0][4:].sum()

    gradient = jax.grad(lambda x: (second_half(x) ** 2).sum())(images)
    np.testing.assert_array_equal(gradient[:4], 0.0)
    assert jnp.abs(gradient[4:]).max() > 0


def test_evaluation_uses_the_running_statistics(images):
    norm, init = variables(images)
    init["batch_stats"] = {"mean": jnp.full(5, 2.0), "var": jnp.full(5, 9.0)}
    output = norm.apply(init, images, train=False)
    scale, bias = np.asarray(init["params"]["scale"]), np.asarray(init["params"]["bias"])
    expected = (np.asarray(images) - 2.0) / np.sqrt(9.0 + 1e-5) * scale + bias
    np.testing.assert_allclose(output, expected, atol=2e-6)


def test_initialisation_leaves_the_statistics_alone(images):
    _, init = variables(images)
    np.testing.assert_array_equal(init["batch_stats"]["mean"], 0.0)
    np.testing.assert_array_equal(init["batch_stats"]["var"], 1.0)


def test_statistics_are_float32_under_bfloat16(images):
    norm, init = variables(images, group=4, dtype=jnp.bfloat16)
    output, updated = norm.apply(
        init, images.astype(jnp.bfloat16), train=True, mutable=["batch_stats"]
    )
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {np.dtype(np.float32)}


def test_a_group_that_does_not_divide_the_batch_is_refused(images):
    norm, init = variables(images, group=4)
    with pytest.raises(ValueError, match="groups of 4 do not divide a batch of 6"):
        norm.apply(init, images[:6], train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("stride", [1, 2])
def test_conv1x1_is_a_convolution(images, stride):
    layer = Conv1x1(7, stride=stride)
    params = layer.init(jax.random.key(1), images)
    expected = jax.lax.conv_general_dilated(
        images,
        params["params"]["kernel"].reshape(1, 1, 5, 7),
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(layer.apply(params, images), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float32", "HIGHEST"), ("float64", "HIGHEST"), ("bfloat16", "DEFAULT")],
)
def test_float32_products_ask_for_float32(dtype, precision):
    assert matmul_precision(dtype).name == precision


def test_average_pool_takes_what_there_is_at_the_end_of_an_odd_map():
    x = jnp.arange(15, dtype=jnp.float32).reshape(1, 3, 5, 1)
    expected = [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]
    np.testing.assert_array_equal(average_pool(x, 2)[0, :, :, 0], expected)


def test_a_narrow_product_keeps_the_gradient_of_its_kernel():
    """Exact products of bfloat16 operands, not rounded on their way to the kernel."""
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=(64, 8)), jnp.bfloat16) for _ in range(2))
    kernel = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)

    def gradients(product):
        y, back = jax.vjp(product, x, kernel)
        return (y, *back(g))

    y, to_x, to_kernel = gradients(narrow_product)
    exact = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
    np.testing.assert_allclose(to_kernel, exact, rtol=1e-5, atol=1e-5)
    plain = gradients(lambda x, kernel: jnp.dot(x, kernel.astype(x.dtype)))
    assert np.abs(plain[2] - exact).max() > 1e-2
    np.testing.assert_array_equal((y, to_x), plain[:2])
    assert (y.dtype, to_x.dtype, to_kernel.dtype) == (x.dtype, x.dtype, kernel.dtype)


@pytest.mark.parametrize(("size", "height", "width"), [(7, 8, 10), (5, 7, 8), (3, 5, 7), (1, 4, 5)])
def test_a_halving_convolution_is_a_convolution_of_stride_2(size, height, width):
    images = jax.random.normal(jax.random.key(0), (2, height, width, 3))
    options = {"strides": 2, "padding": size // 2, "use_bias": False, "precision": "highest"}
    plain, halving = nn.Conv(4, (size, size), **options), HalvingConv(4, size)
    variables = halving.init(jax.random.key(1), images)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"kernel": (size, size, 3, 4)}}

    def run(layer):
        out, pull = jax.vjp(lambda variables, images: layer.apply(variables, images), *given)
        return out, pull(jnp.cos(out))

    given = variables, images
    jax.tree.map(
        lambda ours, right: np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5),
        run(halving),
        run(plain),
    )

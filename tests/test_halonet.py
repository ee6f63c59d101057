"""HaloNet: forward passes at each model's own size, what it refuses, how it starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models import VARIANTS, create_model, list_models
from halonet.models.halonet import HaloBlock

SMALL = ["halonet_h0", "halonet_h1", "halonet_h2", "halonet_h3", "halonet_tiny"]


def random_variables(model, size):
    """Variables of the right shapes with random values, cheaper than initialising."""
    images = jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        scale = 1.0 if path[-1].key in ("scale", "var") else 0.05
        return jnp.asarray(scale * np.abs(rng.normal(size=leaf.shape)), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.mark.parametrize(
    "name",
    [*SMALL, *(pytest.param(n, marks=pytest.mark.long) for n in list_models() if n not in SMALL)],
)
def test_forward_at_its_own_size(name):
    size = VARIANTS[name].image_size
    model = create_model(name)
    variables = random_variables(model, size)
    images = jax.random.normal(jax.random.key(0), (1, size, size, 3))
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    assert logits.shape == (1, 1000)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert np.std(logits) > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_stays_near_float32(dtype):
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    # Random, for a fresh network's residual branches are switched off.
    variables = random_variables(create_model("halonet_tiny", num_classes=10), 32)

    def logits(dtype):
        model = create_model("halonet_tiny", num_classes=10, dtype=dtype)
        output = model.apply(variables, images, train=False)
        assert output.dtype == jnp.float32
        return np.asarray(output)

    exact = logits(jnp.float32)
    # bfloat16 keeps 8 bits; a dozen layers may lose three of them.
    bound = 0.0 if dtype == jnp.float32 else 2**-5
    assert np.abs(logits(dtype) - exact).max() <= bound * np.abs(exact).max()


def test_images_may_be_rectangular():
    model = create_model("halonet_tiny", num_classes=10)
    images = jnp.ones((2, 32, 48, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    assert model.apply(variables, images, train=False).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "height", "width", "message"),
    [
        ("halonet_h7", 600, 600, "image height 600 .* blocks of 10 .* work: 320 and 640"),
        ("halonet_h1", 256, 224, "image width 224 .* blocks of 8 .* work: 256"),
        ("halonet_tiny", 0, 32, "image height 0 .* work: 16"),
    ],
)
def test_sizes_that_blocks_do_not_divide_are_refused(name, height, width, message):
    model = create_model(name)
    with pytest.raises(ValueError, match=message):
        model.check_image_size(height, width)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, height, width, 3)), train=False)
        )


@pytest.mark.parametrize("name", list_models())
def test_the_named_size_works(name):
    size = VARIANTS[name].image_size
    model = create_model(name)
    model.check_image_size(size, size)
    assert size % model.size_unit == 0


def test_a_block_starts_as_its_shortcut():
    block = HaloBlock(
        width=8,
        block_size=4,
        halo_size=2,
        heads=2,
        value_ratio=1.0,
        out_ratio=2.0,
        stride=1,
        project_shortcut=False,
        border="zeros",
        implementation=None,
        bn_group=0,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 16))
    variables = block.init(jax.random.key(1), x, train=False)
    output, _ = block.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(output, jax.nn.relu(x), atol=1e-6)


def test_value_ratio_widens_values_and_out_ratio_the_output_only():
    def kernels(**ratios):
        model = create_model("halonet_tiny", **ratios)
        images = jnp.zeros((1, 32, 32, 3))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
        block = shapes["params"]["stage2_block2"]
        attention = block["attention"]
        return {
            "query": attention["query"]["kernel"].shape[-1],
            "key": attention["key"]["kernel"].shape[-1],
            "value": attention["value"]["kernel"].shape[-1],
            "conv1": block["conv1"]["kernel"].shape[-1],
            "conv3": block["conv3"]["kernel"].shape[-1],
        }

    base = kernels(value_ratio=1.0, out_ratio=1.0)
    assert kernels(value_ratio=2.0, out_ratio=1.0) == {**base, "value": 2 * base["value"]}
    assert kernels(value_ratio=1.0, out_ratio=3.0) == {**base, "conv3": 3 * base["conv3"]}

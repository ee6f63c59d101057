"""The attention layer: shapes, projections, and that it is the op it says it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import halonet


def initialised(layer, shape=(2, 8, 16, 6)):
    x = jax.random.normal(jax.random.key(0), shape)
    return x, jax.jit(layer.init)(jax.random.key(1), x)


def apply(layer, variables, x):
    """The output, compiled as a whole: op by op takes longer."""
    return jax.jit(layer.apply)(variables, x)


def output(layer, shape=(2, 8, 16, 6)):
    """Shape and dtype of the output for float32 inputs; nothing is computed."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: layer.init_with_output(jax.random.key(0), x)[0], x)


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, 6),
        ({"out_features": 10}, 10),
        ({"out_projection": False}, 12),
        ({"out_projection": False, "value_head_dim": 5}, 15),
        ({"value_head_dim": 5}, 6),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_output_shape(options, channels, stride):
    layer = halonet.HaloAttention(
        block_size=4, halo_size=2, heads=3, head_dim=4, stride=stride, **options
    )
    assert output(layer).shape == (2, 8 // stride, 16 // stride, channels)


def test_it_is_the_op_between_its_projections():
    layer = halonet.HaloAttention(
        block_size=4, halo_size=1, heads=2, head_dim=3, value_head_dim=5, stride=2, border="mask"
    )
    x, variables = initialised(layer)
    p = variables["params"]

    def project(name, x, width):
        return (x @ p[name]["kernel"]).reshape(*x.shape[:3], 2, width)

    op = functools.partial(
        halonet.halo_attention,
        block=4,
        halo=1,
        stride=2,
        border="mask",
        implementation="reference",
    )
    expected = jax.jit(op)(
        project("query", x[:, ::2, ::2], 3),
        project("key", x, 3),
        project("value", x, 5),
        p["row_table"],
        p["col_table"],
    )
    expected = expected.reshape(2, 4, 8, 10) @ p["out"]["kernel"]
    expected += p["out"]["bias"].reshape(1, 1, 1, -1)
    np.testing.assert_allclose(apply(layer, variables, x), expected, atol=1e-5)


def layer_of(**options):
    return halonet.HaloAttention(block_size=4, halo_size=1, heads=2, head_dim=3, **options)


def test_pooling_averages_what_every_query_found():
    x, variables = initialised(layer_of(out_projection=False))
    every = apply(layer_of(out_projection=False), variables, x)
    pooled = apply(layer_of(out_projection=False, stride=2, downsample="pool"), variables, x)
    expected = every.reshape(2, 4, 2, 8, 2, 6).mean((2, 4))
    np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("downsample", ["queries", "pool"])
def test_any_size_with_padding(downsample):
    layer = layer_of(stride=2, downsample=downsample, pad_to_blocks=True, border="mask")
    assert output(layer, (1, 7, 13, 6)).shape == (1, 4, 7, 6)


def test_an_unknown_way_of_downsampling_is_refused():
    with pytest.raises(ValueError, match="downsample 'skip' is unknown; there are: queries, pool"):
        initialised(layer_of(downsample="skip"))


def test_contiguous_tables_are_longer():
    _, variables = initialised(layer_of(positions="contiguous"))
    assert variables["params"]["row_table"].shape == (2 * (4 + 2 * 1) - 1, 3)


@pytest.mark.parametrize(("positions", "blind"), [("none", True), ("exact", False)])
def test_without_positions_the_order_of_pixels_makes_no_difference(positions, blind):
    """In one block: what its pixels find moves as they do."""
    layer = halonet.HaloAttention(
        block_size=4, halo_size=0, heads=2, head_dim=3, positions=positions
    )
    x, variables = initialised(layer, (1, 4, 4, 6))
    assert ("row_table" in variables["params"]) is not blind
    order = jax.random.permutation(jax.random.key(2), 16)

    def moved(maps):
        return maps.reshape(1, 16, 6)[:, order].reshape(1, 4, 4, 6)

    found, expected = apply(layer, variables, moved(x)), moved(apply(layer, variables, x))
    assert np.allclose(found, expected, atol=1e-6) is blind


def test_tables_have_a_row_for_each_offset_that_occurs():
    layer = halonet.HaloAttention(block_size=4, halo_size=2, heads=2, head_dim=64)
    _, variables = initialised(layer)
    tables = variables["params"]["row_table"], variables["params"]["col_table"]
    for table in tables:
        assert table.shape == (2 * 4 + 2 * 2 - 1, 64)
        # Deviation d_head^-0.5 = 1/8, over 704 draws.
        assert 0.11 < float(table.std()) < 0.14


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    layer = halonet.HaloAttention(
        block_size=4, halo_size=2, heads=2, head_dim=8, dtype=jnp.bfloat16
    )
    _, variables = initialised(layer)
    assert output(layer).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_a_size_that_the_block_does_not_divide_is_refused():
    layer = halonet.HaloAttention(block_size=4, halo_size=2, heads=2, head_dim=8)
    with pytest.raises(ValueError, match="width 14 is not a multiple of block 4"):
        layer.init(jax.random.key(0), jnp.zeros((1, 8, 14, 6)))

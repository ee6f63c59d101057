"""Relative tables for other blocks and halos."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models import create_model, resize_tables


def model_of(**fields):
    return create_model("halonet_tiny", num_classes=10, **fields)


def tables_of(variables):
    """Each relative table, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {path: leaf for path, leaf in leaves if path[-1].key.endswith("table")}


def numbered(model):
    """Variables in which each row of a relative table holds its number."""
    images = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(
            jnp.arange(leaf.shape[0], dtype=leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1)),
            leaf.shape,
        ),
        shapes,
    )


def test_without_positions_there_is_nothing_to_resize():
    source, target = (model_of(positions="none", halo_size=halo) for halo in (1, 2))
    variables = numbered(source)
    assert tables_of(variables) == {}
    assert resize_tables(variables, source, target) is variables


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, list(range(9))),  # offsets -4 to 4
        ({"halo_size": 0}, list(range(1, 8))),  # -3 to 3
        ({"halo_size": 2}, [0, *range(9), 8]),  # -5 to 5: the nearest for the two new ones
        ({"block_size": 8, "halo_size": 0}, [0, 0, 0, *range(9), 8, 8, 8]),  # -7 to 7
    ],
)
def test_rows_stay_with_their_offsets(fields, rows):
    source, target = model_of(), model_of(**fields)
    resized = resize_tables(numbered(source), source, target)
    for table in tables_of(resized).values():
        np.testing.assert_array_equal(table[:, 0], rows)


def test_contiguous_tables_have_their_zero_elsewhere():
    source = model_of(positions="contiguous", halo_size=2)  # 15 rows, 0 in row 9
    target = model_of(positions="contiguous", halo_size=1)  # 11 rows, 0 in row 6
    resized = resize_tables(numbered(source), source, target)
    for table in tables_of(resized).values():
        np.testing.assert_array_equal(table[:, 0], np.arange(3, 14))


def test_what_both_see_is_seen_alike():
    """Halo 3 equals halo 1 where the image has nothing further out than halo 1 sees."""
    source = model_of(halo_size=1, border="mask", plan="h/c")
    target = model_of(halo_size=3, border="mask", plan="h/c")
    images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))  # one block of 4 after the stem
    source, target = (model.clone(pad_to_blocks=True) for model in (source, target))
    variables = jax.jit(functools.partial(source.init, train=False))(jax.random.key(1), images)
    resized = resize_tables(variables, source, target)
    ours, wide = (
        jax.jit(lambda v, model=model: model.apply(v, images, train=False))(v)
        for model, v in ((source, variables), (target, resized))
    )
    np.testing.assert_allclose(ours, wide, rtol=1e-5, atol=1e-6)


def test_tables_of_global_attention_stay_as_they_are():
    fields = {"plan": "h/cbb", "global_size": 8}
    source, target = model_of(**fields), model_of(**fields, block_size=8, halo_size=0)
    before = numbered(source)
    after = resize_tables(before, source, target)
    sizes = {
        path[1].key: (len(tables_of(before)[path]), len(table))
        for path, table in tables_of(after).items()
    }
    assert sizes == {"stage1_block1": (9, 15), **{f"stage2_block{i}": (15, 15) for i in (2, 3)}}


def test_tables_of_another_model_are_refused():
    variables = numbered(model_of(halo_size=2))
    with pytest.raises(ValueError, match="_table has 11 rows, not 9"):
        resize_tables(variables, model_of(), model_of(halo_size=0))


def test_other_conventions_are_refused():
    source, target = model_of(), model_of(positions="contiguous")
    with pytest.raises(ValueError, match="positions='contiguous' cannot take tables of .*'exact'"):
        resize_tables(numbered(source), source, target)

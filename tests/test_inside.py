"""What a query attends to and what a place depends on, told of whole models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models import attention_layers, attention_map, create_model, receptive_field

TINY = {"widths": (4, 8), "heads": (1, 2), "depths": (1, 2), "stem_widths": (4,), "num_classes": 3}


def tiny(name="halonet_tiny", size=(32, 32), **overrides):
    """A model of random numbers (model, variables, images), two images."""
    model = create_model(name, **{**TINY, **overrides})
    rng = np.random.default_rng(0)

    def numbers(path, leaf):
        values = rng.normal(size=leaf.shape)
        # Scales and variances, small biases that keep ReLUs alive, and what multiplies.
        values = {1: 0.5 + np.abs(values)}.get(leaf.ndim, 0.5 * values)
        return jnp.asarray(values, leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(numbers, model.abstract_variables(*size))
    return model, variables, jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)


def test_layers_with_attention_are_listed():
    assert list(attention_layers(tiny()[0])) == ["stage1_block1", "stage2_block1", "stage2_block2"]
    layers = attention_layers(create_model("halo2botnet50ts_256"))
    assert layers == {
        **dict.fromkeys(("stage2_block2", "stage2_block4"), "h"),
        **dict.fromkeys(("stage3_block2", "stage3_block4", "stage3_block6"), "h"),
        "stage4_block2": "b",
    }
    assert attention_layers(create_model("resnet50")) == {}


@pytest.mark.parametrize(
    ("overrides", "size", "layer", "query"),
    [
        ({}, (32, 32), "stage1_block1", (5, 15)),
        (
            {"border": "mask", "pad_to_blocks": True, "remat": "attention"},
            (26, 30),
            "stage2_block1",
            (6, 7),
        ),
        ({"downsample": "pool", "positions": "contiguous"}, (32, 32), "stage2_block1", (3, 15)),
        ({"plan": "h/hb", "global_size": 8}, (32, 32), "stage2_block2", (3, 5)),
    ],
    ids=["first", "masked", "pooled", "global"],
)
@pytest.mark.middle
def test_the_map_is_the_derivative_of_what_the_layer_makes(overrides, size, layer, query):
    """Of its output by the values: the layer is linear in the kernel that makes them."""
    model, variables, images = tiny(size=size, **overrides)
    weights = attention_map(model, variables, images, layer=layer, query=query)
    heads = dict(zip(("stage1", "stage2"), TINY["heads"], strict=True))[layer.split("_")[0]]
    assert weights.shape[:2] == (2, heads)
    total = np.asarray(weights.sum((-2, -1)))
    assert (weights >= 0).all()
    assert (total <= 1 + 1e-5).all()
    if model.border == "mask" or attention_layers(model)[layer] == "b":
        np.testing.assert_allclose(total, 1, atol=1e-5)

    # What the layer computes of its own input, for channel c of a head: sum of weights * values.
    _, sown = model.clone(features_only=True).apply(
        variables,
        images,
        train=False,
        capture_intermediates=lambda module, _: module.name in ("attention", "bn1"),
        mutable=["intermediates"],
    )
    block = sown["intermediates"][layer]
    (entering,), (made,) = block["bn1"]["__call__"], block["attention"]["__call__"]
    if overrides.get("downsample") == "pool":
        # Its output is of four queries: of all of them, then.
        quarter = [(query[0] // 2 * 2 + i, query[1] // 2 * 2 + j) for i in (0, 1) for j in (0, 1)]
        of = functools.partial(attention_map, model, variables, images, layer=layer)
        weights, query = sum(of(query=it) for it in quarter) / 4, (query[0] // 2, query[1] // 2)
    kernel = variables["params"][layer]["attention"]["value"]["kernel"].reshape(
        entering.shape[-1], -1
    )
    values = (jax.nn.relu(entering) @ kernel).reshape(*entering.shape[:3], heads, -1)
    expected = made[:, *query].reshape(2, heads, -1)
    found = jnp.einsum("naij,nijad->nad", weights, values)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_unknown_layers_and_queries_are_refused():
    model, variables, images = tiny()
    show = functools.partial(attention_map, model, variables, images)
    with pytest.raises(ValueError, match="layer 'stage3_block1' has no .*; these do: stage1_block"):
        show(layer="stage3_block1", query=(0, 0))
    with pytest.raises(ValueError, match=r"query \(16, 0\) is not among the 16 x 16 queries"):
        show(layer="stage1_block1", query=(16, 0))


def test_a_place_depends_on_its_windows_and_on_nothing_else():
    """A window of one layer, the ring of 3x3 that the stem adds, and both images."""
    model, variables, images = tiny(pad_to_blocks=True)
    field = receptive_field(model, variables, images, stage=1, place=(5, 10))
    assert field.shape == (2, 32, 32)
    rows, columns = (np.flatnonzero(np.asarray(field[0]).any(axis=axis)) for axis in (1, 0))
    # Block (4..7, 8..11) of stride 2, a halo of one, and pixels 2y - 1 to 2y + 1 under each.
    assert (rows.min(), rows.max()) == (2 * 3 - 1, 2 * 8 + 1)
    assert (columns.min(), columns.max()) == (2 * 7 - 1, 2 * 12 + 1)
    assert (np.asarray(field[0])[5:18, 13:26] > 0).all()


@pytest.mark.middle
def test_it_is_the_norm_of_the_derivative():
    model, variables, images = tiny(size=(16, 16))
    backbone = model.clone(features_only=True)

    @jax.jit
    @jax.jacrev
    def jacobian(x):
        return backbone.apply(variables, x, train=False)[1][0, 1, 2]

    expected = np.sqrt(np.square(jacobian(images[:1])[:, 0]).sum((0, 3)))
    field = receptive_field(model, variables, images[:1], stage=2, place=(1, 2), draws=500)[0]
    np.testing.assert_allclose(field, expected, rtol=0.2, atol=0.01 * expected.max())
    assert (expected > 0).any()


@pytest.mark.parametrize(
    ("stage", "place", "message"),
    [
        (3, (0, 0), "stage 3 of 2; they count from 1"),
        (2, (0, 8), r"place \(0, 8\) is not in the map of stage 2, 8 x 8"),
    ],
)
def test_unknown_stages_and_places_are_refused(stage, place, message):
    with pytest.raises(ValueError, match=message):
        receptive_field(*tiny(), stage=stage, place=place)

"""The registered variants: their parameter counts, and what an unknown name gets."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from halonet.models import VARIANTS, create_model, list_models

README = pathlib.Path(__file__).parent.parent / "README.md"

# Trainable parameters at 1000 classes. H0 to H7 are the published counts to the paper's digit.
PARAMETERS = {
    "halonet_h0": 5_496_104,
    "halonet_h1": 8_098_280,
    "halonet_h2": 9_397_928,
    "halonet_h3": 11_834_728,
    "halonet_h4": 19_098_088,
    "halonet_h5": 30_710_760,
    "halonet_h6": 43_441_384,
    "halonet_h7": 67_421_288,
    "halonet_tiny": 231_560,
}
PUBLISHED_MILLIONS = dict(
    zip(sorted(PARAMETERS)[:8], (5.5, 8.1, 9.4, 11.8, 19.1, 30.7, 43.4, 67.4), strict=True)
)


def abstract_variables(name, image_size=None, **overrides):
    """Shapes of a variant's variables, without computing any."""
    size = image_size or VARIANTS[name].image_size
    images = jnp.zeros((1, size, size, 3))
    model = create_model(name, **overrides)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", list_models())
def test_parameter_count(name):
    counted = count(abstract_variables(name)["params"])
    assert counted == VARIANTS[name].params
    # A variant that is not listed here fails on the lookup.
    assert counted == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(PUBLISHED_MILLIONS))
def test_count_is_the_published_one(name):
    assert round(VARIANTS[name].params / 1e6, 1) == PUBLISHED_MILLIONS[name]


def test_total_layers_are_the_published_ones():
    layers = [3 * sum(VARIANTS[name].fields["depths"]) + 2 for name in sorted(PUBLISHED_MILLIONS)]
    assert layers == [50, 59, 62, 65, 65, 98, 101, 107]


@pytest.mark.parametrize("name", list_models())
def test_the_readme_counts_the_same(name):
    rows = [line for line in README.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    assert rows[0].endswith(f"| {VARIANTS[name].params:,} |")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown model 'halonet_h9'; did you mean 'halonet_h"):
        create_model("halonet_h9")
    with pytest.raises(ValueError, match="unknown model 'resnet'; there are: halonet_h0, "):
        create_model("resnet")


@pytest.mark.parametrize("key", ["blocksize", "parent"])
def test_unknown_option_is_refused(key):
    with pytest.raises(ValueError, match=f"unknown option of halonet_h0 '{key}'"):
        create_model("halonet_h0", **{key: 8})


def test_overrides_reach_the_model():
    model = create_model("halonet_h0", num_classes=7, block_size=4, border="mask")
    assert (model.num_classes, model.block_size, model.border) == (7, 4, "mask")

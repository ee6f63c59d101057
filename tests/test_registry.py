"""The registered variants: their parameter counts, and what an unknown name gets."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from halonet.models import VARIANTS, create_model, list_models
from halonet.models.card import model_table
from halonet.ops import IMPLEMENTATIONS

README = pathlib.Path(__file__).parent.parent / "README.md"

# Trainable parameters at 1000 classes. H0 to H7 are the published counts to the paper's digit;
# timm's and MindCV's are counted in their own modules; ResNet-50 is torchvision's.
PARAMETERS = {
    "halonet_h0": 5_496_104,
    "halonet_h1": 8_098_280,
    "halonet_h2": 9_397_928,
    "halonet_h3": 11_834_728,
    "halonet_h4": 19_098_088,
    "halonet_h5": 30_710_760,
    "halonet_h6": 43_441_384,
    "halonet_h7": 67_421_288,
    "halonet_h7_conv1": 67_787_528,
    "halonet_h7_conv12": 69_259_688,
    "halonet_h7_conv123": 120_336_168,
    "halonet_h4_wide": 85_636_072,
    "halonet_h4_wide_conv12": 87_100_264,
    "timm_halonet_h1": 8_100_056,
    "halonet26t": 12_480_288,
    "halonet50ts": 22_733_280,
    "sehalonet33ts": 13_691_712,
    "eca_halonext26ts": 10_756_885,
    "haloregnetz_b": 11_680_072,
    "halo2botnet50ts_256": 22_635_360,
    "lamhalobotnet50ts_256": 22_569_824,
    "halonet_50t": 22_733_280,
    "resnet50": 25_557_032,
    "halonet_tiny": 231_560,
}
PAPER = [f"halonet_h{number}" for number in range(8)]
PUBLISHED_MILLIONS = dict(zip(PAPER, (5.5, 8.1, 9.4, 11.8, 19.1, 30.7, 43.4, 67.4), strict=True))


@pytest.fixture(autouse=True)
def no_attention(monkeypatch):
    """An implementation that is quick to trace: parameters do not depend on what it computes."""

    def nothing(q, k, v, row_table, col_table, spec):
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)

    monkeypatch.setitem(IMPLEMENTATIONS, "nothing", nothing)


def abstract_variables(name, image_size=None, **overrides):
    """Shapes of a variant's variables, without computing any."""
    overrides.setdefault("implementation", "nothing")
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
    assert VARIANTS[name].published == PUBLISHED_MILLIONS[name]


def test_mindcv_counts_the_running_statistics_too():
    statistics = count(abstract_variables("halonet_50t")["batch_stats"])
    published = VARIANTS["halonet_50t"].published
    assert round((VARIANTS["halonet_50t"].params + statistics) / 1e6, 2) == published == 22.79


@pytest.mark.parametrize("name", [name for name in list_models() if "wide" in name])
def test_the_wide_h4_is_as_large_as_published(name):
    # Published as 85 and 87 million, in whole millions and by others: cut off, not rounded.
    assert int(VARIANTS[name].params / 1e6) == VARIANTS[name].published


@pytest.mark.parametrize("name", list_models())
def test_timm_rounds_its_counts_to_ten_thousand(name):
    if VARIANTS[name].origin == "timm":
        assert round(VARIANTS[name].params / 1e6, 2) == VARIANTS[name].published


@pytest.mark.parametrize("name", list_models())
def test_a_detector_gets_four_maps(name):
    strides = [stride for stride, _ in create_model(name).features]
    assert strides == ([2, 4] if name == "halonet_tiny" else [4, 8, 16, 32])


def test_total_layers_are_the_published_ones():
    layers = [3 * sum(VARIANTS[name].fields["depths"]) + 2 for name in sorted(PUBLISHED_MILLIONS)]
    assert layers == [50, 59, 62, 65, 65, 98, 101, 107]


def test_the_readme_has_the_table_of_models():
    # `python -m halonet.models list` prints it anew.
    _, rest = README.read_text().split("<!-- models -->\n")
    table, _ = rest.split("\n<!-- end of models -->")
    assert table == model_table()


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown model 'halonet_h9'; did you mean 'halonet_h"):
        create_model("halonet_h9")
    with pytest.raises(ValueError, match="unknown model 'vgg'; there are: eca_halonext26ts, "):
        create_model("vgg")


@pytest.mark.parametrize("key", ["blocksize", "parent"])
def test_unknown_option_is_refused(key):
    with pytest.raises(ValueError, match=f"unknown option of halonet_h0 '{key}'"):
        create_model("halonet_h0", **{key: 8})


def test_overrides_reach_the_model():
    model = create_model("halonet_h0", num_classes=7, block_size=4, border="mask")
    assert (model.num_classes, model.block_size, model.border) == (7, 4, "mask")


def test_crops_are_those_of_the_published_accuracies():
    """Of timm's results/results-imagenet.csv (and byoanet.py for H1) and of MindCV's yaml."""
    crops = {
        name: (variant.crop_pct, variant.interpolation)
        for name, variant in VARIANTS.items()
        if variant.origin in ("timm", "mindcv")
    }
    wider = ("halonet26t", "halo2botnet50ts_256", "lamhalobotnet50ts_256", "timm_halonet_h1")
    narrower = ("halonet50ts", "sehalonet33ts", "eca_halonext26ts", "haloregnetz_b")
    assert crops == {
        **dict.fromkeys(wider, (0.95, "bicubic")),
        **dict.fromkeys(narrower, (0.94, "bicubic")),
        "halonet_50t": (0.95, "bilinear"),
    }

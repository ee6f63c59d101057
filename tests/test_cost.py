"""What models cost: figures that others found, and the products that a model really has."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from halonet.models import VARIANTS, create_model
from halonet.models.cost import MultiplyAdds, cost, parameters
from halonet.models.layers import BatchNorm

# In billions, for one image: total and attention, counted by others from the same description.
NOTED = {
    ("halonet_h0", 256): ("2.35", "0.77"),
    ("halonet_h1", 256): ("3.01", "0.86"),
    ("halonet_h2", 256): ("3.31", "0.89"),
    ("halonet_h3", 320): ("6.18", "1.85"),
    ("halonet_h4", 384): ("12.00", "2.67"),
    ("halonet_h5", 448): ("32.25", "10.3"),
    ("halonet_h6", 512): ("52.79", "12.4"),
    ("halonet_h7", 600): ("110.7", "24.1"),
    ("halonet_h7", 640): ("121.5", None),
}
# timm's results/benchmark-infer-*.csv, "infer_gmacs", at the models' own sizes.
TIMM = {
    "timm_halonet_h1": "3.00",
    "halonet26t": "3.19",
    "halonet50ts": "5.30",
    "sehalonet33ts": "3.55",
    "eca_halonext26ts": "2.44",
    "haloregnetz_b": "1.97",
    "halo2botnet50ts_256": "5.02",
    "lamhalobotnet50ts_256": "5.02",
    "resnet50": "4.11",
}
# One of each kind of block; the others take as long and are left to `make long`.
SOME = ("timm_halonet_h1", "sehalonet33ts", "haloregnetz_b", "lamhalobotnet50ts_256")


def total(model, height, width):
    return sum((part.cost for part in cost(model, height, width)), MultiplyAdds())


def rounded(number, like):
    """The number in billions, to as many decimals as the text."""
    return f"{number / 1e9:.{len(like.split('.')[1])}f}"


@pytest.mark.parametrize(("name", "size"), NOTED)
def test_the_paper_models_cost_what_was_noted(name, size):
    spent = total(create_model(name), size, size)
    whole, attention = NOTED[name, size]
    assert rounded(spent.total, whole) == whole
    if attention is not None:
        assert rounded(spent.attention, attention) == attention


@functools.cache
def traced(name):
    """Shapes of what each batch norm returns, and the jaxpr of the whole model."""
    model = create_model(name, implementation="xla_shift")
    size = VARIANTS[name].image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

    def run(x):
        _, variables = model.init_with_output(
            jax.random.key(0),
            x,
            train=False,
            capture_intermediates=lambda module, method: isinstance(module, BatchNorm),
        )
        return variables["intermediates"]

    jaxpr, kept = jax.make_jaxpr(run, return_shape=True)(images)
    leaves = jax.tree_util.tree_leaves_with_path(kept)
    # Beside them lie the queries and keys that attention keeps for those who ask.
    return jaxpr, sum(
        leaf.size for path, leaf in leaves if "__call__" in jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in TIMM]
)
def test_timm_measures_the_same(name):
    # Its counter, fvcore, adds two for each value that batch norm touches.
    _, normalised = traced(name)
    size = VARIANTS[name].image_size
    spent = total(create_model(name), size, size).total + 2 * normalised
    assert rounded(spent, TIMM[name]) == TIMM[name]


def products(jaxpr):
    """(multiply-adds of convolutions and plain products, those of batches of products)."""
    plain, batched = 0, 0
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            more = products(inner)
            plain, batched = plain + more[0], batched + more[1]
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_channels = equation.params["dimension_numbers"].rhs_spec[0]
            plain += equation.outvars[0].aval.size * math.prod(kernel) // kernel[out_channels]
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            spent = equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
            plain, batched = (plain, batched + spent) if batch else (plain + spent, batched)
    return plain, batched


@pytest.mark.parametrize("name", ["halonet_tiny", "sehalonet33ts", "haloregnetz_b"])
def test_the_model_has_these_projections(name):
    model, size = create_model(name), VARIANTS[name].image_size
    plain, _ = products(traced(name)[0].jaxpr)
    # The stem's kernel is padded with zeros to an even size; they multiply but say nothing.
    kernel = model.stem_kernel
    zeros = 3 * ((kernel + 1) ** 2 - kernel**2) * model.stem_widths[0] * (size // 2) ** 2
    assert plain - zeros == total(model, size, size).projections


@pytest.mark.parametrize("name", ["halonet_tiny", "sehalonet33ts"])
def test_the_model_has_these_products_of_attention(name):
    model, size = create_model(name), VARIANTS[name].image_size
    _, *parts, _ = cost(model, size, size)
    side = model.block_size + 2 * model.halo_size
    expected = 0
    for part, blocks in zip(parts, model.stages(), strict=True):
        spent = part.cost
        # Of the rows of a table only the b+2h that a query needs are gathered.
        expected += spent.content + spent.position * side // (2 * side - 1) + spent.value
        # The fused form appends a one-hot row and column of the window to each key.
        for width in {block.key_width // block.heads for block in blocks if block.kind == "h"}:
            expected += spent.content * 2 * side // width
    assert products(traced(name)[0].jaxpr)[1] == expected


def test_a_model_without_positions_spends_nothing_on_them():
    exact, none = (
        total(create_model("halonet_tiny", positions=it), 32, 32) for it in ("exact", "none")
    )
    assert dataclasses.replace(exact, position=0) == none
    assert exact.position > 0


@pytest.mark.parametrize("name", ["halonet_tiny", "halonet26t"])
def test_parameters_by_part(name):
    model, size = create_model(name), VARIANTS[name].image_size
    counts = parameters(model, size, size)
    assert sum(counts.values()) == VARIANTS[name].params
    assert set(counts) == {part.name for part in cost(model, size, size)}


def test_padded_blocks_are_counted_whole():
    # A map of 15x10 in blocks of 4 is one of 16x12, 192 queries that see 6x6 keys.
    model = create_model("halonet_tiny", pad_to_blocks=True)
    first = cost(model, 30, 20)[1]
    assert (first.height, first.width) == (15, 10)
    assert first.cost.content == first.cost.value == 192 * 36 * 32
    # Of 150 pixels that are projected: conv1, q, k, v, conv3 and the shortcut.
    assert first.cost.projections == 150 * (4 * 32 * 32 + 2 * 32 * 64)


def test_maps_of_odd_size_are_halved_upwards():
    model = create_model("halonet_h7")
    sizes = [(part.height, part.width) for part in cost(model, 600, 600)]
    assert sizes == [(150, 150), (150, 150), (75, 75), (38, 38), (19, 19), (1, 1)]


def test_a_backbone_for_detectors_has_no_head():
    parts = cost(create_model("halonet_tiny", features_only=True), 32, 32)
    assert [part.name for part in parts] == ["stem", "stage1", "stage2"]


def test_sizes_that_the_model_refuses():
    with pytest.raises(ValueError, match="image width 40 cannot be cut into blocks of 4"):
        cost(create_model("halonet_tiny"), 32, 40)

"""Where multiply-adds go: layers add up to the library's count, and docs/cost.md is of today."""

import matplotlib.image
import pytest

from experiments import cost_split
from halonet.models import VARIANTS, create_model
from halonet.models.cost import MultiplyAdds, cost
from halonet.tpu_kernels import attention_layers


@pytest.mark.parametrize("name", ["halonet_h1", "halonet_h4", "halonet50ts"])
def test_layers_add_up_to_what_the_model_costs(name):
    model, size = create_model(name), VARIANTS[name].image_size
    counted = sum((part.cost for part in cost(model, size, size)), MultiplyAdds())
    layers = [cost_split.Layer(shape) for _, _, shape in attention_layers(model, size)]
    if model.downsample == "pool":  # all queries attend
        layers = [
            cost_split.Layer(it.shape.__class__(**{**vars(it.shape), "stride": 1})) for it in layers
        ]
    assert sum((it.attention for it in layers), MultiplyAdds()) == MultiplyAdds(
        0, counted.content, counted.position, counted.value
    )


def test_the_usual_count_and_ours():
    """With halos of half a block: nine times HWC² from windows, three times projected once."""
    model = create_model("halonet_h1", block_size=8, halo_size=4)
    shape = next(shape for _, block, shape in attention_layers(model, 256) if block == 2)
    layer = cost_split.Layer(shape)
    each = layer.pixels * layer.channels**2
    assert layer.projections(haloed=True) == 9 * each == layer.convolution
    assert layer.projections(haloed=False) == 3 * each


def test_the_page_has_the_tables_of_today():
    page = (cost_split.DOCS / "cost.md").read_text()
    assert cost_split.fill(page) == page
    with pytest.raises(ValueError, match="the page has 0 places for the table 'layers'"):
        cost_split.fill("no table")


def test_what_the_page_concludes_from_them():
    """A layer is cheaper than a 3x3 convolution from 75 channels on."""
    page = (cost_split.DOCS / "cost.md").read_text()
    assert "where C is above 74 with 8 and 3" in page
    window, tables = (8 + 2 * 3) ** 2, 2 * (2 * (8 + 2 * 3) - 1)
    cheaper = [c for c in range(1, 200) if 3 * c**2 + (2 * window + tables) * c < 9 * c**2]
    assert cheaper[0] == 75
    sums = [
        layer.projections(haloed=False) + layer.attention.total for layer in cost_split.layers()
    ]
    convolutions = [layer.convolution for layer in cost_split.layers()]
    assert [a < b for a, b in zip(sums, convolutions, strict=True)] == [False, True, True, True]


def test_the_picture_is_drawn(tmp_path):
    cost_split.draw(tmp_path / "cost.png")
    assert matplotlib.image.imread(tmp_path / "cost.png").shape[1] > 1000

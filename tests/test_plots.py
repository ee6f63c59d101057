"""Pictures: PNGs of a sane size, mistakes first, and the window is what the attention sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from halonet import halo_attention, plots

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been written."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


def history(names=("train/loss", "train/top1", "train/learning_rate", "eval/loss", "eval/top1")):
    return [{"step": step, **dict.fromkeys(names, 1 / step)} for step in (1, 2, 4)]


def examples(labels, winners, margins):
    """Images, labels and logits in which `winners` beat the other classes by `margins`."""
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
    logits = np.zeros((len(labels), len(CLASSES)), np.float32)
    logits[np.arange(len(labels)), winners] = margins
    return images, np.array(labels), logits


def assert_is_picture(path, width, height):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert width[0] < image.width < width[1]
        assert height[0] < image.height < height[1]
        low, high = image.convert("L").getextrema()
        assert low < 100 < 250 < high  # something is drawn, on white


def test_learning_curves_are_a_picture(tmp_path):
    plots.learning_curves(history(), tmp_path / "curves.png")
    assert_is_picture(tmp_path / "curves.png", (1000, 1500), (300, 600))


@pytest.mark.parametrize(
    "rows",
    [
        history(("train/loss", "train/top1", "train/learning_rate")),
        history(("eval/loss", "eval/top1")),
        [{"step": 0, "perf/started": 1.0}],
        [{"step": 1, "train/loss": 1e-3, "train/top1": 1.0, "train/learning_rate": 0.0}],
    ],
    ids=["no evaluation", "only evaluations", "nothing", "one perfect row"],
)
def test_learning_curves_of_little(rows, tmp_path):
    plots.learning_curves(rows, tmp_path / "curves.png")
    assert_is_picture(tmp_path / "curves.png", (1000, 1500), (300, 600))


BINS = {"count": [0, 10, 30], "top1": [0.0, 0.4, 0.9], "confidence": [0.0, 0.5, 0.8]}


def test_reliability_is_a_picture(tmp_path):
    plots.reliability({"one": BINS}, tmp_path / "one.png")
    assert_is_picture(tmp_path / "one.png", (300, 600), (350, 600))
    plots.reliability({"one": BINS, "two": BINS, "three": BINS}, tmp_path / "three.png")
    assert_is_picture(tmp_path / "three.png", (1000, 1500), (350, 600))


def test_reliability_shows_the_bins(figures, tmp_path):
    plots.reliability({"digits": BINS}, tmp_path / "reliability.png")
    panel, shares = figures[0].axes
    bars, gaps = panel.containers
    np.testing.assert_allclose([bar.get_height() for bar in bars], BINS["top1"])
    np.testing.assert_allclose([bar.get_y() for bar in gaps], BINS["top1"])
    np.testing.assert_allclose([bar.get_height() for bar in gaps], [0.0, 0.1, -0.1], atol=1e-9)
    np.testing.assert_allclose([bar.get_x() for bar in bars], [0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(shares.lines[0].get_ydata(), [0, 0.25, 0.75, 0.75])
    assert panel.get_title() == "digits\ncalibration error 10.00%"


def test_learning_curves_show_the_rows(figures, tmp_path):
    rows = [{"step": 0, "perf/started": 1.0}, *history(("train/loss", "train/learning_rate"))]
    rows += [{"step": 4, "eval/loss": 0.5, "eval/top1": 0.75}]
    plots.learning_curves(rows, tmp_path / "curves.png")
    loss, error, rate = figures[0].axes
    drawn = [[line.get_xydata().tolist() for line in axis.lines] for axis in (loss, error, rate)]
    series = [[1.0, 1.0], [2.0, 0.5], [4.0, 0.25]]
    assert drawn == [[series, [[4.0, 0.5]]], [[], [[4.0, 25.0]]], [series]]


# Label, class that wins and by how much; the titles are in the order of the sheet.
MIXED = examples([0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 1, 1], [4.0, 1.0, 2.0, 5.0, 3.0, 0.5])
MIXED_TITLES = [
    "ant as bee  99%",
    "cat as ant  79%",
    "cat as bee  45%",
    "bee  58%",
    "bee  91%",
    "ant  96%",
]


def titles(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_prediction_sheet_is_a_picture(tmp_path):
    plots.prediction_sheet(*MIXED, CLASSES, tmp_path / "sheet.png")
    assert_is_picture(tmp_path / "sheet.png", (900, 1400), (100, 400))


def test_view_sheet_is_a_picture(tmp_path):
    images = MIXED[0]
    plots.view_sheet(images, images, "abcdef", tmp_path / "sheet.png")
    assert_is_picture(tmp_path / "sheet.png", (800, 1200), (300, 500))


def test_view_sheet_has_evaluation_below_training(figures, tmp_path):
    images = MIXED[0]
    plots.view_sheet(images, 255 - images, "abcdef", tmp_path / "sheet.png", columns=4)
    grid = np.reshape(figures[0].axes, (4, 4))
    for index, name in enumerate("abcdef"):
        row, column = divmod(index, 4)
        above, below = grid[2 * row, column], grid[2 * row + 1, column]
        assert above.get_title() == name
        np.testing.assert_array_equal(above.images[0].get_array(), images[index])
        np.testing.assert_array_equal(below.images[0].get_array(), 255 - images[index])
    assert not any(axis.images for axis in grid[2:, 2:].flat)


def test_sheet_puts_mistakes_first(figures, tmp_path):
    plots.prediction_sheet(*MIXED, CLASSES, tmp_path / "sheet.png")
    assert titles(figures[0]) == MIXED_TITLES
    assert figures[0].get_suptitle() == "3 mistakes in 6, first; then the least certain"
    (axis,) = figures[0].axes
    # Each picture is that of its title, and below it: the first one is example 3.
    assert np.array_equal(axis.images[0].get_array(), MIXED[0][3])
    for text, image in zip(axis.texts, axis.images, strict=True):
        (x, y), (left, right, _, top) = text.get_position(), image.get_extent()
        assert left < x < right
        assert top - 0.1 < y < top
    assert [text.get_color() for text in axis.texts] == ["tab:red"] * 3 + ["tab:green"] * 3


def test_sheet_with_more_examples_than_cells(figures, tmp_path):
    plots.prediction_sheet(*MIXED, CLASSES, tmp_path / "sheet.png", columns=2, rows=2)
    assert titles(figures[0]) == MIXED_TITLES[:4]
    assert figures[0].get_suptitle().startswith("3 mistakes in 6")


def test_sheet_without_mistakes(tmp_path, figures):
    plots.prediction_sheet(
        *examples([0, 1], [0, 1], [4.0, 1.0]), CLASSES, tmp_path / "sheet.png", columns=2
    )
    assert titles(figures[0]) == ["bee  58%", "ant  96%"]
    assert figures[0].get_suptitle().startswith("0 mistakes in 2")


@pytest.mark.parametrize(("length", "columns"), [(1, 10), (9, 5), (40, 4)])
def test_captions_of_long_names_do_not_meet(figures, tmp_path, length, columns):
    names = [character * length for character in "aeg"]
    mistakes = examples(12 * [0], 12 * [1], 12 * [9.0])
    plots.prediction_sheet(*mistakes, names, tmp_path / "sheet.png")
    (axis,), renderer = figures[0].axes, FigureCanvasAgg(figures[0]).get_renderer()
    assert len({image.get_extent()[0] for image in axis.images}) == columns
    boxes = [text.get_window_extent(renderer) for text in axis.texts[:columns]]
    edges = [0, *(it for box in boxes for it in (box.x0, box.x1)), figures[0].bbox.x1]
    assert edges == sorted(edges)


def test_sheet_of_one_example_with_huge_logits(tmp_path):
    plots.prediction_sheet(*examples([2], [2], [1e4]), CLASSES, tmp_path / "sheet.png")
    assert_is_picture(tmp_path / "sheet.png", (900, 1400), (100, 400))


def seen(height, width, block, halo, stride, query):
    """Which pixels' values reach the output of a query, by the gradient of the definition."""
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.normal(size=(1, height, width, 1, 2)), jnp.float32)
    tables = jnp.zeros((2 * block + 2 * halo - 1, 2))

    def output(values):
        options = {"block": block, "halo": halo, "stride": stride, "pad_to_blocks": True}
        queries = keys[:, ::stride, ::stride]
        out = halo_attention(
            *(queries, keys, values, tables, tables), **options, implementation="reference"
        )
        return out[0, query[0], query[1]].sum()

    return np.asarray(jax.jit(jax.grad(output))(keys))[0, ..., 0, 0] != 0


def drawn(axis):
    """The rows and columns inside the window that a panel shows."""
    (window,) = [patch for patch in axis.patches if patch.get_label() == "window"]
    left, top = window.get_xy()
    return top, top + window.get_height(), left, left + window.get_width()


@pytest.mark.parametrize(
    ("height", "width", "block", "halo", "stride", "query"),
    [
        (16, 24, 4, 1, 1, (6, 9)),
        (16, 16, 4, 2, 1, (0, 15)),
        (16, 16, 4, 3, 2, (7, 0)),
        (8, 8, 8, 3, 1, (3, 3)),
        # Padded to whole blocks.
        (19, 13, 4, 1, 1, (18, 12)),
        (19, 13, 4, 2, 2, (9, 6)),
        (5, 5, 6, 2, 1, (0, 4)),
    ],
)
def test_the_drawn_window_is_what_the_attention_sees(
    height, width, block, halo, stride, query, figures, tmp_path
):
    pixels = np.zeros((height, width, 3), np.uint8)
    plots.halo_picture([(pixels, stride, query)], tmp_path / "x.png", block=block, halo=halo)
    expected = np.zeros((height, width), bool)
    whole, close_up = figures[0].axes
    top, bottom, left, right = drawn(close_up)
    assert drawn(whole) == (top, bottom, left, right)
    expected[top:bottom, left:right] = True
    assert np.array_equal(seen(height, width, block, halo, stride, query), expected)
    # What is not seen lies in the shade.
    assert np.array_equal(close_up.images[1].get_array()[..., 3] == 0, expected)


def test_queries_are_drawn_where_they_are(figures, tmp_path):
    layers = [(np.zeros((19, 13, 3), np.uint8), stride, (2, 3)) for stride in (1, 2)]
    plots.halo_picture(layers, tmp_path / "x.png", block=4, halo=1)
    _, every, second = figures[0].axes

    def dots(axis):
        block, star = (points.get_offsets() for points in axis.collections[-2:][::-1])
        return sorted(map(tuple, block - 0.5)), tuple(star[0] - 0.5)

    assert dots(every) == ([(x, y) for x in (0, 1, 2, 3) for y in (0, 1, 2, 3)], (3, 2))
    assert dots(second) == ([(x, y) for x in (4, 6) for y in (4, 6)], (6, 4))
    assert "4 × 4 queries (red) share 6 × 6 keys (gold),\n5 × 5 of them" in every.get_title()
    assert second.get_title().endswith("2 × 2 queries (red) share 6 × 6 keys (gold)")


@pytest.mark.parametrize(
    ("border", "rest"), [("zeros", "the others are zeros"), ("mask", "the others have no weight")]
)
def test_the_caption_says_what_lies_outside(border, rest, figures, tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    options = {"block": 4, "halo": 1, "border": border, "title": "here"}
    plots.halo_picture([(pixels, 1, (0, 0))], tmp_path / "x.png", **options)
    whole, close_up = figures[0].axes
    assert whole.get_title() == "here\nA map of 8 × 8 pixels in blocks of 4 × 4"
    assert close_up.get_title().endswith(f"5 × 5 of them in the image; {rest}")


def test_halo_picture_is_a_picture(tmp_path):
    layers = [(plots.photograph(24, 32), 1, (23, 0)), (plots.photograph(48, 64), 2, (23, 0))]
    plots.halo_picture(layers, tmp_path / "x.png", block=8, halo=3)
    assert_is_picture(tmp_path / "x.png", (1400, 1600), (500, 600))


def test_photograph_of_any_shape():
    for height, width in ((24, 24), (24, 96), (96, 24), (500, 700)):
        pixels = plots.photograph(height, width)
        assert pixels.shape == (height, width, 3)
        assert pixels.dtype == np.uint8
        assert pixels.std() > 40


def test_compared_curves_show_each_run(figures, tmp_path):
    runs = {"a": history(), "b": history(("train/loss", "eval/top1"))}
    plots.compared_curves(runs, tmp_path / "curves.png")
    training, loss, error = figures[0].axes
    series = [[1.0, 1.0], [2.0, 0.5], [4.0, 0.25]]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in training.lines}
    assert drawn == {"a": series, "b": series}
    assert [line.get_xydata().tolist() for line in loss.lines] == [series, []]
    assert [list(line.get_ydata()) for line in error.lines] == [[0, 50, 75]] * 2


def test_a_sheet_has_a_caption_above_each_image(figures, tmp_path):
    images = MIXED[0]
    plots.sheet(images, "abcdef", tmp_path / "sheet.png", columns=4, title="six")
    assert titles(figures[0]) == list("abcdef")
    assert figures[0].get_suptitle() == "six"
    for text, image, pixels in zip(
        figures[0].axes[0].texts, figures[0].axes[0].images, images, strict=True
    ):
        np.testing.assert_array_equal(image.get_array(), pixels)
        (x, y), (left, right, _, top) = text.get_position(), image.get_extent()
        assert left < x < right
        assert top - 0.1 < y < top
        assert text.get_color() == "black"


def test_heat_maps_are_a_picture(tmp_path):
    values = np.random.default_rng(0).random((5, 8, 8))
    plots.heat_maps(dict(zip("abcde", values, strict=True)), tmp_path / "maps.png")
    assert_is_picture(tmp_path / "maps.png", (900, 1400), (400, 800))


def test_heat_maps_lie_over_the_whole_image(figures, tmp_path):
    image, values = plots.photograph(32, 48), np.zeros((8, 12))
    values[2, 3] = 4.0
    plots.heat_maps({"head 0": values}, tmp_path / "x.png", image=image, at=(9, 13))
    (axis,) = figures[0].axes
    below, above = axis.images
    assert below.get_extent() == above.get_extent() == [0, 48, 32, 0]
    np.testing.assert_array_equal(above.get_array(), values)
    assert above.get_clim() == (0, 4)
    # Where there is no weight the photograph shows, and only there.
    np.testing.assert_array_equal(above.get_alpha(), values / 4)
    assert axis.collections[0].get_offsets().tolist() == [[13, 9]]
    assert axis.get_title() == "head 0"


def test_heat_maps_with_signs_have_white_at_zero(figures, tmp_path):
    maps = {"a": np.array([[-1.0, 3.0]]), "b": np.zeros((1, 2)), "c": np.ones((1, 2))}
    plots.heat_maps(maps, tmp_path / "x.png", columns=2, signed=True)
    *shown, empty = figures[0].axes
    assert [axis.images[0].get_clim() for axis in shown] == [(-3, 3), (-1, 1), (-1, 1)]
    assert not empty.images

"""Pictures: they are PNGs of a sane size, and the sheet puts the mistakes first."""

import numpy as np
import pytest
from PIL import Image

from halonet import plots

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
    return [axis.get_title() for axis in figure.axes]


def test_prediction_sheet_is_a_picture(tmp_path):
    plots.prediction_sheet(*MIXED, CLASSES, tmp_path / "sheet.png")
    assert_is_picture(tmp_path / "sheet.png", (900, 1400), (100, 400))


def test_sheet_puts_mistakes_first(figures, tmp_path):
    plots.prediction_sheet(*MIXED, CLASSES, tmp_path / "sheet.png")
    assert titles(figures[0]) == MIXED_TITLES + [""] * 4
    assert figures[0].get_suptitle() == "3 mistakes in 6, first; then the least certain"
    # Each picture is that of its title: the first one is example 3.
    assert np.array_equal(figures[0].axes[0].images[0].get_array(), MIXED[0][3])
    assert [axis.title.get_color() for axis in figures[0].axes[:6]] == (
        ["tab:red"] * 3 + ["tab:green"] * 3
    )


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


def test_sheet_of_one_example_with_huge_logits(tmp_path):
    plots.prediction_sheet(*examples([2], [2], [1e4]), CLASSES, tmp_path / "sheet.png")
    assert_is_picture(tmp_path / "sheet.png", (900, 1400), (100, 400))

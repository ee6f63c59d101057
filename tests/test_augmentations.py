"""The sheet of augmentations: a picture of a sane size that shows every one of them."""

import numpy as np
from PIL import Image

from experiments import augmentations
from halonet.data.randaugment import INCREASING_OPERATIONS


def test_every_operation_has_a_row_and_changes_the_photograph():
    rows = {title.split("\n")[0]: pictures for title, pictures in augmentations.rows()}
    assert set(rows) >= {*INCREASING_OPERATIONS, "random resized crop", "flip", "colour jitter"}
    ((_, image),) = rows.pop("as it is")
    for title, pictures in rows.items():
        assert 1 <= len(pictures) <= 5, title
        assert all(pixels.shape == image.shape for _, pixels in pictures), title
        assert any((pixels != image).any() for _, pixels in pictures), title


def test_sheet_is_a_picture(tmp_path):
    augmentations.draw(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size < 700_000
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert 1000 < sheet.width < 1600
        assert 1000 < sheet.height < 1600
        pixels = np.asarray(sheet.convert("RGB"))
    # Half of it is photographs, and the rest is white with writing on it.
    assert 0.3 < (pixels == 255).all(axis=2).mean() < 0.7
    assert (pixels < 60).all(axis=2).any()

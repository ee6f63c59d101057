"""Where does a folder of pictures come from, with nothing downloaded? Out of three photographs.

One class a photograph, in tiles: the colours nearly tell which. It stands in for a folder of one's
own pictures (tests/test_finetune.py, experiments/notebooks) and proves nothing but that the
machinery learns.
"""

import os
import pathlib

import numpy as np
from matplotlib import cbook
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs() -> dict[str, np.ndarray]:
    """Name -> uint8 (H, W, 3): a pavilion and a flower of scikit-learn's, matplotlib's portrait."""
    pictures = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pictures["portrait"] = np.asarray(Image.open(file))
    return pictures


def write_tiles(folder: str | os.PathLike, size: int = 48) -> int:
    """Writes squares of `size` pixels as JPEGs, FOLDER/CLASS/ROW_COLUMN.jpg: how many there are."""
    count = 0
    for name, pixels in photographs().items():
        place = pathlib.Path(folder) / name
        place.mkdir(parents=True, exist_ok=True)
        for top in range(0, len(pixels) - size, size):
            for left in range(0, pixels.shape[1] - size, size):
                tile = Image.fromarray(pixels[top : top + size, left : left + size])
                tile.save(place / f"{top}_{left}.jpg", quality=90)
                count += 1
    return count

"""What do blocks, halos and subsampled queries look like? Draws docs/halo.png.

python -m experiments.draw_halo
"""

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.datasets import load_sample_image

# H1's first stage on a 64x64 map shows 8x8 blocks; a quarter of that map is drawn.
SIZE, BLOCK, HALO = 32, 8, 3
CHOSEN = (1, 2)  # row and column of the block whose window is drawn
OUT = pathlib.Path(__file__).parent.parent / "docs" / "halo.png"


def main() -> None:
    photograph = Image.fromarray(load_sample_image("china.jpg")[40:400, 60:420])
    pixels = np.asarray(photograph.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    figure = Figure(figsize=(12, 4.7), layout="constrained")
    blocks, window, strided = figure.subplots(1, 3)
    top, left = CHOSEN[0] * BLOCK, CHOSEN[1] * BLOCK

    for axis in (blocks, window, strided):
        axis.imshow(pixels, extent=(0, SIZE, SIZE, 0))
        axis.set(xlim=(0, SIZE), ylim=(SIZE, 0), xticks=[], yticks=[])
    grid = {"color": "white", "linewidth": 1.0}
    for axis in (blocks, window, strided):
        for line in range(0, SIZE + 1, BLOCK):
            axis.axhline(line, **grid)
            axis.axvline(line, **grid)

    blocks.set_title(f"1. A feature map in blocks of {BLOCK} × {BLOCK} pixels")

    side = BLOCK + 2 * HALO
    shade = np.zeros((SIZE, SIZE, 4))
    shade[..., 3] = 0.65
    shade[top - HALO : top + BLOCK + HALO, left - HALO : left + BLOCK + HALO, 3] = 0
    for axis in (window, strided):
        axis.imshow(shade, extent=(0, SIZE, SIZE, 0))
        corner = (left - HALO, top - HALO)
        axis.add_patch(Rectangle(corner, side, side, fill=False, color="gold", linewidth=2.5))
        axis.add_patch(
            Rectangle((left, top), BLOCK, BLOCK, fill=False, color="tab:red", linewidth=2.5)
        )
    rows, columns = np.mgrid[0:BLOCK, 0:BLOCK]
    dots = {"color": "tab:red", "edgecolor": "white", "linewidth": 0.4}
    window.scatter(left + columns + 0.5, top + rows + 0.5, s=16, **dots)
    window.set_title(
        f"2. Its {BLOCK * BLOCK} queries (red) share {side} × {side} keys:\n"
        f"the block and a halo of {HALO} (gold)"
    )
    kept = np.s_[::2, ::2]
    strided.scatter(left + columns[kept] + 0.5, top + rows[kept] + 0.5, s=16, **dots)
    strided.set_title("3. Downsampling: every second query,\nall keys, a map of half the size")
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=100)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

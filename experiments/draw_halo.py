"""What do blocks, halos and subsampled queries look like, and how far do layers of them see? Draws
docs/halo.png and docs/reach.png.

python -m experiments.draw_halo
"""

import pathlib

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from halonet.plots import halo_picture, photograph

# H1's first stage on a 64x64 map shows 8x8 blocks; a quarter of such a map is drawn.
SIZE, BLOCK, HALO = 32, 8, 3
QUERY = (12, 18)
DOCS = pathlib.Path(__file__).parent.parent / "docs"


def reach(pixel: int, layers: int, *, block: int, halo: int, size: int) -> tuple[int, int]:
    """Returns the first pixel of a row, and the one behind the last, that `layers` layers of
    attention bring to a pixel: of the blocks that the layer before reached, the windows."""
    first, last = pixel, pixel
    for _ in range(layers):
        first = max(first // block * block - halo, 0)
        last = min(last // block * block + block - 1 + halo, size - 1)
    return first, last + 1


def draw_reach(path: pathlib.Path, size: int = 64, layers: int = 3) -> None:
    """Draws what can reach one pixel through a few layers, with halos and without."""
    figure = Figure(figsize=(11, 5.6), layout="compressed")
    at, pixels = (QUERY[0] + 16, QUERY[1] + 16), photograph(size, size)
    for axis, halo in zip(figure.subplots(1, 2), (0, HALO), strict=True):
        axis.imshow(pixels, extent=(0, size, size, 0), alpha=0.75)
        axis.set(xticks=[], yticks=[])
        axis.hlines(range(0, size + 1, BLOCK), 0, size, color="white", linewidth=0.8)
        axis.vlines(range(0, size + 1, BLOCK), 0, size, color="white", linewidth=0.8)
        seen = {}
        for count in range(1, layers + 1):
            box = [reach(it, count, block=BLOCK, halo=halo, size=size) for it in at]
            seen.setdefault(tuple(box), []).append(str(count))
        for ((top, bottom), (left, right)), counts in seen.items():
            corner, sides = (left, top), (right - left, bottom - top)
            style = {"fill": False, "edgecolor": "gold", "linewidth": 2.2, "zorder": 3}
            axis.add_patch(Rectangle(corner, *sides, **style))
            label = f"{', '.join(counts)} layer{'s' if counts != ['1'] else ''}"
            box = {"facecolor": "gold", "edgecolor": "none", "pad": 1.5}
            axis.text(left + 0.5, top + 0.6, label, fontsize=9, va="top", bbox=box, zorder=4)
        star = {"marker": "*", "color": "tab:red", "edgecolor": "white", "zorder": 5}
        axis.scatter(at[1] + 0.5, at[0] + 0.5, s=130, linewidth=1, **star)
        axis.set_title("blocks alone" if not halo else f"with a halo of {halo} pixels", fontsize=11)
    figure.savefig(path, dpi=110)


def main() -> None:
    pixels = photograph(SIZE, SIZE)
    kept = (QUERY[0] // 2, QUERY[1] // 2)
    DOCS.mkdir(exist_ok=True)
    layers = [(pixels, 1, QUERY), (pixels, 2, kept)]
    halo_picture(layers, DOCS / "halo.png", block=BLOCK, halo=HALO)
    draw_reach(DOCS / "reach.png")
    print(f"wrote {DOCS / 'halo.png'} and {DOCS / 'reach.png'}")


if __name__ == "__main__":
    main()

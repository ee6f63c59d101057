"""What do blocks, halos and subsampled queries look like? Draws docs/halo.png.

python -m experiments.draw_halo
"""

import pathlib

from halonet.plots import halo_picture, photograph

# H1's first stage on a 64x64 map shows 8x8 blocks; a quarter of such a map is drawn.
SIZE, BLOCK, HALO = 32, 8, 3
QUERY = (12, 18)
OUT = pathlib.Path(__file__).parent.parent / "docs" / "halo.png"


def main() -> None:
    pixels = photograph(SIZE, SIZE)
    kept = (QUERY[0] // 2, QUERY[1] // 2)
    OUT.parent.mkdir(exist_ok=True)
    halo_picture([(pixels, 1, QUERY), (pixels, 2, kept)], OUT, block=BLOCK, halo=HALO)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

"""What does each augmentation of halonet.data.augment do to a photograph? Draws
docs/augmentations.png.

python -m experiments.augmentations
"""

import functools
import os
import pathlib
from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from halonet.data import augment
from halonet.data.randaugment import (
    INCREASING_OPERATIONS,
    Operation,
    RandAugment,
    operation_argument,
)
from halonet.plots import photograph

OUT = pathlib.Path(__file__).parent.parent / "docs" / "augmentations.png"

SIDE = 88
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = "rand-m9-n2-mstd0.5-inc1"
# Magnitude with its sign, for the operations that go both ways and for those that do not.
BOTH_WAYS, ONE_WAY = (-10, -5, 2, 5, 10), (2, 4, 6, 8, 10)
ARGUMENTS = {
    "Rotate": "degrees",
    "Posterize": "bits that are kept",
    "Solarize": "inverted from there on",
    "SolarizeAdd": "added to what is\nbelow 128",
    "Color": "factor",
    "Contrast": "factor",
    "Brightness": "factor",
    "Sharpness": "factor",
    "ShearX": "pixels a pixel",
    "ShearY": "pixels a pixel",
    "TranslateXRel": "of the width",
    "TranslateYRel": "of the height",
}

Picture = tuple[str, np.ndarray]
"""What is said below, and the pixels."""


def operation_pictures(image: np.ndarray, name: str) -> list[Picture]:
    """One operation of RandAugment at five magnitudes; once, if it has no magnitude."""
    picture = Image.fromarray(image)
    if operation_argument(name, 0) is None:
        return [("", np.asarray(Operation(name)(picture)))]
    signed = operation_argument(name, 10, 1) != operation_argument(name, 10, -1)
    made = []
    for magnitude in BOTH_WAYS if signed else ONE_WAY:
        argument = operation_argument(name, abs(magnitude), 1 if magnitude > 0 else -1)
        pixels = np.asarray(Operation(name, argument)(picture))
        made.append((f"{argument:.3g} (m{abs(magnitude)})", pixels))
    return made


def drawn_pictures(transform: Callable, image: np.ndarray, caption: str = "") -> list[Picture]:
    """Five draws of a random transform."""
    return [(caption, transform(image, np.random.default_rng(seed))) for seed in range(5)]


def rows() -> Iterable[tuple[str, list[Picture]]]:
    """(what is said at the left, five pictures or fewer) of each row."""
    whole = photograph(300, 400)
    image = photograph(SIDE, SIDE)
    yield "as it is\n\nbelow: the argument and\n(m) the magnitude", [("", image)]

    boxes = [augment.random_crop_box(300, 400, np.random.default_rng(seed)) for seed in range(5)]
    yield (
        "random resized crop\narea 0.08 to 1\naspect 3/4 to 4/3\nof 300x400 pixels",
        [
            (f"{height}x{width}", augment.crop_and_resize(whole, (top, left, height, width), SIDE))
            for top, left, height, width in boxes
        ],
    )
    yield "flip", [("", augment.random_flip(image, np.random.default_rng(0), probability=1))]
    jitter = functools.partial(augment.color_jitter, brightness=0.4, contrast=0.4, saturation=0.4)
    yield (
        "colour jitter\nbrightness 0.4\ncontrast 0.4\nsaturation 0.4",
        drawn_pictures(jitter, image),
    )
    for fill in augment.FILLS:
        erase = functools.partial(
            augment.random_erasing, probability=1, mean=MEAN, std=STD, fill=fill
        )
        yield f'random erasing\nfill "{fill}"', drawn_pictures(erase, image)
    rand_augment = RandAugment.parse(RECIPE)
    title = "RandAugment\n" + RECIPE.replace("-mstd", "\n-mstd")
    yield title, drawn_pictures(rand_augment, image)
    everything = functools.partial(
        augment.augment,
        rand_augment=rand_augment,
        erasing=functools.partial(augment.random_erasing, probability=0.25, mean=MEAN, std=STD),
    )
    yield (
        "all, as in training:\nflip, RandAugment,\nerasing (0.25)",
        drawn_pictures(everything, image),
    )

    for name in INCREASING_OPERATIONS:
        meaning = ARGUMENTS.get(name.removesuffix("Increasing"), "")
        yield f"{name}\n{meaning}", operation_pictures(image, name)


def draw(path: str | os.PathLike) -> None:
    """Writes the sheet as a PNG: two panels, each with a row for a transform."""
    all_rows = list(rows())
    in_panel = -(-len(all_rows) // 2)
    gap, left, below = 6, 160, 16
    width, height = left + 5 * (SIDE + gap), SIDE + below + gap
    sheet = Image.new("RGB", (2 * width + gap, in_panel * height + gap), "white")
    write = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(size=13), ImageFont.load_default(size=11)
    for index, (title, pictures) in enumerate(all_rows):
        x, y = gap + index // in_panel * width, gap + index % in_panel * height
        write.multiline_text((x, y + 2), title, "black", font, spacing=3)
        for column, (caption, pixels) in enumerate(pictures):
            at = x + left + column * (SIDE + gap)
            sheet.paste(Image.fromarray(np.ascontiguousarray(pixels)), (at, y))
            write.text((at, y + SIDE + 1), caption, "black", small)
    # With a palette the file is less than half as large.
    small_sheet = sheet.quantize(palette=sheet.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    colors = np.array(small_sheet.getpalette()).reshape(-1, 3)
    # Pillow's nearest colour is not always the nearest, and paper is to be white.
    colors[colors.min(axis=1) > 250] = 255
    small_sheet.putpalette(colors.ravel().tolist())
    small_sheet.save(path, optimize=True)


def main() -> None:
    OUT.parent.mkdir(exist_ok=True)
    draw(OUT)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

"""Augmentations on the host: crop, flip, colour jitter, RandAugment, random erasing.

All are pure functions of the image and of a numpy Generator, on uint8 RGB of any height and width:
the same image and a Generator in the same state give the same pixels, and no argument is written
to. What comes back may share memory with the argument and may be read-only.

`augment` composes them in timm's order and goes from numpy to Pillow and back at most once.
"""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from halonet.data.randaugment import INTERPOLATIONS, Operation, RandAugment, apply_operations

Real = float | int
Range = tuple[Real, Real]
Box = tuple[int, int, int, int]
Erasing = Callable[[np.ndarray, np.random.Generator], np.ndarray]

FILLS = ("pixel", "mean")


def random_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    area: Range = (0.08, 1.0),
    aspect: Range = (3 / 4, 4 / 3),
) -> Box:
    """The box of a random resized crop (Szegedy et al. 2015), as torchvision and timm draw it.

    Ten times an area, uniform, and an aspect, log-uniform, are drawn, until a box of these fits
    into the image; its place is then uniform. If none fits, the box is the middle of the image, as
    much of it as the range of aspects allows.

    Args:
      height: of the image, in pixels, at least 1.
      width: of the image, in pixels, at least 1.
      rng: gives two numbers an attempt and two for the place.
      area: of the box as a fraction of the image's.
      aspect: of the box, width by height, in pixels.

    Returns (top, left, height, width) in pixels; the box lies inside the image and has at least one
    pixel. Raises ValueError if a range is not positive and in order, or if an area is above 1.
    """
    _check_range("area", area, most=1.0)
    _check_range("aspect", aspect)
    for _ in range(10):
        box_height, box_width = _random_sides(
            height * width, rng, area, 1 / aspect[1], 1 / aspect[0]
        )
        if 0 < box_height <= height and 0 < box_width <= width:
            top, left = _random_place(height - box_height, width - box_width, rng)
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width < aspect[0] * height:
        box_height = max(1, round(width / aspect[0]))
    elif width > aspect[1] * height:
        box_width = max(1, round(height * aspect[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def crop_and_resize(
    image: UInt8[np.ndarray, "h w 3"], box: Box, size: int, interpolation: str = "bilinear"
) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts out a box and resizes it to a square, antialiased, by Pillow.

    The box is cut out first, as in torchvision: what lies beyond it has no influence (it would, if
    Pillow were given the image and the box), so a decoder may decode the box alone.

    Args:
      image: pixels.
      box: (top, left, height, width) in pixels.
      size: side of the square, in pixels.
      interpolation: "bilinear" or "bicubic".

    Raises ValueError if the interpolation is unknown or the box does not lie inside the image.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation={interpolation!r} must be one of "
            + ", ".join(map(repr, INTERPOLATIONS))
        )
    top, left, height, width = box
    if (
        min(top, left) < 0
        or min(height, width) < 1
        or (top + height > image.shape[0] or left + width > image.shape[1])
    ):
        raise ValueError(
            f"box={box} (top, left, height, width) does not lie inside the image of "
            f"{image.shape[0]}x{image.shape[1]} pixels"
        )
    picture = Image.fromarray(image[top : top + height, left : left + width])
    return np.asarray(picture.resize((size, size), INTERPOLATIONS[interpolation]))


def random_flip(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, probability: Real = 0.5
) -> UInt8[np.ndarray, "h w 3"]:
    """Mirrors left and right with the given probability."""
    return image[:, ::-1] if rng.random() < probability else image


def color_jitter(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    brightness: Real,
    contrast: Real,
    saturation: Real,
) -> UInt8[np.ndarray, "h w 3"]:
    """Brightness, contrast and saturation changed at random, as torchvision's ColorJitter does it
    to Pillow pictures.

    Each of the three factors is uniform in [max(0, 1 - x), 1 + x], where 1 is the image itself;
    they are applied in random order. Nothing is done about those whose x is 0.

    Raises ValueError if one of the three is negative.
    """
    return apply_operations(image, _draw_jitter(rng, (brightness, contrast, saturation)))


def random_erasing(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    probability: Real,
    mean: tuple[Real, Real, Real],
    std: tuple[Real, Real, Real],
    area: Range = (0.02, 1 / 3),
    aspect: Range = (0.3, 10 / 3),
    attempts: int = 10,
    fill: str = "pixel",
) -> UInt8[np.ndarray, "h w 3"]:
    """Erases a rectangle (Zhong et al. 2017, https://arxiv.org/abs/1708.04896), as timm does.

    timm and MindCV erase after normalisation, which here happens on the device. So what they write
    is undone here: "pixel" is noise N(mean, std) for each pixel and channel, "mean" is the mean
    (timm's "const", MindCV's re_value=0). The difference: values are rounded to 1/255 and, where
    the noise is below 0 or above 1 (about beyond two deviations), cut off.

    Args:
      image: pixels.
      rng: decides and gives the noise.
      probability: that anything is erased.
      mean: of the data, for each channel, in units of the full range (0 to 1).
      std: as mean.
      area: of the rectangle as a fraction of the image's; uniform.
      aspect: of the rectangle, height by width; log-uniform.
      attempts: how often a rectangle is drawn until one is smaller than the image both ways; if
        none is, nothing is erased. (timm 10; the MindCV recipe 1.)
      fill: "pixel" or "mean".

    Raises ValueError if the fill is unknown or a range is not positive and in order.
    """
    _check_range("area", area, most=1.0)
    _check_range("aspect", aspect)
    if fill not in FILLS:
        raise ValueError(f"fill={fill!r} must be one of " + ", ".join(map(repr, FILLS)))
    if rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(attempts):
        rows, columns = _random_sides(height * width, rng, area, *aspect)
        if rows < height and columns < width:
            break
    else:
        return image
    top, left = _random_place(height - rows, width - columns, rng)
    values = np.float32(255) * np.asarray(mean, np.float32)
    if fill == "pixel":
        noise = rng.standard_normal((rows, columns, 3), np.float32)
        noise *= np.float32(255) * np.asarray(std, np.float32)
        noise += values
        values = noise
    erased = image.copy()
    erased[top : top + rows, left : left + columns] = np.clip(np.rint(values), 0, 255)
    return erased


def augment(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    flip: Real = 0.5,
    rand_augment: RandAugment | None = None,
    color_jitter: tuple[Real, Real, Real] | None = None,
    erasing: Erasing | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """What training does to a cropped image, in the order of timm: flip, RandAugment or else
    colour jitter, erasing.

    Args:
      image: pixels, cropped and resized.
      rng: what each step draws, it draws in this order.
      flip: probability of mirroring left and right.
      rand_augment: such as RandAugment.parse("rand-m9-n2-mstd0.5-inc1").
      color_jitter: (brightness, contrast, saturation) as of `color_jitter`. Where there is
        RandAugment, it does nothing: so it is in timm and in MindCV, whose recipes set both.
      erasing: such as functools.partial(random_erasing, probability=0.25, mean=..., std=...).
    """
    mirrored = rng.random() < flip
    if rand_augment is not None:
        operations = rand_augment.draw(rng)
    elif color_jitter is not None:
        operations = _draw_jitter(rng, color_jitter)
    else:
        operations = []
    if mirrored:
        operations = [_mirror, *operations]
    image = apply_operations(image, operations)
    return image if erasing is None else erasing(image, rng)


def _mirror(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _draw_jitter(rng: np.random.Generator, strengths: tuple[Real, Real, Real]) -> list[Operation]:
    """What `color_jitter` does, in the order in which it does it."""
    names = ("brightness", "contrast", "saturation")
    operations = []
    for name, strength in zip(names, strengths, strict=True):
        if strength < 0:
            raise ValueError(f"{name}={strength} must be 0 or more")
        if strength > 0:
            factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
            # Pillow's name of saturation.
            pillow = "Color" if name == "saturation" else name.capitalize()
            operations.append(Operation(pillow, factor))
    return [operations[index] for index in rng.permutation(len(operations))]


def _random_sides(
    pixels: int, rng: np.random.Generator, area: Range, low: Real, high: Real
) -> tuple[int, int]:
    """Height and width, rounded, of a rectangle of `pixels` times a uniform fraction; height by
    width is log-uniform from `low` to `high`."""
    pixels *= rng.uniform(*area)
    aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
    return round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))


def _random_place(down: int, right: int, rng: np.random.Generator) -> tuple[int, int]:
    """Uniform in [0, down] and [0, right], ends included."""
    return int(rng.integers(down + 1)), int(rng.integers(right + 1))


def _check_range(name: str, bounds: Range, most: Real = math.inf) -> None:
    low, high = bounds
    if not 0 < low <= high <= most:
        raise ValueError(
            f"{name}={bounds} must be two positive numbers, the smaller first"
            + (f", none above {most:g}" if most < math.inf else "")
        )

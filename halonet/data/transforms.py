"""Image transforms on the host: numpy and Pillow only, so that a notebook can use them too.

Every random transform is a pure function of the image and of a numpy Generator: the same image and
a Generator in the same state give the same pixels. None of them writes into its argument.
"""

import math

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

Real = float | int


def resize_shorter(
    image: UInt8[np.ndarray, "h w 3"],
    size: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Resizes (antialiased) until the shorter side has `size` pixels."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter == size:
        return image
    # The longer side rounds, and never below the shorter one.
    target = (round(width * size / shorter), round(height * size / shorter))
    return np.asarray(Image.fromarray(image).resize(target, resample))


def center_crop(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Cuts the square of `size` pixels out of the middle.

    Raises ValueError if a side of the image is shorter than `size`.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(
            f"size={size} is more than the image has ({height}x{width}); "
            f"the largest square in it has {min(height, width)} pixels"
        )
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def normalize(
    images: UInt8[np.ndarray, "*n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float32[np.ndarray, "*n h w c"]:
    """(images / 255 - mean) / std in float32, with one mean and deviation a channel, in units of
    the full range (0 to 1). Training does the same on the device."""
    scaled = images.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def affine(
    image: UInt8[np.ndarray, "h w 3"], *, angle: Real, factor: Real, shift: tuple[Real, Real]
) -> UInt8[np.ndarray, "h w 3"]:
    """Rotates and enlarges about the centre, then shifts; bilinear, zeros from outside.

    Args:
      image: pixels.
      angle: degrees, counter-clockwise as the image is seen (90 equals np.rot90 of a square).
      factor: above 1 enlarges what is seen.
      shift: pixels to the right and down.
    """
    height, width = image.shape[:2]
    # Pillow wants the inverse map, from a place in the output to one in the input.
    cos = math.cos(math.radians(angle)) / factor
    sin = math.sin(math.radians(angle)) / factor
    center_x, center_y = width / 2, height / 2
    from_x, from_y = center_x + shift[0], center_y + shift[1]
    matrix = (
        *(cos, -sin, center_x - cos * from_x + sin * from_y),
        *(sin, cos, center_y - sin * from_x - cos * from_y),
    )
    moved = Image.fromarray(image).transform(
        (width, height), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )
    return np.asarray(moved)


def random_affine(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    rotate: Real,
    scale: Real,
    translate: Real,
) -> UInt8[np.ndarray, "h w 3"]:
    """A random rotation, enlargement and shift, composed about the centre.

    Args:
      image: pixels.
      rng: gives four numbers; none if the three ranges are zero.
      rotate: degrees; the angle is uniform in [-rotate, rotate].
      scale: the factor is uniform in [1 - scale, 1 + scale].
      translate: fraction of the side; the shift along each axis is uniform in ± translate * side.

    Returns the image itself if the three ranges are zero. Raises ValueError if scale is not in
    [0, 1).
    """
    if rotate == scale == translate == 0:
        return image
    if not 0 <= scale < 1:
        raise ValueError(f"scale={scale} must be at least 0 and below 1, so that factors stay > 0")
    turn, zoom, right, down = (2 * rng.random(4) - 1).tolist()
    height, width = image.shape[:2]
    return affine(
        image,
        angle=turn * rotate,
        factor=1 + zoom * scale,
        shift=(right * translate * width, down * translate * height),
    )

"""What the model sees of an image: one square, random in training, from the middle in evaluation.

A source gives encoded bytes, or pixels where they are small; a view makes the square.
"""

import dataclasses
import math
import os

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from halonet.data import augment, decode, transforms
from halonet.data.errors import DamagedImageError, DataError
from halonet.data.randaugment import INTERPOLATIONS, RandAugment

Pixels = UInt8[np.ndarray, "h w 3"]
Square = UInt8[np.ndarray, "size size 3"]


def pixels(image: epath.PathLike | Image.Image | np.ndarray) -> Pixels:
    """The pixels of what a user has, be it a file, a Pillow image or an array.

    Args:
      image: the path of an image file (may be gs://), decoded as those of a data set are; a Pillow
        image; or a uint8 array (H, W, 3) or (H, W).

    Raises:
      DataError: for a file that cannot be read, and for one that is no image or a damaged one.
      ValueError: for other arrays.
    """
    if isinstance(image, str | os.PathLike):
        try:
            return decode.decode(epath.Path(image).expanduser().read_bytes())
        except decode.DecodeError as error:
            raise DamagedImageError(f"{image} is not a readable image: {error}") from error
        except OSError as error:
            raise DataError(f"{image} cannot be read: {error.strerror or error}") from error
    if isinstance(image, Image.Image):
        return decode.rgb(image)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"an image is {image.dtype} of shape {image.shape}; it must be uint8, "
            "(height, width, 3) or (height, width), or else a Pillow image or a path"
        )
    return np.repeat(image[..., None], 3, axis=-1) if image.ndim == 2 else image


@dataclasses.dataclass(frozen=True)
class CenterView:
    """The middle of an image: resized until the shorter side has floor(size / crop_pct) pixels.

    Attributes:
      size: side of the square, in pixels.
      crop_pct: share of the shorter side that is seen, above 0 and up to 1.
      interpolation: "bilinear" or "bicubic", antialiased.

    Raises DecodeError for bytes that are no image or a damaged one.
    """

    size: int
    crop_pct: float = 1.0
    interpolation: str = "bilinear"

    def __call__(self, image: bytes | Pixels) -> Square:
        pixels = decode.decode(image) if isinstance(image, bytes) else image
        shorter = math.floor(self.size / self.crop_pct)
        resample = INTERPOLATIONS[self.interpolation]
        resized = transforms.resize_shorter(pixels, shorter, resample)
        return transforms.center_crop(resized, self.size)


@dataclasses.dataclass(frozen=True)
class RandomView:
    """What training sees: another square each time, drawn from the generator that it is given.

    Attributes:
      center: what is seen where `min_area` is 0; also gives the size and the interpolation.
      min_area: least area of the random resized crop, as a share of the image's; 0: no such crop.
      rotate, scale, translate: see `transforms.random_affine`.
      flip, rand_augment, color_jitter, erasing: see `augment.augment`.

    Raises DecodeError for bytes that are no image or a damaged one.
    """

    center: CenterView
    min_area: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    translate: float = 0.0
    flip: float = 0.0
    rand_augment: RandAugment | None = None
    color_jitter: float = 0.0
    erasing: augment.Erasing | None = None

    def __call__(self, image: bytes | Pixels, rng: np.random.Generator) -> Square:
        square = self._random_crop(image, rng) if self.min_area else self.center(image)
        square = transforms.random_affine(
            square, rng, rotate=self.rotate, scale=self.scale, translate=self.translate
        )
        return augment.augment(
            square,
            rng,
            flip=self.flip,
            rand_augment=self.rand_augment,
            color_jitter=(self.color_jitter,) * 3 if self.color_jitter else None,
            erasing=self.erasing,
        )

    def _random_crop(self, image: bytes | Pixels, rng: np.random.Generator) -> Square:
        encoded = isinstance(image, bytes)
        height, width = decode.image_size(image) if encoded else image.shape[:2]
        box = augment.random_crop_box(height, width, rng, area=(self.min_area, 1.0))
        if not encoded:
            return augment.crop_and_resize(image, box, self.center.size, self.center.interpolation)
        # Only what is needed of a large photograph is decoded; its box may lie between pixels.
        pixels, (top, left, rows, cols) = decode.decode_crop(image, box, self.center.size)
        picture = Image.fromarray(pixels).resize(
            (self.center.size,) * 2,
            INTERPOLATIONS[self.center.interpolation],
            box=(left, top, left + cols, top + rows),
        )
        return np.asarray(picture)

"""RandAugment (Cubuk et al. 2019, https://arxiv.org/abs/1909.13719) in timm's terms.

The operations, their magnitudes and their signs are those of timm 1.0's auto_augment.py; what an
operation does to the pixels is defined by Pillow (ImageOps, ImageEnhance, Image.transform). One of
them, Sharpness, is here in a quicker form of the same result; tables made in numpy in the place of
ImageOps and blends in the place of ImageEnhance were measured and gained nothing worth their lines.

Operations work on Pillow pictures, so that a chain of them converts from and to numpy once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

Real = float | int
Step = Callable[[Image.Image], Image.Image]

# Of ImageNet, round(255 * mean): what timm puts where a moved picture leaves a hole.
MEAN_COLOR = (124, 116, 104)

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# In timm's order. The strength of those ending in "Increasing" grows with the magnitude; of their
# namesakes in OPERATIONS, the strength of Posterize and Solarize falls with it, and the enhancers
# go from a tenth over the picture itself, at 5, to nearly double.
INCREASING_OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
OPERATIONS = tuple(name.removesuffix("Increasing") for name in INCREASING_OPERATIONS)


class Operation(typing.NamedTuple):
    """One operation with all that was random about it drawn: picture -> picture.

    name: of OPERATIONS or INCREASING_OPERATIONS.
    argument: what `operation_argument` gives; None for an operation that takes none.
    resample: for those that move pixels, whose holes get MEAN_COLOR; the others ignore it.
    """

    name: str
    argument: Real | None = None
    resample: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, picture: Image.Image) -> Image.Image:
        name = self.name.removesuffix("Increasing")
        if name in _MOVES:
            return _MOVES[name](picture, self.argument, self.resample)
        return _RECOLORS[name](picture, self.argument)


def operation_argument(name: str, magnitude: Real, sign: int = 1) -> Real | None:
    """What an operation does at a magnitude, as timm has it.

    Args:
      name: of OPERATIONS or INCREASING_OPERATIONS.
      magnitude: 0 or more; 10 is the end of timm's usual range.
      sign: 1 or -1; heeded by the operations that go both ways.

    Returns degrees counter-clockwise (Rotate), pixels sideways a pixel down or the reverse
    (ShearX, ShearY), a fraction of the side to the left or up (TranslateXRel, TranslateYRel), bits
    to keep (Posterize), the value from which on pixels are inverted (Solarize), what is added to
    values under 128 (SolarizeAdd), the enhancement factor, in which 1 is the picture itself
    (Color, Contrast, Brightness, Sharpness), or None.

    Raises ValueError if the name is unknown.
    """
    if name not in OPERATIONS and name not in INCREASING_OPERATIONS:
        raise ValueError(
            f"operation {name!r} is unknown; known are "
            + ", ".join(dict.fromkeys(INCREASING_OPERATIONS + OPERATIONS))
        )
    if name not in _ARGUMENTS:
        return None
    return _ARGUMENTS[name](magnitude / 10, sign)


_ARGUMENTS: dict[str, Callable[[float, int], Real]] = {
    "Rotate": lambda level, sign: sign * (level * 30),
    "Posterize": lambda level, _: int(level * 4),
    "PosterizeIncreasing": lambda level, _: 4 - int(level * 4),
    "Solarize": lambda level, _: min(256, int(level * 256)),
    "SolarizeIncreasing": lambda level, _: 256 - min(256, int(level * 256)),
    "SolarizeAdd": lambda level, _: min(128, int(level * 110)),
    "ShearX": lambda level, sign: sign * (level * 0.3),
    "ShearY": lambda level, sign: sign * (level * 0.3),
    "TranslateXRel": lambda level, sign: sign * (level * 0.45),
    "TranslateYRel": lambda level, sign: sign * (level * 0.45),
}
for _name in ("Color", "Contrast", "Brightness", "Sharpness"):
    _ARGUMENTS[_name] = lambda level, _: level * 1.8 + 0.1
    _ARGUMENTS[_name + "Increasing"] = lambda level, sign: max(0.1, 1.0 + sign * (level * 0.9))


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Some operations, each drawn with replacement from fifteen: (image, rng) -> image.

    Each of the `num_ops` is applied with the given probability, at a magnitude of its own from
    N(magnitude, magnitude_std) clipped to [0, magnitude_max], with either sign equally often.
    A magnitude_std of infinity means uniform in [0, magnitude]. `interpolation` is of the
    operations that move pixels: "bilinear", "bicubic", or "random", which is either, drawn anew
    each time. timm's training defaults to "random"; both timm and MindCV use the interpolation of
    the crop where that is given.

    MindCV wrote RandAugment anew with MindSpore's operations: there is no SolarizeAdd, the
    magnitude's deviation is 0.5 whatever the string says, Posterize and Solarize are scaled a
    little differently. Here its strings mean what they mean in timm.
    """

    magnitude: int = 10
    num_ops: int = 2
    probability: float = 0.5
    magnitude_std: float = 0.0
    magnitude_max: int = 10
    increasing: bool = False
    interpolation: str = "random"

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability} must be from 0 to 1")
        if self.interpolation not in (*INTERPOLATIONS, "random"):
            raise ValueError(
                f"interpolation={self.interpolation!r} must be one of "
                + ", ".join(map(repr, (*INTERPOLATIONS, "random")))
            )

    @classmethod
    def parse(cls, text: str, *, interpolation: str = "random") -> RandAugment:
        """Reads timm's notation, such as "rand-m9-n2-mstd0.5-inc1".

        Args:
          text: "rand" or, as MindCV writes it, "randaug", and then in any order, each at most once
            and after a dash: m (magnitude, default 10), n (number of operations, 2), p (probability
            of each, 0.5), mstd (deviation of the magnitude, 0; above 100 uniform), mmax (upper
            bound of the magnitude, 10), inc (1: strength grows with the magnitude, default 0).
          interpolation: "bilinear", "bicubic" or "random".

        Raises ValueError, naming the part, if there is anything else in it.
        """
        prefix, *parts = text.split("-")
        if prefix not in ("rand", "randaug"):
            raise ValueError(
                f"RandAugment {text!r} starts with {prefix!r}; it must start with rand or randaug"
            )
        values = {}
        for part in parts:
            key, number = re.match(r"([^\d]*)(.*)", part).groups()
            name, kind, _ = _KEYS.get(key, (key, None, None))
            if kind is None or not re.fullmatch(_NUMBERS[kind], number):
                known = ", ".join(f"{key}{example}" for key, (_, _, example) in _KEYS.items())
                raise ValueError(
                    f"RandAugment {text!r} has the unknown part {part!r}; known are such as {known}"
                )
            if name in values:
                raise ValueError(f"RandAugment {text!r} gives {key!r} twice")
            values[name] = kind(float(number))
        if values.get("magnitude_std", 0) > 100:
            values["magnitude_std"] = math.inf
        return cls(**values, interpolation=interpolation)

    def draw(self, rng: np.random.Generator) -> list[Operation]:
        """All that is random: the operations to apply one after the other, often fewer than
        num_ops, since each is skipped with probability 1 - p."""
        names = INCREASING_OPERATIONS if self.increasing else OPERATIONS
        drawn = []
        for index in rng.integers(len(names), size=self.num_ops).tolist():
            if rng.random() >= self.probability:
                continue
            name, magnitude, resample = names[index], self.magnitude, Image.Resampling.BICUBIC
            if self.magnitude_std == math.inf:
                magnitude = rng.uniform(0, magnitude)
            elif self.magnitude_std > 0:
                magnitude = rng.normal(magnitude, self.magnitude_std)
            magnitude = max(0.0, min(magnitude, self.magnitude_max))
            sign = -1 if rng.random() < 0.5 else 1
            if name in _MOVES:
                interpolation = self.interpolation
                if interpolation == "random":
                    interpolation = "bilinear" if rng.random() < 0.5 else "bicubic"
                resample = INTERPOLATIONS[interpolation]
            argument = operation_argument(name, magnitude, sign)
            drawn.append(Operation(name, argument, resample))
        return drawn

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Draws and applies; the image itself if nothing was drawn."""
        return apply_operations(image, self.draw(rng))


_NUMBERS = {int: r"\d+", float: r"\d+(\.\d+)?", bool: "[01]"}
# key: (field, kind of number, an example)
_KEYS = {
    "m": ("magnitude", int, "9"),
    "n": ("num_ops", int, "2"),
    "p": ("probability", float, "0.5"),
    "mstd": ("magnitude_std", float, "0.5"),
    "mmax": ("magnitude_max", int, "10"),
    "inc": ("increasing", bool, "1"),
}


def apply_operations(
    image: UInt8[np.ndarray, "h w 3"], operations: Sequence[Step]
) -> UInt8[np.ndarray, "h w 3"]:
    """Applies operations, or other functions of a picture, one after the other, with one conversion
    to Pillow and back; the image itself if there are none."""
    if not operations:
        return image
    picture = Image.fromarray(image)
    for operation in operations:
        picture = operation(picture)
    return np.asarray(picture)


def _posterize(picture: Image.Image, bits: int) -> Image.Image:
    """ImageOps.posterize; none of the bits, or less, is black, which is what Pillow's definition
    gives and its check of the argument refuses (timm then fails)."""
    if bits <= 0:
        return Image.new("RGB", picture.size)
    return ImageOps.posterize(picture, min(bits, 8))


def _solarize_add(picture: Image.Image, added: int) -> Image.Image:
    table = [value if value >= 128 else min(255, value + added) for value in range(256)]
    return picture.point(table * 3)


def _sharpness(picture: Image.Image, factor: Real) -> Image.Image:
    """ImageEnhance.Sharpness, in a third of its time: Pillow smooths in floating point."""
    smooth = Image.fromarray(smoothed(np.asarray(picture)))
    return Image.blend(smooth, picture, factor)


def smoothed(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """ImageFilter.SMOOTH: the mean of 3x3 pixels in which the middle counts five times, rounded;
    pixels at the border stay as they are."""
    wide = image.astype(np.uint16)
    rows = wide[:-2] + wide[1:-1]
    rows += wide[2:]
    total = rows[:, :-2] + rows[:, 1:-1]
    total += rows[:, 2:]
    total += 4 * wide[1:-1, 1:-1]
    # Rounds total / 13, which is never halfway between two whole numbers.
    total += 6
    total //= 13
    made = image.copy()
    made[1:-1, 1:-1] = total
    return made


def _transform(
    picture: Image.Image, matrix: tuple[Real, ...], resample: Image.Resampling
) -> Image.Image:
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample, fillcolor=MEAN_COLOR
    )


def _rotate(picture, degrees, resample):
    return picture.rotate(degrees, resample, fillcolor=MEAN_COLOR)


def _shear_x(picture, factor, resample):
    return _transform(picture, (1, factor, 0, 0, 1, 0), resample)


def _shear_y(picture, factor, resample):
    return _transform(picture, (1, 0, 0, factor, 1, 0), resample)


def _translate_x(picture, fraction, resample):
    return _transform(picture, (1, 0, fraction * picture.width, 0, 1, 0), resample)


def _translate_y(picture, fraction, resample):
    return _transform(picture, (1, 0, 0, 0, 1, fraction * picture.height), resample)


_MOVES = {
    "Rotate": _rotate,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
_RECOLORS: dict[str, Callable[[Image.Image, Real | None], Image.Image]] = {
    "AutoContrast": lambda picture, _: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, _: ImageOps.equalize(picture),
    "Invert": lambda picture, _: ImageOps.invert(picture),
    "Posterize": _posterize,
    "Solarize": ImageOps.solarize,
    "SolarizeAdd": _solarize_add,
    "Color": lambda picture, factor: ImageEnhance.Color(picture).enhance(factor),
    "Contrast": lambda picture, factor: ImageEnhance.Contrast(picture).enhance(factor),
    "Brightness": lambda picture, factor: ImageEnhance.Brightness(picture).enhance(factor),
    "Sharpness": _sharpness,
}

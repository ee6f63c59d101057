"""From the bytes of an image file to RGB pixels: the same for training and for evaluation.

JPEGs go through simplejpeg (libjpeg-turbo; MIT, 1 MB, wheels for Linux and macOS), all else through
Pillow. simplejpeg was chosen because it can report damage within a JPEG, which Pillow cannot, and
gives the pixels of Pillow to the last bit; it also decodes 500x375 pixels 1.6 times as fast. On the
whole random resized crop that is only 1.1 times, since Pillow's resizing takes as long as the
decoding. OpenCV (150 MB) and imagecodecs (80 MB) are no faster, pyvips (LGPL) is slower:
docs/bench_decode.txt, by `python -m experiments.bench_decode`. None of them can decode a crop
alone; all but imagecodecs can reduce while decoding, and all let other threads run.

One treatment, whatever the file is called:

* the geometry is that of the stored pixels: an EXIF orientation is not applied, as ImageNet's own
  training pipelines do not apply it;
* grey and palette images become RGB; transparency is dropped, not blended (what hides under
  transparent pixels shows);
* of 16 bits a channel the high byte is kept: v // 256;
* CMYK becomes RGB without a colour profile: R = (255 - C) (255 - K) / 255. Inks are stored
  inverted in a file with Adobe's marker and as they are in one without, as TensorFlow has it;
* of an animation the first frame.

Damage raises DecodeError. Of a JPEG cut short Pillow raises, OpenCV returns None, and pyvips and
imagecodecs return it half grey. One with garbage in the middle comes out of all of them, and of
TensorFlow, scrambled or half grey without a word; here libjpeg's warnings are errors, but for two
that tell of an odd encoder. They notice every JPEG whose data end early, 96 in 100 with up to 300
bytes of noise, 3 in 4 with as many left out or zeroed, 1 in 4 with one bit flipped: Huffman codes
fall into step again, and carry no checksum. Nor does lossy WebP. A PNG has one, and it is checked.
"""

import contextlib
import io
import re
import typing

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "JPEG")
_SCALES = (8, 4, 2)  # 1 / scale are the reductions that libjpeg has fast code for
_BLOCK = 8  # pixels on a side of what libjpeg transforms at once
_MOST_PIXELS = 178_956_970  # Pillow's limit: a header of 30 bytes must not take all memory
_MOST_PADDING = 16  # bytes that cameras leave between the last pixels and the end

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""


class DecodeError(OSError):
    """The bytes are no image that can be read, or a damaged one; the message is one line."""


class Crop(typing.NamedTuple):
    """A part of an image, possibly reduced, that holds a box."""

    image: UInt8[np.ndarray, "h w 3"]
    box: tuple[float, float, float, float]
    """(top, left, height, width) of the box in pixels of `image`: whole numbers and all of it
    unless the image was reduced, and then up to a pixel inside it."""


def image_size(encoded: bytes) -> tuple[int, int]:
    """(height, width) in pixels, from the header alone.

    Raises DecodeError if there is no readable header.
    """
    if _is_jpeg(encoded):
        return _jpeg_header(encoded)[:2]
    with _pillow_image(encoded) as image:
        return image.height, image.width


def decode(encoded: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes JPEG, PNG, WebP, GIF or BMP to RGB, by its content; see the module for the rules.

    Raises DecodeError if the bytes are not all of an undamaged image.
    """
    return _decode_jpeg(encoded, 1) if _is_jpeg(encoded) else _decode_other(encoded)


def decode_crop(encoded: bytes, box: Box, size: int) -> Crop:
    """Decodes what lies in `box`, at a reduced scale if `size` pixels a side are left all the same.

    The reduction is libjpeg's, by 2, 4 or 8 in the frequency domain, and for JPEGs only: 2560x1920
    pixels reduced by 4 take 0.6 of the time of them all, and 1/16 of the memory.

    Args:
      encoded: an image file, as for `decode`.
      box: what is wanted, in the full image's pixels; must lie in the image.
      size: the least height and width in pixels that the reduced box may have. A box that is
        smaller is never enlarged.

    Returns the crop, to be resized by the caller from its own `box`. Unless it was reduced it is
    `decode(encoded)[top : top + height, left : left + width]`.

    Raises DecodeError as `decode` does, and ValueError if the box is empty or not in the image.
    """
    top, left, height, width = box
    full = image_size(encoded)
    if min(top, left) < 0 or min(height, width) < 1:
        raise ValueError(f"box={box} (top, left, height, width) must be at least (0, 0, 1, 1)")
    if top + height > full[0] or left + width > full[1]:
        raise ValueError(
            f"box={box} (top, left, height, width) reaches beyond the image of {full[0]}x{full[1]}"
        )
    scale = 1
    if _is_jpeg(encoded):
        # Below a block's size two reductions can have the same shape.
        least = max(size, _BLOCK)
        scale = next((s for s in _SCALES if min(height, width) // s >= least), 1)
    image = _decode_jpeg(encoded, scale) if _is_jpeg(encoded) else _decode_other(encoded)
    first_row, first_column = top // scale, left // scale
    end_row, end_column = -(-(top + height) // scale), -(-(left + width) // scale)
    inside = (top / scale - first_row, left / scale - first_column, height / scale, width / scale)
    return Crop(image[first_row:end_row, first_column:end_column], inside)


def _is_jpeg(encoded: bytes) -> bool:
    return encoded[:2] == b"\xff\xd8"


def _jpeg_header(encoded: bytes) -> tuple[int, int, str]:
    """Height, width and colour space: Gray, YCbCr, RGB, CMYK or YCCK."""
    try:
        # Not strict, since an odd version number is no reason to refuse; -1 is an unknown size.
        height, width, colors, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError) as error:  # KeyError is what it makes of no colour space at all
        raise DecodeError(
            f"JPEG of {len(encoded)} bytes with a damaged or incomplete header"
        ) from error
    _check_pixels(height, width)
    return height, width, colors


def _decode_jpeg(encoded: bytes, scale: int) -> UInt8[np.ndarray, "h w 3"]:
    """The image reduced by `scale`: to ceil(H / scale) x ceil(W / scale) pixels."""
    height, width, colors = _jpeg_header(encoded)
    inks = colors in ("CMYK", "YCCK")
    # It takes the least of its scales that gives this much.
    least = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
    try:
        image = simplejpeg.decode_jpeg(
            encoded, colorspace="CMYK" if inks else "RGB", **(least if scale > 1 else {})
        )
    except ValueError as error:
        if _harmless(str(error)):
            # The codec stops at the first complaint. Pillow passes over this one, and still sees
            # whether the file was cut short.
            return _decode_other(encoded, reduced=(width // scale, height // scale))
        raise DecodeError(f"damaged or incomplete JPEG of {len(encoded)} bytes: {error}") from error
    return _from_inks(image, inverted=_has_adobe_marker(encoded)) if inks else image


def _harmless(complaint: str) -> bool:
    """Whether libjpeg's warning tells of an odd encoder and not of damaged pixels."""
    padding = re.search(r"(\d+) extraneous bytes before marker", complaint)
    return "JFIF revision" in complaint or bool(padding and int(padding[1]) <= _MOST_PADDING)


def _from_inks(inks: UInt8[np.ndarray, "h w 4"], *, inverted: bool) -> UInt8[np.ndarray, "h w 3"]:
    """CMYK to RGB; `inverted` if 255 means no ink."""
    light = (inks if inverted else 255 - inks).astype(np.uint16)
    return ((light[..., :3] * light[..., 3:] + 127) // 255).astype(np.uint8)


def _has_adobe_marker(encoded: bytes) -> bool:
    """Whether a segment APP14 "Adobe" stands before the first scan."""
    at = 2
    while encoded[at : at + 1] == b"\xff" and encoded[at + 1 : at + 2] != b"\xda":
        if encoded[at + 1] == 0xFF:  # filling
            at += 1
            continue
        if encoded[at + 1] == 0xEE and encoded[at + 4 : at + 9] == b"Adobe":
            return True
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return False


def _decode_other(
    encoded: bytes, *, reduced: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    with _pillow_image(encoded) as image:
        if reduced:  # Pillow's scale is the largest that leaves this (width, height)
            image.draft(None, reduced)
        image.load()
        if image.mode == "CMYK":  # of a JPEG, which Pillow has inverted whatever the marker
            return _from_inks(255 - np.asarray(image), inverted=_has_adobe_marker(encoded))
        return rgb(image)


def rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a Pillow image as RGB; see the module for the rules."""
    if image.mode == "CMYK":  # Pillow's 255 is full ink
        return _from_inks(np.asarray(image), inverted=False)
    if image.mode.startswith("I"):  # 16 bits of grey, at which convert would clip
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if "transparency" in image.info:  # convert warns of it, to no use
        image = image.copy()
        del image.info["transparency"]
    return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _pillow_image(encoded: bytes):
    """The opened image; what Pillow raises of it, then or later, is a DecodeError."""
    if not encoded:
        raise DecodeError("no image: 0 bytes")
    try:
        # Only what is known to be wanted: Pillow would run Ghostscript on PostScript.
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            _check_pixels(image.height, image.width)
            yield image
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DecodeError(
            f"{len(encoded)} bytes are no JPEG, PNG, WebP, GIF or BMP: they begin {encoded[:8]!r}"
        ) from error
    except Exception as error:  # of damaged bytes Pillow raises a dozen kinds
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise DecodeError(f"damaged image of {len(encoded)} bytes: {what}") from error


def _check_pixels(height: int, width: int) -> None:
    if height * width > _MOST_PIXELS:
        raise DecodeError(
            f"an image of {height}x{width} pixels by its header; at most {_MOST_PIXELS:,} are read"
        )

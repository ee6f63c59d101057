"""Decoding: one geometry and one colour treatment for every kind of file, and no silent damage."""

import concurrent.futures
import io
import itertools
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_image

from halonet.data import decode
from halonet.data.decode import DecodeError

HEIGHT, WIDTH = 96, 128


def picture(height=HEIGHT, width=WIDTH, seed=0):
    """Slopes with some noise: enough structure to see a shift, enough detail to damage."""
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([x * 255 / width, y * 255 / height, 128 + 60 * np.sin((x + 2 * y) / 9)], -1)
    noise = np.random.default_rng(seed).normal(0, 10, (height, width, 1))
    return np.clip(slopes + noise, 0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def jpeg(image=None, **options):
    return encoded(picture() if image is None else image, "JPEG", **{"quality": 92, **options})


def refuses(data, match):
    """Decoding in any way raises one line that matches."""
    with pytest.raises(DecodeError, match=match) as caught:
        decode.decode(data)
    assert "\n" not in str(caught.value)
    with pytest.raises(DecodeError, match=match):
        decode.decode_crop(data, (0, 0, 1, 1), 1)


def without_adobe_marker(data):
    at = data.index(b"\xff\xee")
    (length,) = struct.unpack(">H", data[at + 2 : at + 4])
    return data[:at] + data[at + 2 + length :]


EXIF = Image.Exif()
EXIF[0x0112] = 6  # Orientation: to be shown turned by 90 degrees

# What each file must come out as, and how far off it may be on average: JPEG and WebP lose some of
# the noise.
GRAY = np.asarray(Image.fromarray(picture()).convert("L"))
KINDS = {
    "jpeg": (jpeg(), picture(), 3),
    "jpeg 4:4:4": (jpeg(subsampling=0), picture(), 3),
    "jpeg stored as RGB": (jpeg(keep_rgb=True), picture(), 3),
    "jpeg progressive": (jpeg(progressive=True), picture(), 3),
    "jpeg with restarts": (jpeg(restart_marker_blocks=4), picture(), 3),
    "jpeg gray": (jpeg(GRAY), np.dstack([GRAY] * 3), 3),
    "jpeg turned by EXIF": (jpeg(exif=EXIF), picture(), 3),
    "jpeg with bytes after its end": (jpeg() + b"more" * 999, picture(), 3),
    "png": (encoded(picture(), "PNG"), picture(), 0),
    "png turned by EXIF": (encoded(picture(), "PNG", exif=EXIF), picture(), 0),
    "png gray": (encoded(GRAY, "PNG"), np.dstack([GRAY] * 3), 0),
    "png with bytes after its end": (encoded(picture(), "PNG") + b"more", picture(), 0),
    "webp": (encoded(picture(), "WEBP", quality=95), picture(), 3),
    "webp lossless": (encoded(picture(), "WEBP", lossless=True), picture(), 0),
    "bmp": (encoded(picture(), "BMP"), picture(), 0),
    "gif": (encoded(GRAY, "GIF"), np.dstack([GRAY] * 3), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_rgb_of_the_stored_geometry(kind):
    data, expected, loss = KINDS[kind]
    image = decode.decode(data)
    assert image.dtype == np.uint8
    assert image.shape == expected.shape == (*decode.image_size(data), 3)
    assert np.abs(image.astype(int) - expected).mean() <= loss
    # A transposed or mirrored picture would be off by some 60 on average.
    assert np.abs(image.astype(int).mean((0, 1)) - expected.mean((0, 1))).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_is_the_same_pixels_as_the_full_image(kind):
    data, _, _ = KINDS[kind]
    image = decode.decode(data)
    for top, left, height, width in [(0, 0, 96, 128), (5, 11, 40, 70), (95, 127, 1, 1)]:
        crop = decode.decode_crop(data, (top, left, height, width), 96)
        np.testing.assert_array_equal(crop.image, image[top : top + height, left : left + width])
        assert crop.box == (0, 0, height, width)


def test_jpeg_pixels_are_those_of_pillow():
    """Both are libjpeg-turbo with the accurate transform; ImageNet accuracies rest on that."""
    for options in ({}, {"subsampling": 0}, {"progressive": True}):
        data = jpeg(**options)
        np.testing.assert_array_equal(decode.decode(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("side", [1, 2, 7, 8, 9, 17])
def test_small_and_odd_sides(side):
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(side, 1), kind)
        assert decode.image_size(data) == (side, 1)
        assert decode.decode(data).shape == (side, 1, 3)


def test_transparency_is_dropped_and_not_blended():
    clear = np.dstack([picture(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    np.testing.assert_array_equal(decode.decode(encoded(clear, "PNG")), picture())
    pale = Image.fromarray(np.dstack([GRAY, GRAY]), "LA")
    np.testing.assert_array_equal(decode.decode(encoded(pale, "PNG"))[..., 1], GRAY)


def test_palettes_become_colours_even_with_transparency():
    palette = Image.fromarray(picture()).quantize(64)
    expected = np.asarray(palette.convert("RGB"))
    for options in ({}, {"transparency": 3}, {"transparency": bytes(range(64))}):
        image = decode.decode(encoded(palette, "PNG", **options))
        np.testing.assert_array_equal(image, expected)
    two = decode.decode(encoded(Image.fromarray(GRAY > 99), "PNG"))
    np.testing.assert_array_equal(two[..., 2], np.where(GRAY > 99, 255, 0))


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = decode.decode(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(image, np.repeat((values >> 8)[..., None], 3, axis=2))
    # Pillow cannot write 16 bits of colour; one pixel by hand must follow the same rule.
    data = png_by_hand(2, 16, struct.pack(">HHH", 0x12FF, 0x8000, 0xFF00))
    assert decode.decode(data).tolist() == [[[0x12, 0x80, 0xFF]]]


def png_by_hand(color_type, bits, pixel):
    """A PNG of one pixel."""

    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 1, 1, bits, color_type, 0, 0, 0)
    rows = zlib.compress(b"\0" + pixel)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_cmyk_with_and_without_inversion():
    inks = Image.fromarray(picture()).convert("CMYK")
    adobe = jpeg(inks, subsampling=0)  # Pillow inverts, and libjpeg writes Adobe's marker
    assert np.abs(decode.decode(adobe).astype(int) - picture()).mean() < 3
    plain = without_adobe_marker(jpeg(Image.fromarray(255 - np.asarray(inks), "CMYK")))
    assert np.abs(decode.decode(plain).astype(int) - picture()).mean() < 3
    theirs = np.asarray(Image.open(io.BytesIO(adobe)).convert("RGB"))
    assert np.abs(decode.decode(adobe).astype(int) - theirs).max() <= 1  # it rounds down
    assert decode.decode_crop(adobe, (8, 8, 64, 64), 32).image.shape == (32, 32, 3)


def test_the_marker_is_found_behind_other_segments():
    inks = Image.fromarray(picture()).convert("CMYK")
    data = jpeg(inks, exif=EXIF, comment=b"\xff\xee\x00\x10Adobe is a name")
    plain = without_adobe_marker(data.replace(b"\x00\x10Adobe is a name", b""))
    assert np.abs(decode.decode(data).astype(int) - picture()).mean() < 3
    assert b"Adobe" not in plain


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_reduced_crop_is_close_to_the_full_one(scale, subsampling):
    """Resized to the least size, at most 4.5 of 255 apart on average on a real photograph.

    The two antialias differently: one leaves out the high frequencies of each block, the other
    weighs twice as wide a neighbourhood. Half a reduced pixel to the right is further off.
    """
    data = jpeg(load_sample_image("china.jpg"), subsampling=subsampling, quality=95)
    full = decode.decode(data)
    rng = np.random.default_rng(scale)
    for _ in range(5):
        height, width = (int(side) for side in rng.integers(200, (420, 630)))
        top, left = int(rng.integers(0, 420 - height)), int(rng.integers(0, 630 - width))
        size = min(height, width) // scale
        crop = decode.decode_crop(data, (top, left, height, width), size)
        assert 0 <= crop.image.shape[0] - height / scale < 2
        assert 0 <= crop.image.shape[1] - width / scale < 2
        reduced = resized(crop.image, crop.box, size)
        right = (top, left + scale // 2, height, width)
        error, shifted = (
            np.abs(reduced - resized(full, box, size)).mean()
            for box in ((top, left, height, width), right)
        )
        assert error < 4.5
        assert shifted > 1.3 * error


def resized(image, box, size):
    top, left, height, width = (float(side) for side in box)
    sides = (left, top, left + width, top + height)
    picture = Image.fromarray(np.ascontiguousarray(image))
    small = picture.resize((int(size), int(size)), Image.Resampling.BILINEAR, box=sides)
    return np.asarray(small).astype(int)


def test_a_reduced_box_lies_where_the_full_one_does():
    """Exactly: in a picture of slopes the mean of any box tells its middle."""
    y, x = np.mgrid[:400, :600]
    slopes = np.stack([x / 600 * 255, y / 400 * 255, 0 * x], -1).astype(np.uint8)
    data = jpeg(slopes, subsampling=0, quality=98)
    for top, left in itertools.product((0, 3, 21), (0, 1, 50)):
        crop = decode.decode_crop(data, (top, left, 333, 511), 64)
        assert max(crop.image.shape) < 511 / 4 + 2
        small = resized(crop.image, crop.box, 64)
        full = resized(slopes, (top, left, 333, 511), 64)
        assert np.abs(small - full)[2:-2, 2:-2].mean() < 0.6


def test_the_reduction_leaves_the_size_asked_for():
    data = jpeg(picture(400, 600))
    for size, scale in [(400, 1), (201, 1), (200, 2), (101, 2), (100, 4), (50, 8), (9, 8), (1, 8)]:
        shape = decode.decode_crop(data, (0, 0, 400, 600), size).image.shape
        assert shape == (400 // scale, 600 // scale, 3)
    assert decode.decode_crop(data, (0, 0, 90, 600), 50).image.shape == (90, 600, 3)
    assert decode.decode_crop(data, (9, 9, 10, 10), 1).image.shape == (10, 10, 3)


@pytest.mark.parametrize(
    ("box", "match"),
    [
        ((0, 0, 97, 128), "beyond the image of 96x128"),
        ((0, 1, 96, 128), "beyond the image of 96x128"),
        ((-1, 0, 5, 5), "at least"),
        ((0, 0, 0, 5), "at least"),
    ],
)
def test_boxes_outside_the_image(box, match):
    for kind in ("jpeg", "png"):
        with pytest.raises(ValueError, match=match):
            decode.decode_crop(KINDS[kind][0], box, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
def test_cut_short(kind, part):
    if "after its end" not in kind:
        data = KINDS[kind][0]
        refuses(data[: int(len(data) * part)], "bytes")


def test_not_an_image():
    refuses(b"", "no image: 0 bytes")
    refuses(b"<html>404</html>", "16 bytes are no JPEG, PNG, WebP, GIF or BMP: .*<html>")
    refuses(b"\xff\xd8\xff", "JPEG of 3 bytes with a damaged or incomplete header")
    refuses(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no JPEG")
    refuses(np.random.default_rng(0).bytes(5000), "no JPEG")
    with pytest.raises(DecodeError, match="0 bytes"):
        decode.image_size(b"")
    with pytest.raises(DecodeError, match="no JPEG"):
        decode.image_size(b"text")


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_in_the_middle_of_a_jpeg(progressive):
    """What Pillow gives back half grey or scrambled, without a word."""
    data = jpeg(picture(), progressive=progressive)
    middle = len(data) // 2
    refuses(data[:middle] + b"\xff\xd9", "damaged or incomplete JPEG")
    refuses(data[:middle] + bytes(400) + data[middle + 400 :], "damaged or incomplete JPEG")
    noise = np.random.default_rng(0).bytes(200)
    refuses(data[:middle] + noise + data[middle + 200 :], "damaged or incomplete JPEG")
    assert np.asarray(Image.open(io.BytesIO(data[:middle] + b"\xff\xd9"))).shape == (96, 128, 3)


def test_flipped_bits_in_a_png():
    data = KINDS["png"][0]
    for at in (len(data) // 2, len(data) - 20):
        refuses(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :], "damaged image")


def odd(data, oddity):
    """A good JPEG with something in it of which libjpeg warns."""
    if oddity == "padding":
        return data[:-2] + bytes(15) + data[-2:]
    version = data.index(b"JFIF\0") + 5
    return data[:version] + b"\0" + data[version + 1 :]


@pytest.mark.parametrize("oddity", ["padding", "version"])
def test_oddities_that_are_no_damage(oddity):
    good = jpeg(picture(333, 517))
    data = odd(good, oddity)
    with pytest.raises(ValueError, match="extraneous|JFIF revision"):
        simplejpeg.decode_jpeg(data)
    np.testing.assert_array_equal(decode.decode(data), decode.decode(good))
    for size in (300, 100, 50, 20):
        crop, expected = (decode.decode_crop(it, (3, 5, 320, 500), size) for it in (data, good))
        np.testing.assert_array_equal(crop.image, expected.image)
        assert crop.box == expected.box
    # An oddity does not hide that the file is cut short.
    refuses(odd(good, "version")[: len(good) // 2], "truncated")


@pytest.mark.parametrize("marker", [True, False])
def test_odd_cmyk_keeps_its_colours(marker):
    good = jpeg(Image.fromarray(picture()).convert("CMYK"))
    good = good if marker else without_adobe_marker(good)
    data = odd(good, "padding")
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(data)
    np.testing.assert_array_equal(decode.decode(data), decode.decode(good))


def test_much_padding_is_damage():
    data = jpeg()
    refuses(data[:-2] + bytes(99) + data[-2:], "extraneous bytes")


def test_a_small_file_cannot_ask_for_all_memory():
    data = jpeg()
    size = data.index(b"\xff\xc0") + 5
    refuses(data[:size] + struct.pack(">HH", 65000, 65000) + data[size + 4 :], "65000x65000 pixels")
    png = bytearray(encoded(picture(), "PNG"))
    png[16:24] = struct.pack(">II", 65000, 65000)
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    refuses(bytes(png), "pixels")


def test_threads_decode_alike():
    data = [jpeg(picture(seed=seed)) for seed in range(8)] * 4
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        images = list(pool.map(decode.decode, data))
    for one, image in zip(data, images, strict=True):
        np.testing.assert_array_equal(image, decode.decode(one))

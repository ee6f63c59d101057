"""The host's transforms against definitions written in numpy."""

import numpy as np
import pytest

from halonet.data import transforms


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (32, 24, 3)).astype(np.uint8)


@pytest.fixture
def square():
    return np.random.default_rng(1).integers(0, 256, (33, 33, 3)).astype(np.uint8)


def shifted(image, right, down):
    """The image moved by whole pixels, zeros coming in."""
    moved = np.zeros_like(image)
    height, width = image.shape[:2]
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return moved


def test_affine_identity_is_exact(image):
    np.testing.assert_array_equal(
        transforms.affine(image, angle=0.0, factor=1.0, shift=(0.0, 0.0)), image
    )


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, 5), (-4, 2), (7, -6), (-1, -1)])
def test_affine_shifts_by_whole_pixels_and_fills_with_zeros(image, right, down):
    moved = transforms.affine(image, angle=0.0, factor=1.0, shift=(right, down))
    np.testing.assert_array_equal(moved, shifted(image, right, down))


@pytest.mark.parametrize("side", [32, 33])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_affine_quarter_turns_equal_rot90(square, side, turns):
    square = square[:side, :side]
    turned = transforms.affine(square, angle=90.0 * turns, factor=1.0, shift=(0.0, 0.0))
    # cos(90 degrees) is not exactly 0 in floating point, and Pillow truncates.
    np.testing.assert_allclose(turned.astype(int), np.rot90(square, turns).astype(int), atol=1)


def test_affine_turns_before_it_shifts(square):
    turned = transforms.affine(square, angle=90.0, factor=1.0, shift=(4.0, -2.0))
    expected = shifted(np.ascontiguousarray(np.rot90(square)), 4, -2)
    np.testing.assert_allclose(turned.astype(int), expected.astype(int), atol=1)


def test_affine_enlarges_about_the_centre():
    image = np.zeros((32, 32, 3), np.uint8)
    image[12:20, 10:22] = 200
    area = (image[..., 0] / 200).sum()
    for factor in (0.5, 1.25, 1.5):
        out = transforms.affine(image, angle=0.0, factor=factor, shift=(0.0, 0.0))[..., 0] / 200
        assert out.sum() == pytest.approx(area * factor**2, rel=0.06)
        rows, columns = np.nonzero(out > 0.5)
        assert rows.mean() == pytest.approx(15.5)
        assert columns.mean() == pytest.approx(15.5)


def test_random_affine_is_its_arguments_image_when_all_ranges_are_zero(image):
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert transforms.random_affine(image, rng, rotate=0, scale=0, translate=0) is image
    assert rng.bit_generator.state == before


def test_random_affine_is_a_function_of_image_and_bits(image):
    def draw(seed, **ranges):
        return transforms.random_affine(image, np.random.default_rng(seed), **ranges)

    ranges = {"rotate": 20, "scale": 0.2, "translate": 0.2}
    untouched = image.copy()
    np.testing.assert_array_equal(draw(3, **ranges), draw(3, **ranges))
    assert (draw(3, **ranges) != draw(4, **ranges)).any()
    np.testing.assert_array_equal(image, untouched)
    assert draw(3, **ranges).shape == image.shape
    assert draw(3, **ranges).dtype == np.uint8


def test_random_affine_draws_uniformly_from_its_ranges(monkeypatch, image):
    drawn = []
    monkeypatch.setattr(
        transforms,
        "affine",
        lambda image, *, angle, factor, shift: drawn.append((angle, factor, *shift)) or image,
    )
    rng = np.random.default_rng(0)
    for _ in range(2000):
        transforms.random_affine(image, rng, rotate=15, scale=0.25, translate=0.125)
    drawn = np.array(drawn)
    # The image is 32 high and 24 wide, so an eighth is 4 down and 3 to the right.
    low, high = np.array([-15, 0.75, -3, -4]), np.array([15, 1.25, 3, 4])
    assert (drawn >= low).all()
    assert (drawn <= high).all()
    unit = (drawn - low) / (high - low)
    np.testing.assert_allclose(np.quantile(unit, [0.25, 0.5, 0.75], axis=0)[1], 0.5, atol=0.04)
    np.testing.assert_allclose(unit.min(axis=0), 0, atol=0.01)
    np.testing.assert_allclose(unit.max(axis=0), 1, atol=0.01)
    correlation = np.corrcoef(unit.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.1  # each range has a draw of its own


def test_random_affine_rejects_a_scale_that_could_reach_zero(image):
    with pytest.raises(ValueError, match=r"scale=1\.0 must be at least 0 and below 1"):
        transforms.random_affine(image, np.random.default_rng(0), rotate=0, scale=1.0, translate=0)


def test_normalize_matches_its_definition(image):
    images = np.stack([image, image[::-1]])
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    out = transforms.normalize(images, mean, std)
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_center_crop_takes_the_middle(image):
    np.testing.assert_array_equal(transforms.center_crop(image, 20), image[6:26, 2:22])
    np.testing.assert_array_equal(transforms.center_crop(image, 21), image[5:26, 1:22])
    with pytest.raises(ValueError, match=r"size=25 .*32x24.*has 24 pixels"):
        transforms.center_crop(image, 25)


@pytest.mark.parametrize(("height", "width"), [(40, 20), (20, 40), (20, 20), (61, 40), (10, 11)])
def test_resize_shorter_keeps_the_shape_of_the_picture(height, width):
    rows = np.broadcast_to(np.linspace(0, 255, height)[:, None, None], (height, width, 3))
    out = transforms.resize_shorter(rows.astype(np.uint8), 20)
    assert min(out.shape[:2]) == 20
    assert out.shape[0] / out.shape[1] == pytest.approx(height / width, rel=0.03)
    # A ramp stays a ramp: nothing is flipped, transposed or cut off.
    assert (np.diff(out[:, 0, 0].astype(int)) >= 0).all()
    assert (out[:, :1] == out).all()
    if min(height, width) == 20:
        assert out.shape == rows.shape

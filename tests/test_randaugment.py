"""RandAugment: each operation against Pillow called plainly, the draws against their statement."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from halonet.data import randaugment
from halonet.data.randaugment import Operation, RandAugment, operation_argument
from halonet.plots import photograph

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
AFFINE = Image.Transform.AFFINE
MEAN = (124, 116, 104)  # of ImageNet
MAGNITUDES = (2, 5.5, 9)
TAKES_A_SIGN = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"} | {
    f"{name}Increasing" for name in ("Color", "Contrast", "Brightness", "Sharpness")
}


def solarize_add(picture, added):
    return Image.eval(picture, lambda value: value if value >= 128 else min(255, value + added))


def affine(*matrix):
    """With the width and the height of a picture in `matrix` as functions of it."""
    return lambda picture, resample: picture.transform(
        picture.size,
        AFFINE,
        [entry(picture) if callable(entry) else entry for entry in matrix],
        resample,
        fillcolor=MEAN,
    )


def posterize(picture, bits):
    """Pillow's definition of 0 bits; its function takes no 0."""
    return ImageOps.posterize(picture, bits) if bits else Image.new("RGB", picture.size)


# (name, magnitude, sign) -> what Pillow is asked for, with every number worked out by hand.
RECOLORS = {
    ("AutoContrast", 5.5, 1): ImageOps.autocontrast,
    ("Equalize", 5.5, 1): ImageOps.equalize,
    ("Invert", 5.5, 1): ImageOps.invert,
    ("Posterize", 2, 1): lambda it: posterize(it, 0),
    ("Posterize", 5.5, 1): lambda it: posterize(it, 2),
    ("Posterize", 9, 1): lambda it: posterize(it, 3),
    ("PosterizeIncreasing", 2, 1): lambda it: posterize(it, 4),
    ("PosterizeIncreasing", 5.5, 1): lambda it: posterize(it, 2),
    ("PosterizeIncreasing", 9, 1): lambda it: posterize(it, 1),
    ("PosterizeIncreasing", 10, 1): lambda it: posterize(it, 0),
    ("Solarize", 2, 1): lambda it: ImageOps.solarize(it, 51),
    ("Solarize", 5.5, 1): lambda it: ImageOps.solarize(it, 140),
    ("Solarize", 9, 1): lambda it: ImageOps.solarize(it, 230),
    ("Solarize", 10, 1): lambda it: it,
    ("SolarizeIncreasing", 2, 1): lambda it: ImageOps.solarize(it, 205),
    ("SolarizeIncreasing", 5.5, 1): lambda it: ImageOps.solarize(it, 116),
    ("SolarizeIncreasing", 9, 1): lambda it: ImageOps.solarize(it, 26),
    ("SolarizeAdd", 2, 1): lambda it: solarize_add(it, 22),
    ("SolarizeAdd", 5.5, 1): lambda it: solarize_add(it, 60),
    ("SolarizeAdd", 9, 1): lambda it: solarize_add(it, 99),
    ("ColorIncreasing", 20, -1): lambda it: ImageEnhance.Color(it).enhance(0.1),
}
for _name in ("Color", "Contrast", "Brightness", "Sharpness"):
    for _magnitude, _factor, _more, _less in (
        (2, 0.46, 1.18, 0.82),
        (5.5, 1.09, 1.495, 0.505),
        (9, 1.72, 1.81, 0.19),
    ):
        for _key, _value in (
            ((_name, _magnitude, 1), _factor),
            ((_name + "Increasing", _magnitude, 1), _more),
            ((_name + "Increasing", _magnitude, -1), _less),
        ):
            RECOLORS[_key] = lambda it, name=_name, factor=_value: (
                getattr(ImageEnhance, name)(it).enhance(factor)
            )
# In the same order of operations as timm's: a matrix that differs in its last bit rounds some
# pixels the other way.
MOVES = {}
for _magnitude in MAGNITUDES:
    for _sign in (1, -1):
        _degrees, _shear, _part = (_sign * (_magnitude / 10 * most) for most in (30, 0.3, 0.45))
        MOVES |= {
            ("Rotate", _magnitude, _sign): lambda it, resample, degrees=_degrees: it.rotate(
                degrees, resample, fillcolor=MEAN
            ),
            ("ShearX", _magnitude, _sign): affine(1, _shear, 0, 0, 1, 0),
            ("ShearY", _magnitude, _sign): affine(1, 0, 0, _shear, 1, 0),
            ("TranslateXRel", _magnitude, _sign): affine(
                1, 0, lambda it, part=_part: part * it.width, 0, 1, 0
            ),
            ("TranslateYRel", _magnitude, _sign): affine(
                1, 0, 0, 0, 1, lambda it, part=_part: part * it.height
            ),
        }


@pytest.fixture(scope="module")
def picture():
    """Wider than high, so that the sides cannot be mixed up, and not of the full range."""
    return Image.fromarray((photograph(90, 120) // 2 + 40).astype(np.uint8))


def assert_equal(made, expected):
    assert made.size == expected.size
    assert made.mode == expected.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))


@pytest.mark.parametrize("case", RECOLORS, ids=lambda case: "{}-{}-{:+d}".format(*case))
def test_recoloring_is_pillows(picture, case):
    name, magnitude, sign = case
    before = picture.tobytes()
    made = Operation(name, operation_argument(name, magnitude, sign))(picture)
    assert_equal(made, RECOLORS[case](picture))
    assert picture.tobytes() == before


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("case", MOVES, ids=lambda case: "{}-{}-{:+d}".format(*case))
def test_moving_is_pillows(picture, case, resample):
    name, magnitude, sign = case
    made = Operation(name, operation_argument(name, magnitude, sign), resample)(picture)
    assert_equal(made, MOVES[case](picture, resample))
    assert (np.asarray(made) == MEAN).all(axis=2).any()


def test_every_operation_is_tested_at_three_magnitudes_and_both_signs():
    tested = set(RECOLORS) | set(MOVES)
    for name in randaugment.OPERATIONS + randaugment.INCREASING_OPERATIONS:
        if name in ("AutoContrast", "Equalize", "Invert"):
            assert operation_argument(name, 3) is None
            assert (name, 5.5, 1) in tested
            continue
        signs = (1, -1) if name in TAKES_A_SIGN else (1,)
        assert tested >= {(name, magnitude, sign) for magnitude in MAGNITUDES for sign in signs}
        plus, minus = (operation_argument(name, 4, sign) for sign in (1, -1))
        assert (plus != minus) == (name in TAKES_A_SIGN)


def test_moves_go_where_the_docstring_says():
    """A white dot right of and above the middle, at (row 5, column 24) of 21x41 pixels."""
    dot = np.zeros((21, 41, 3), np.uint8)
    dot[5, 24] = 255

    def after(name, argument):
        made = Operation(name, argument, BILINEAR)(Image.fromarray(dot))
        row, column = np.argwhere(np.asarray(made).min(axis=2) > 200)[0].tolist()
        return row, column

    assert after("Rotate", 90) == (6, 15)  # to the left of the middle: counter-clockwise
    assert after("TranslateXRel", 10 / 41) == (5, 14)
    assert after("TranslateYRel", 3 / 21) == (2, 24)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.3333, 0.5, 0.999, 1.0, 1.0001, 1.37, 1.9, 2.5])
def test_sharpening_is_pillows_at_any_factor(picture, factor):
    expected = ImageEnhance.Sharpness(picture).enhance(factor)
    assert_equal(Operation("Sharpness", factor)(picture), expected)


DEGENERATE = {
    "one pixel": np.full((1, 1, 3), 77),
    "one row": np.arange(27).reshape(1, 9, 3) * 9,
    "two columns": np.arange(54).reshape(9, 2, 3) * 4,
    "3x3": np.arange(27).reshape(3, 3, 3) * 9,
    "black and white": np.arange(72).reshape(8, 9, 1).repeat(3, axis=2) % 2 * 255,
}


@pytest.mark.parametrize("what", DEGENERATE)
def test_sharpening_odd_pictures(what):
    picture = Image.fromarray(DEGENERATE[what].astype(np.uint8))
    assert_equal(Operation("Sharpness", 1.7)(picture), ImageEnhance.Sharpness(picture).enhance(1.7))


def test_smoothing_is_pillows():
    """Noise of three strengths about every level, so that the sums take all sorts of remainders."""
    rng = np.random.default_rng(0)
    for most in (3, 16, 255):
        low = rng.integers(0, 256 - most, (60, 60, 1, 1, 1))
        tiles = (low + rng.integers(0, most + 1, (60, 60, 5, 5, 3))).astype(np.uint8)
        noise = tiles.transpose(0, 2, 1, 3, 4).reshape(300, 300, 3)
        expected = Image.fromarray(noise).filter(ImageFilter.SMOOTH)
        np.testing.assert_array_equal(randaugment.smoothed(noise), np.asarray(expected))


@pytest.mark.parametrize(("bits", "expected"), [(-1, 0), (0, 0), (1, 128), (8, 201), (9, 201)])
def test_posterize_takes_any_number_of_bits(bits, expected):
    made = Operation("Posterize", bits)(Image.new("RGB", (3, 2), (201, 201, 201)))
    assert np.unique(made).tolist() == [expected]


def test_unknown_operation():
    with pytest.raises(ValueError, match=r"'Cutout' is unknown; known are AutoContrast, .*ShearX"):
        operation_argument("Cutout", 3)


def drawn(rand_augment, images, seed=0):
    rng = np.random.default_rng(seed)
    return [rand_augment.draw(rng) for _ in range(images)]


def test_draws_are_uniform_over_operations_and_independent():
    lists = drawn(RandAugment.parse("rand-m9-n3-p0.4-inc1"), 5000)
    # Of three operations each is applied with probability 0.4, whatever became of the others.
    sizes = np.bincount([len(operations) for operations in lists], minlength=4)
    assert stats.chisquare(sizes, stats.binom(3, 0.4).pmf(range(4)) * 5000).pvalue > 0.001
    names = [operation.name for operations in lists for operation in operations]
    counts = [names.count(name) for name in randaugment.INCREASING_OPERATIONS]
    assert sum(counts) == len(names)
    assert stats.chisquare(counts).pvalue > 0.001
    # With replacement.
    pairs = [operations for operations in lists if len(operations) == 2]
    equal = sum(first.name == second.name for first, second in pairs)
    assert stats.binomtest(equal, len(pairs), 1 / 15).pvalue > 0.001


def test_without_inc_the_other_set_is_drawn():
    lists = drawn(RandAugment.parse("rand-m9-n2-p1"), 500)
    assert {it.name for operations in lists for it in operations} == set(randaugment.OPERATIONS)
    assert {len(operations) for operations in lists} == {2}


def rotations(text, images=20000):
    """The degrees of what was drawn, as magnitudes with signs."""
    lists = drawn(RandAugment.parse(text), images)
    return np.array([it.argument / 3 for ops in lists for it in ops if it.name == "Rotate"])


def test_magnitudes_are_normal_and_cut_off():
    magnitudes = rotations("rand-m9-n2-mstd0.5-inc1")
    assert len(magnitudes) > 1000
    assert stats.binomtest(int((magnitudes > 0).sum()), len(magnitudes)).pvalue > 0.001
    sizes = np.abs(magnitudes)
    # P(z > 2) are cut off at 10; below that the distribution is the normal one.
    assert sizes.max() == 10
    cut = sizes > 10 - 1e-9
    assert stats.binomtest(int(cut.sum()), len(sizes), stats.norm.sf(2)).pvalue > 0.001
    below = stats.truncnorm(-18, 2, loc=9, scale=0.5).cdf
    assert stats.kstest(sizes[~cut], below).pvalue > 0.001


def test_mmax_moves_the_cut_off_and_a_large_mstd_is_uniform():
    assert np.abs(rotations("rand-m9-n2-mstd3-mmax12", 2000)).max() == pytest.approx(12)
    assert np.abs(rotations("rand-m0-n2-mstd3", 2000)).min() == 0
    uniform = np.abs(rotations("rand-m8-n2-mstd101"))
    assert stats.kstest(uniform, stats.uniform(0, 8).cdf).pvalue > 0.001
    assert set(np.abs(rotations("rand-m7-n2", 2000)).round(9)) == {7.0}
    assert set(np.abs(rotations("rand-m15-n2", 2000)).round(9)) == {10.0}


@pytest.mark.parametrize(
    ("interpolation", "expected"),
    [("random", {BILINEAR, BICUBIC}), ("bilinear", {BILINEAR}), ("bicubic", {BICUBIC})],
)
def test_interpolation(interpolation, expected):
    rand_augment = RandAugment.parse("rand-m9-n2-p1", interpolation=interpolation)
    moves = [it for ops in drawn(rand_augment, 600) for it in ops if it.name == "ShearX"]
    resamples = [it.resample for it in moves]
    assert set(resamples) == expected
    if len(expected) == 2:
        bilinear = resamples.count(BILINEAR)
        assert stats.binomtest(bilinear, len(resamples)).pvalue > 0.001


def test_call_is_pure(picture):
    image = np.asarray(picture)
    rand_augment = RandAugment.parse("rand-m9-n2-mstd0.5-inc1")
    before = image.copy()
    made = [rand_augment(image, np.random.default_rng(seed)) for seed in range(40)]
    again = [rand_augment(image, np.random.default_rng(seed)) for seed in range(40)]
    for one, other in zip(made, again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.shape == image.shape
        assert one.dtype == np.uint8
    np.testing.assert_array_equal(image, before)
    # A quarter have no operation at all.
    untouched = sum(one is image for one in made)
    assert stats.binomtest(untouched, 40, 0.25).pvalue > 0.001


def test_call_applies_what_draw_draws(picture):
    rand_augment = RandAugment.parse("rand-m9-n4-mstd0.5-p1-inc1")
    expected = picture
    for operation in rand_augment.draw(np.random.default_rng(5)):
        expected = operation(expected)
    made = rand_augment(np.asarray(picture), np.random.default_rng(5))
    np.testing.assert_array_equal(made, np.asarray(expected))


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("rand", {}),
        ("rand-m9-n2-mstd0.5-inc1", {"magnitude": 9, "magnitude_std": 0.5, "increasing": True}),
        ("randaug-m9-n2-mstd0.5-inc1", {"magnitude": 9, "magnitude_std": 0.5, "increasing": True}),
        ("rand-inc0-n3-m7", {"magnitude": 7, "num_ops": 3}),
        ("rand-p0.25-mmax12", {"probability": 0.25, "magnitude_max": 12}),
        ("rand-mstd101-p1", {"magnitude_std": math.inf, "probability": 1.0}),
    ],
)
def test_parse(text, fields):
    assert RandAugment.parse(text) == RandAugment(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("augmix-m3", r"'augmix-m3' starts with 'augmix'; it must start with rand or randaug"),
        ("", r"'' starts with ''"),
        (
            "rand-m9-w0",
            r"'rand-m9-w0' has the unknown part 'w0'; .*m9, n2, p0\.5, mstd0\.5, mmax10, inc1",
        ),
        ("rand-tweights", r"unknown part 'tweights'"),
        ("rand-m", r"unknown part 'm'"),
        ("rand-m9.5", r"unknown part 'm9\.5'"),
        ("rand-inc2", r"unknown part 'inc2'"),
        ("rand-m9-", r"unknown part ''"),
        ("rand-mstd0.5x", r"unknown part 'mstd0\.5x'"),
        ("rand-m9-m8", r"gives 'm' twice"),
        ("rand-p1.5", r"probability=1\.5 must be from 0 to 1"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        RandAugment.parse(text)


def test_unknown_interpolation():
    with pytest.raises(ValueError, match=r"interpolation='nearest' must be one of 'bilinear', "):
        RandAugment.parse("rand-m9", interpolation="nearest")

"""The squares that training and evaluation see, of bytes and of pixels."""

import functools
import io

import numpy as np
import pytest
from PIL import Image

from halonet.data import augment, decode, pipeline, transforms
from halonet.data.errors import DamagedImageError, DataError
from halonet.data.randaugment import RandAugment
from halonet.data.views import CenterView, RandomView


def photograph(height=60, width=90):
    """A smooth picture, so that JPEG keeps it."""
    y, x = np.mgrid[:height, :width]
    channels = (
        255 * x / width,
        255 * y / height,
        127 + 100 * np.sin(10 * x / width) * np.cos(8 * y / height),
    )
    return np.stack(channels, -1).astype(np.uint8)


def encoded(pixels, image_format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


def generator(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize(
    ("size", "crop_pct", "resized"), [(48, 1.0, 48), (56, 0.875, 64), (256, 0.95, 269)]
)
def test_the_middle_of_the_resized_image(size, crop_pct, resized):
    """MindCV's 256 of floor(256 / 0.95) = 269 among them."""
    pixels = photograph()
    width = round(90 * resized / 60)
    whole = Image.fromarray(pixels).resize((width, resized), Image.Resampling.BICUBIC)
    top, left = (resized - size) // 2, (width - size) // 2
    right = np.asarray(whole)[top : top + size, left : left + size]
    view = CenterView(size, crop_pct, "bicubic")
    np.testing.assert_array_equal(view(pixels), right)
    np.testing.assert_array_equal(view(encoded(pixels)), right)
    assert not np.array_equal(CenterView(size, crop_pct)(pixels), right)


def test_pixels_of_the_right_size_are_left_alone():
    pixels = photograph(32, 32)
    np.testing.assert_array_equal(CenterView(32)(pixels), pixels)
    np.testing.assert_array_equal(RandomView(CenterView(32))(pixels, generator()), pixels)


def test_bytes_and_pixels_are_cropped_alike():
    pixels = photograph()
    view = RandomView(CenterView(32, interpolation="bicubic"), min_area=0.08)
    for seed in range(20):
        square = view(encoded(pixels), generator(seed))
        np.testing.assert_array_equal(square, view(pixels, generator(seed)))
        box = augment.random_crop_box(60, 90, generator(seed))
        right = augment.crop_and_resize(pixels, box, 32, "bicubic")
        np.testing.assert_array_equal(square, right)
    assert len({view(pixels, generator(seed)).tobytes() for seed in range(20)}) == 20


def test_a_large_photograph_is_reduced_while_it_is_decoded():
    """To nearly the same square: within a few levels of it, where nothing is sharp."""
    data = encoded(photograph(480, 640), "JPEG", quality=95)
    view = RandomView(CenterView(32), min_area=0.5)
    for seed in range(10):
        box = augment.random_crop_box(480, 640, generator(seed), area=(0.5, 1.0))
        assert decode.decode_crop(data, box, 32).image.shape[0] <= 480 // 4 + 1
        whole = augment.crop_and_resize(decode.decode(data), box, 32)
        difference = view(data, generator(seed)).astype(int) - whole
        assert np.abs(difference).max() <= 6
        assert np.abs(difference).mean() < 1


def test_the_crop_is_then_augmented():
    pixels = photograph(40, 40)
    rand_augment = RandAugment.parse("rand-m9-n2-mstd0.5-inc1")
    erasing = functools.partial(
        augment.random_erasing, probability=1.0, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    view = RandomView(
        CenterView(32),
        min_area=0.3,
        rotate=20.0,
        flip=0.5,
        rand_augment=rand_augment,
        erasing=erasing,
    )
    for seed in range(5):
        rng = generator(seed)
        box = augment.random_crop_box(40, 40, rng, area=(0.3, 1.0))
        square = augment.crop_and_resize(pixels, box, 32)
        square = transforms.random_affine(square, rng, rotate=20.0, scale=0.0, translate=0.0)
        right = augment.augment(square, rng, flip=0.5, rand_augment=rand_augment, erasing=erasing)
        np.testing.assert_array_equal(view(pixels, generator(seed)), right)


def test_color_jitter_is_of_all_three():
    pixels = photograph(32, 32)
    view = RandomView(CenterView(32), color_jitter=0.4)
    right = augment.augment(pixels, generator(3), flip=0.0, color_jitter=(0.4, 0.4, 0.4))
    np.testing.assert_array_equal(view(pixels, generator(3)), right)
    assert not np.array_equal(right, pixels)


class Files:
    """A source of two files, of which the second is cut short."""

    name, split, classes, fingerprint = "files", "train", ("a",), {}

    def __init__(self):
        whole = encoded(photograph(), "JPEG")
        self.files = [whole, whole[:-300]]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return {"image": self.files[index], "label": 0}

    def where(self, index):
        return f"file {index}"


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_image_is_named(threads):
    """In training and in evaluation."""
    message = r"^file 1 is not a readable image: "
    view = CenterView(32)
    train = pipeline.train_batches(
        Files(), batch_size=2, seed=0, augment=RandomView(view, min_area=0.2), threads=threads
    )
    with pytest.raises(DataError, match=message):
        next(train)
    evaluate = pipeline.eval_batches(Files(), batch_size=1, view=view, threads=threads)
    assert next(evaluate)["image"].shape == (1, 32, 32, 3)
    with pytest.raises(DataError, match=message):
        next(evaluate)


class ManyFiles(Files):
    """Nine, of which numbers 2 and 7 are damaged; a label is a number."""

    def __init__(self, damaged=(2, 7)):
        self.files = [encoded(photograph(50 + index), "JPEG") for index in range(9)]
        for index in damaged:
            self.files[index] = self.files[index][:-300]

    def __getitem__(self, index):
        return {"image": self.files[index], "label": index}


def replaced(steps=9, source=None, **kwargs):
    batches = pipeline.train_batches(
        source or ManyFiles(),
        batch_size=4,
        seed=3,
        augment=RandomView(CenterView(32), min_area=0.2, flip=0.5),
        replace_damaged=True,
        **kwargs,
    )
    taken = [next(batches) for _ in range(steps)]
    batches.close()
    return {name: np.concatenate([batch[name] for batch in taken]) for name in taken[0]}


def test_a_damaged_image_is_replaced_and_named_once(caplog):
    """In every epoch anew, by sound ones; every other place is as if all were sound."""
    got = replaced()
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"file {index} is not a readable image; others take its place" for index in (2, 7)
    ]
    sound = replaced(source=ManyFiles(damaged=()))
    assert not sound["damaged"].any()
    places = np.isin(sound["label"], (2, 7))
    assert places.sum() == 4 * 2  # 36 places are four epochs
    np.testing.assert_array_equal(got["damaged"], np.where(places, sound["label"] + 1, 0))
    assert not np.isin(got["label"], (2, 7)).any()
    for name in ("image", "label"):
        np.testing.assert_array_equal(got[name][~places], sound[name][~places])
    assert len(set(got["label"][places].tolist())) > 2


@pytest.mark.parametrize(
    "how",
    [{"threads": 3}, {"start_step": 5}, pytest.param({"workers": 2}, marks=pytest.mark.middle)],
)
def test_replacements_depend_on_the_place_alone(how):
    whole, start = replaced(), how.get("start_step", 0)
    got = replaced(9 - start, **how)
    halves = [replaced(9 - start, process_index=p, process_count=2, **how) for p in (0, 1)]
    for name, array in whole.items():
        np.testing.assert_array_equal(got[name], array[4 * start :])
        shares = [half[name].reshape(9 - start, 2, *array.shape[1:]) for half in halves]
        joined = np.concatenate(shares, axis=1).reshape(array[4 * start :].shape)
        np.testing.assert_array_equal(joined, array[4 * start :])


def test_where_nothing_is_sound_nothing_is_replaced():
    with pytest.raises(DamagedImageError, match=r"^file \d is not a readable image: "):
        replaced(source=ManyFiles(damaged=range(9)))


def test_evaluation_fills_up_with_squares():
    source = Files()
    source.files = source.files[:1] * 3
    batches = list(pipeline.eval_batches(source, batch_size=2, view=CenterView(32)))
    assert [batch["image"].shape for batch in batches] == [(2, 32, 32, 3)] * 2
    assert [batch["mask"].tolist() for batch in batches] == [[True, True], [True, False]]

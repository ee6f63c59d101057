"""The order of the data: a function of (seed, step), compared byte for byte; evaluation counts."""

import collections
import functools
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from halonet.data import pipeline, sources, transforms

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES, BATCH = 37, 8  # an epoch ends within a batch


class Numbered:
    """A source whose label is the index, which the image shows as well."""

    name, split, classes, fingerprint = "numbered", "train", tuple("01"), {}

    def __init__(self, examples=EXAMPLES):
        self.examples = examples

    def __len__(self):
        return self.examples

    def __getitem__(self, index):
        if not 0 <= index < self.examples:
            raise IndexError(index)
        return {"image": np.full((4, 5, 3), index % 256, np.uint8), "label": index}

    def where(self, index):
        return f"number {index}"


def noisy(image, rng):
    """An augmentation that makes every use of an image another one."""
    return image ^ rng.integers(0, 256, image.shape).astype(np.uint8)


def train(steps, source=None, *, batch_size=BATCH, seed=5, **kwargs):
    batches = pipeline.train_batches(
        Numbered() if source is None else source, batch_size=batch_size, seed=seed, **kwargs
    )
    taken = [next(batches) for _ in range(steps)]
    batches.close()
    return taken


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            assert one[key].shape == other[key].shape
            assert one[key].tobytes() == other[key].tobytes()


@pytest.fixture(scope="module")
def undisturbed():
    return train(30, augment=noisy)


def test_batches_have_the_promised_shapes(undisturbed):
    for batch in undisturbed:
        assert batch.keys() == {"image", "label"}
        assert (batch["image"].shape, batch["image"].dtype) == ((BATCH, 4, 5, 3), np.uint8)
        assert (batch["label"].shape, batch["label"].dtype) == ((BATCH,), np.int32)


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_order_does_not_depend_on_the_number_of_processes(undisturbed, process_count):
    slices = [
        train(30, augment=noisy, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    together = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*slices, strict=True)
    ]
    assert_same(together, undisturbed)


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (4, 2), (4, 9)])
def test_order_does_not_depend_on_threads(undisturbed, threads, prefetch):
    assert_same(train(30, augment=noisy, threads=threads, prefetch=prefetch), undisturbed)


@pytest.mark.parametrize("start_step", [0, 1, 4, 5, 13, 29])
def test_order_does_not_depend_on_where_it_was_resumed(undisturbed, start_step):
    # Steps 4 and 9 hold the ends of the first two epochs of 37 in batches of 8.
    resumed = train(30 - start_step, augment=noisy, start_step=start_step)
    assert_same(resumed, undisturbed[start_step:])
    shared = train(5, augment=noisy, start_step=start_step, process_index=1, process_count=2)
    assert_same(
        shared[: 30 - start_step],
        [
            {key: array[BATCH // 2 :] for key, array in batch.items()}
            for batch in undisturbed[start_step : start_step + 5]
        ],
    )


def test_order_does_not_depend_on_the_batch_size(undisturbed):
    halves = train(60, augment=noisy, batch_size=BATCH // 2)
    for key in ("image", "label"):
        np.testing.assert_array_equal(
            np.concatenate([batch[key] for batch in halves]),
            np.concatenate([batch[key] for batch in undisturbed]),
        )


def test_order_is_the_same_in_years_to_come():
    # A new Grain that shuffled otherwise would break the resuming of runs without a word.
    labels = np.concatenate([batch["label"] for batch in train(5)])
    assert labels[:6].tolist() == FROZEN_LABELS


def test_every_epoch_visits_every_example_once_in_a_new_order():
    labels = np.concatenate([batch["label"] for batch in train(4 * EXAMPLES)])
    epochs = labels.reshape(-1, EXAMPLES)
    assert len(epochs) == 4 * BATCH
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(EXAMPLES))
    assert len({epoch.tobytes() for epoch in epochs}) == len(epochs)
    # No place prefers an example: the same one comes first in few epochs.
    assert max(collections.Counter(epochs[:, 0].tolist()).values()) < 8


def test_repeated_augmentation():
    """Each batch holds a third of its examples, three times, each changed differently."""
    plain, repeated = train(6, batch_size=4), train(6, batch_size=12, repeats=3)
    for few, batch in zip(plain, repeated, strict=True):
        np.testing.assert_array_equal(batch["label"], np.tile(few["label"], 3))
    changed = train(6, batch_size=12, repeats=3, augment=noisy)
    for batch in changed:
        images = batch["image"].reshape(3, 4, -1)
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert (images[one] != images[other]).any(axis=-1).all()
    halves = [
        train(6, batch_size=12, repeats=3, augment=noisy, process_index=p, process_count=2)
        for p in (0, 1)
    ]
    joined = [
        {name: np.concatenate([one[name], other[name]]) for name in one}
        for one, other in zip(*halves, strict=True)
    ]
    assert_same(joined, changed)
    assert_same(train(2, batch_size=12, repeats=3, augment=noisy, start_step=4), changed[4:])


def test_repeats_divide_the_batch():
    with pytest.raises(ValueError, match=r"^repeats=3 does not divide batch_size=8$"):
        train(1, repeats=3)


def test_seeds_differ():
    orders = [
        np.concatenate([batch["label"] for batch in train(50, seed=seed)]).tobytes()
        for seed in (0, 1, 2, 2**32 - 1)
    ]
    assert len(set(orders)) == 4
    # Nor is one seed's second epoch another one's first.
    epochs = [
        np.frombuffer(order, np.int32)[: 10 * EXAMPLES].reshape(10, EXAMPLES) for order in orders
    ]
    assert len({epoch.tobytes() for order in epochs for epoch in order}) == 40


def test_augmentation_differs_between_epochs_seeds_and_examples(undisturbed):
    # noisy is its own inverse, so that image ^ number is what it drew.
    def drawn(batches):
        return [
            (image ^ np.uint8(label)).tobytes()
            for batch in batches
            for image, label in zip(batch["image"], batch["label"], strict=True)
        ]

    here, there = drawn(undisturbed), drawn(train(30, seed=6, augment=noisy))
    assert len(set(here + there)) == len(here) + len(there)


def test_augmentation_leaves_the_order_alone(undisturbed):
    plain = train(30)
    for batch, other in zip(plain, undisturbed, strict=True):
        np.testing.assert_array_equal(batch["label"], other["label"])
        expected = np.broadcast_to(batch["label"][:, None, None, None], (BATCH, 4, 5, 3))
        np.testing.assert_array_equal(batch["image"], expected)


def test_digits_with_the_affine_augmentation_are_reproducible():
    digits = sources.open_source("mnist5k", "train", image_size=32)
    augment = functools.partial(transforms.random_affine, rotate=10.0, scale=0.1, translate=0.1)
    whole = train(3, digits, batch_size=64, augment=augment, start_step=61)
    half = train(
        *(2, digits),
        batch_size=64,
        augment=augment,
        start_step=62,
        process_index=1,
        process_count=2,
        threads=3,
    )
    assert_same(half, [{key: array[32:] for key, array in batch.items()} for batch in whole[1:]])
    plain = train(3, digits, batch_size=64, start_step=61)
    assert (plain[0]["image"] != whole[0]["image"]).any(axis=(1, 2, 3)).all()


def test_batches_are_handed_over_for_good():
    # The hand-over to the devices goes on reading an array after it asked for the next one.
    batches = train(20, augment=noisy)
    for i, batch in enumerate(batches):
        for other in batches[:i]:
            assert not np.shares_memory(batch["image"], other["image"])
            assert not np.shares_memory(batch["label"], other["label"])


@pytest.mark.parametrize("examples", [1, 7, 1000])
@pytest.mark.parametrize("process_count", [1, 2, 3, 4, 8])
def test_evaluation_counts_every_example_once(examples, process_count):
    batch_size = 24
    per_process = [
        list(
            pipeline.eval_batches(
                Numbered(examples),
                batch_size=batch_size,
                process_index=p,
                process_count=process_count,
            )
        )
        for p in range(process_count)
    ]
    assert {len(batches) for batches in per_process} == {-(-examples // batch_size)}
    labels = []
    for parts in zip(*per_process, strict=True):
        for part in parts:
            local = batch_size // process_count
            assert (part["image"].shape, part["image"].dtype) == ((local, 4, 5, 3), np.uint8)
            assert (part["label"].shape, part["label"].dtype) == ((local,), np.int32)
            assert (part["mask"].shape, part["mask"].dtype) == ((local,), np.bool_)
            assert not part["image"][~part["mask"]].any()
            assert not part["label"][~part["mask"]].any()
            np.testing.assert_array_equal(
                part["image"][part["mask"]][:, 2, 2, 1], part["label"][part["mask"]] % 256
            )
            labels += part["label"][part["mask"]].tolist()
    assert labels == list(range(examples))  # each once, and in file order


@pytest.mark.parametrize("threads", [0, 3])
def test_evaluation_does_not_depend_on_threads(threads):
    expected = list(pipeline.eval_batches(Numbered(), batch_size=BATCH))
    assert len(expected) == 5
    assert_same(
        list(pipeline.eval_batches(Numbered(), batch_size=BATCH, threads=threads)), expected
    )


def test_errors_name_argument_and_value():
    def fails(match, source=Numbered(), **kwargs):  # noqa: B008
        arguments = {"batch_size": BATCH, "seed": 0, **kwargs}
        with pytest.raises(ValueError, match=match):
            pipeline.train_batches(source, **arguments)  # at once, not at the first batch

    fails(
        "batch_size=30 is not a multiple of the 4 processes; the nearest is 32",
        batch_size=30,
        process_count=4,
    )
    fails(
        "batch_size=2 is not a multiple of the 4 processes; the nearest is 4",
        batch_size=2,
        process_count=4,
    )
    fails("batch_size=0 .* the nearest is 1", batch_size=0)
    fails("process_index=4 must be from 0 to 3", process_index=4, process_count=4)
    fails("seed=-1 must be from 0 to 4294967295", seed=-1)
    fails("start_step=-1 must be 0 or more", start_step=-1)
    fails("source 'numbered' has 0 examples in its split 'train'", Numbered(0))
    with pytest.raises(ValueError, match="batch_size=7 is not a multiple of the 2 processes"):
        pipeline.eval_batches(Numbered(), batch_size=7, process_count=2)


class Broken(Numbered):
    def __getitem__(self, index):
        if index == 20:
            raise sources.DataError("example 20 is spoilt")
        return super().__getitem__(index)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_of_the_source_reaches_the_consumer(threads):
    with pytest.raises(sources.DataError, match="example 20 is spoilt"):
        train(EXAMPLES // BATCH + 1, Broken(), threads=threads)
    with pytest.raises(sources.DataError, match="example 20 is spoilt"):
        list(pipeline.eval_batches(Broken(), batch_size=BATCH, threads=threads))


def test_an_error_of_the_augmentation_reaches_the_consumer():
    def augment(image, rng):
        raise RuntimeError("no such picture")

    with pytest.raises(RuntimeError, match="no such picture"):
        train(1, augment=augment)


@pytest.mark.parametrize("leave", ["close", "drop", "exhaust", "fail"])
def test_leaving_an_iterator_stops_its_threads(leave):
    before = set(threading.enumerate())
    if leave == "exhaust":
        batches = pipeline.eval_batches(Numbered(), batch_size=BATCH, threads=3)
    else:
        source = Broken() if leave == "fail" else Numbered()
        batches = pipeline.train_batches(source, batch_size=BATCH, seed=0, threads=3)
    next(batches)
    ours = set(threading.enumerate()) - before
    assert ours
    if leave == "close":
        batches.close()
    elif leave == "drop":
        del batches
    elif leave == "exhaust":
        assert len(list(batches)) == 4
    else:
        with pytest.raises(sources.DataError):
            collections.deque(batches, maxlen=0)
    for thread in ours:
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.mark.middle
def test_leaving_the_program_does_not_hang():
    program = """
import sys
from halonet.data import pipeline, sources
source = sources.open_source("fake:1000:10", "train", image_size=32)
batches = pipeline.train_batches(source, batch_size=16, seed=0, threads=2, prefetch=8)
print(next(batches)["image"].shape, "tensorflow" in sys.modules, flush=True)
"""
    endings = {"pass": 0, "raise SystemExit(3)": 3, "1 / 0": 1}
    running = {
        ending: subprocess.Popen(
            [sys.executable, "-c", program + ending],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for ending in endings
    }
    for ending, process in running.items():
        with process:
            out, errors = process.communicate(timeout=60)
        assert out == "(16, 32, 32, 3) False\n", errors
        assert process.returncode == endings[ending], errors


FROZEN_LABELS = [12, 9, 25, 15, 31, 0]

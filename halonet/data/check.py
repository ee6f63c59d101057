"""Looks at a data set before a run does: what is there, what is wrong with it, how fast it comes.

Each function looks at one thing; `python -m halonet.data check` prints what they say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

from halonet.data import pipeline, prepare, sources
from halonet.data.decode import DecodeError
from halonet.data.errors import DamagedImageError, DataError
from halonet.data.sources import Source, TfdsImages

# Examples of the splits that papers report on.
PUBLISHED = {
    "imagenet2012": {"train": 1_281_167, "validation": 50_000},
    "imagenet2012_real": {"validation": 50_000},
    "imagenet_v2": {"test": 10_000},
}


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast batches come.

    Attributes:
      images_per_second: with the threads and workers that were asked for.
      images_per_core_second: of one core that does nothing else.
    """

    images_per_second: float
    images_per_core_second: float


def archives(instructions: str | None, manual_dir: str) -> list[str]:
    """A line for each archive that a data set is prepared from: its size, or that it is missing.

    Args:
      instructions: TFDS's, of what to download by hand.
      manual_dir: the folder to look into.
    """
    folder = pathlib.Path(manual_dir).expanduser()
    lines = []
    for archive in prepare.expected_archives(instructions):
        path = folder / archive
        size = f"{path.stat().st_size / 1e6:,.1f} MB" if path.is_file() else "missing"
        lines.append(f"{path}: {size}")
    return lines


def describe(source: Source) -> str:
    """What a source is, where it lies and what its classes are called."""
    tfds = f" in {source.folder}, array_record" if isinstance(source, TfdsImages) else ""
    classes = sources.listed(source.classes, most=3)
    return f"{source.name}{tfds}: {len(source.classes):,} classes ({classes})"


def examples(*opened: Source) -> dict[str, int]:
    """The number of examples of the splits of sources, and of all others that TFDS knows."""
    counts = {}
    for source in opened:
        counts |= source.splits if isinstance(source, TfdsImages) else {}
    return counts | {source.split: len(source) for source in opened}


def unusual_counts(source: Source) -> list[str]:
    """A line for each split of a published data set that has not as many examples as others'."""
    if not isinstance(source, TfdsImages):
        return []
    published = PUBLISHED.get(source.name.partition(":")[0].partition("/")[0], {})
    return [
        f"split {split} of {source.name} has {source.splits.get(split, 0):,} examples, and the "
        f"published numbers are of {count:,}"
        for split, count in published.items()
        if source.splits.get(split, 0) != count
    ]


def read_shards(source: Source) -> list[DataError]:
    """Reads the first and the last example of each shard; an error for each that is damaged."""
    if not isinstance(source, TfdsImages):
        return []
    damaged = {}
    for shard, (begin, end) in zip(
        source.shards, itertools.pairwise((0, *source.shard_ends)), strict=True
    ):
        for index in {begin, end - 1}:
            try:
                source[index]
            except DataError as error:
                damaged.setdefault(shard, error)
    return list(damaged.values())


def decode_sample(
    source: Source, views: tuple[Callable[[bytes | np.ndarray], np.ndarray], ...], count: int
) -> tuple[list[np.ndarray], list[str], list[DataError]]:
    """Makes pixels of examples from all over a source.

    Args:
      source: where they come from.
      views: each is applied to every image.
      count: of examples, or all there are.

    Returns the squares of each view, uint8 (examples, size, size, 3); the names of the classes; and
    the error of each example that cannot be read or decoded, which the others lack.
    """
    seen, names, damaged = [], [], []
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist():
        try:
            example = source[index]
            seen.append([view(example["image"]) for view in views])
            names.append(source.classes[example["label"]])
        except DecodeError as error:
            where = source.where(index)
            damaged.append(DamagedImageError(f"{where} is not a readable image: {error}"))
        except DataError as error:
            damaged.append(error)
    return [np.stack(squares) for squares in zip(*seen, strict=True)], names, damaged


def measure_rate(
    source: Source,
    augment: pipeline.Augment,
    *,
    batch_size: int,
    replace_damaged: bool = False,
    threads: int = 1,
    workers: int = 0,
    seconds: float = 4.0,
) -> Rate:
    """Makes training batches for `seconds`, and for as long again in this thread alone.

    What an image costs a core is measured alone and in time of the processor, so that neither what
    else runs on the machine nor the waiting for a disk counts.

    Args:
      source, augment, batch_size, replace_damaged, threads, workers: as of
        `pipeline.train_batches`.
      seconds: of the clock, twice.
    """
    settings = {"batch_size": batch_size, "seed": 0, "augment": augment}
    settings["replace_damaged"] = replace_damaged
    rates = []
    for at_once, clock in (
        ({"threads": threads, "workers": workers}, time.perf_counter),
        ({"threads": 0, "workers": 0}, time.process_time),
    ):
        with contextlib.closing(pipeline.train_batches(source, **settings, **at_once)) as batches:
            for _ in range(max(1, at_once["threads"]) * max(1, at_once["workers"])):
                next(batches)  # what starting costs
            rates.append(_rate(batches, batch_size, seconds, clock))
    return Rate(*rates)


def _rate(batches, batch_size: int, seconds: float, clock: Callable[[], float]) -> float:
    """Images a second, by a clock; at least one batch is made."""
    images, began, stop = 0, clock(), time.perf_counter() + seconds
    while images == 0 or time.perf_counter() < stop:
        next(batches)
        images += batch_size
    return images / (clock() - began)


def core_rate(view: pipeline.Augment, image: bytes | np.ndarray, seconds: float) -> float:
    """Images a second that a core makes of one, in time of the processor: what else runs is not in.

    Args:
      view: (image, rng) -> the square that training sees.
      seconds: of the clock.
    """
    rng = np.random.default_rng(0)
    view(image, rng)  # what starting costs
    count, began, stop = 0, time.thread_time(), time.perf_counter() + seconds
    while count == 0 or time.perf_counter() < stop:
        view(image, rng)
        count += 1
    return count / (time.thread_time() - began)


def photograph() -> bytes:
    """A drawn JPEG that is about as much work as one of ImageNet's: 500x375 pixels, 110 kB.

    (155.84 GiB of 1,431,167 files are 117 kB each: TFDS's catalogue on imagenet2012.) Noise at all
    scales, the finer the weaker, as in photographs.
    """
    height, width = 375, 500
    rng, pixels = np.random.default_rng(0), np.zeros((height, width, 3), np.float32)
    for octave in range(9):
        cells = 2**octave
        grids = rng.normal(size=(3, height * cells // width + 2, cells + 1)).astype(np.float32)
        layers = [
            Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
            for grid in grids
        ]
        pixels += np.stack(layers, -1) * 2.0 ** (-0.4 * octave)
    pixels = 128 + 56 * (pixels - pixels.mean()) / pixels.std()
    return simplejpeg.encode_jpeg(np.clip(pixels, 0, 255).astype(np.uint8), quality=95)

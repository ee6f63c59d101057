"""From a source to batches of numpy arrays, with Grain.

The promise: the global batch at step k is one ordered array that depends on (seed, k) alone. Not on
the number of processes, of which process p holds the slice [p*B/P, (p+1)*B/P); not on the number of
threads and worker processes; not on the step at which a run was resumed. So there is no position to
save with a checkpoint: the step is the position.
"""

import collections.abc
import functools
import logging
import sys
import typing

import grain
import numpy as np

from halonet.data.decode import DecodeError
from halonet.data.errors import DamagedImageError
from halonet.data.sources import Source
from halonet.data.workers import Batch, WorkerBatches

Augment = collections.abc.Callable[[bytes | np.ndarray, np.random.Generator], np.ndarray]
"""(image as the source has it, random numbers) -> pixels; it must not write into its argument."""

View = collections.abc.Callable[[bytes | np.ndarray], np.ndarray]
"""(image as the source has it) -> pixels."""

_REPLACEMENTS = 10  # tried in the place of a damaged image


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    augment: Augment | None = None,
    repeats: int = 1,
    replace_damaged: bool = False,
    threads: int = 1,
    workers: int = 0,
    prefetch: int = 4,
) -> collections.abc.Iterator[Batch]:
    """Endless training batches, each epoch in a new order.

    Global batch k holds the positions k*B to (k+1)*B - 1 of one endless stream, in which epoch
    follows epoch: each visits every example once, and a batch may span two. With `repeats` each
    batch holds B / repeats examples so many times, each changed differently by `augment`.

    Args:
      source: where the examples come from.
      batch_size: B, the global batch.
      seed: from 0 to 2**32 - 1; decides the order and what `augment` draws.
      start_step: the first step to deliver; costs nothing however large.
      process_index: p, which slice of each batch to read.
      process_count: P; must divide the batch.
      augment: applied to each image, with a Generator that depends on the seed and on the position
        in the stream, so that an example is changed differently in each epoch.
      repeats: repeated augmentation (Hoffer et al., 2019, arXiv 1901.09335); must divide the batch.
      replace_damaged: whether an image that `augment` cannot read gives its place to another, drawn
        from what the seed and the place give, and is named in the log. Otherwise it is an error.
      threads: how many batches a process makes at once; 0 makes them in the caller's thread. One is
        best for small images, whose cost is Python's; decoding JPEGs lets go of the interpreter's
        lock.
      workers: processes that make batches instead of this one, see `halonet.data.workers`: source
        and `augment` must be picklable, and an error that is no DataError becomes one. 0: none.
      prefetch: how many batches are kept ready.

    Yields {"image": uint8 (B/P, H, W, 3), "label": int32 (B/P,)}, in arrays that nobody else holds;
    with `replace_damaged` also "damaged": int32 (B/P,), 1 + the number of the example whose place
    this was, or 0.

    next() raises DamagedImageError for an image that cannot be read and is not replaced, and
    whatever else the source or `augment` raises. There is a close().
    """
    local = _local_size(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 to {2**32 - 1}")
    if start_step < 0:
        raise ValueError(f"start_step={start_step} must be 0 or more")
    if len(source) == 0:
        raise ValueError(f"source {source.name!r} has 0 examples in its split {source.split!r}")
    if repeats < 1 or batch_size % repeats:
        raise ValueError(f"repeats={repeats} does not divide batch_size={batch_size}")
    stream = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    if repeats > 1:
        stream = _Repeated(stream, batch_size, repeats)
    if augment is not None:
        # Before the slice, so that the random numbers hang on the place in the global stream.
        stream = stream.random_map(functools.partial(_augmented, source, augment, replace_damaged))
    else:
        stream = stream.map(functools.partial(_example, source))
    mine = _ProcessSlice(stream, batch_size, start=process_index * local, length=local)
    # Batched here and not after to_iter_dataset: each batch is made whole by one thread, and which
    # examples it holds is arithmetic on its index.
    batches = mine.batch(local, drop_remainder=True, batch_fn=_stack)
    made = _iterate(batches[start_step:], threads, workers, prefetch)
    return _naming_damaged(made, source) if replace_damaged else made


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    view: View | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    workers: int = 0,
    prefetch: int = 4,
) -> collections.abc.Iterator[Batch]:
    """Every example once, in file order; the last batch is filled up with zeros.

    Every process gets the same number of batches of the same shape, so that none of them waits for
    the others in a collective; a process whose share of the last batch is all filling still takes
    part. `view` is applied to each image; other arguments as in `train_batches`.

    Yields {"image": uint8 (B/P, H, W, 3), "label": int32 (B/P,), "mask": bool (B/P,)}; the mask is
    False where there is no example, and image and label are 0 there. Where the source gives sets of
    labels, also "labels": int32 (B/P, classes).
    """
    local = _local_size(batch_size, process_index, process_count)
    make = functools.partial(
        _eval_batch, source, view, batch_size=batch_size, start=process_index * local, local=local
    )
    steps = grain.MapDataset.range(-(-len(source) // batch_size))
    return _iterate(steps.map(make), threads, min(workers, len(steps)), prefetch)


def _eval_batch(
    source: Source, view: View | None, batch: int, *, batch_size: int, start: int, local: int
) -> Batch:
    """The share from `start` on of one evaluation batch, `local` examples with their mask."""
    first = batch * batch_size + start
    real = [
        _example(source, index, view) for index in range(first, min(first + local, len(source)))
    ]
    filling = local - len(real)
    if filling:
        like = real[0] if real else _example(source, 0, view)
        real += [{name: np.zeros_like(value) for name, value in like.items()}] * filling
    return {**_stack(real), "mask": np.arange(local) < local - filling}


class _Repeated(grain.MapDataset):
    """Of each `batch_size` elements the first part, `repeats` times.

    Copies lie far apart, so that they do not share a group of batch statistics.
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, repeats: int):
        super().__init__(parent)
        self._batch_size, self._examples = batch_size, batch_size // repeats

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> typing.Any:
        batch, offset = divmod(index, self._batch_size)
        return self._parent[batch * self._examples + offset % self._examples]


class _ProcessSlice(grain.MapDataset):
    """Of each `batch_size` consecutive elements those from `start` on, `length` of them."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, *, start: int, length: int):
        super().__init__(parent)
        self._batch_size, self._start, self._slice = batch_size, start, length

    def __len__(self) -> int:
        # The stream is endless, which Grain spells sys.maxsize.
        return sys.maxsize // self._batch_size * self._slice

    def __getitem__(self, index: int) -> typing.Any:
        batch, offset = divmod(index, self._slice)
        return self._parent[batch * self._batch_size + self._start + offset]


def _example(source: Source, index: int, view: View | None = None) -> dict:
    """Reads an example and makes pixels of it; a damaged image is named."""
    example = source[index]
    if view is None:
        return example
    try:
        return {**example, "image": view(example["image"])}
    except DecodeError as error:
        raise DamagedImageError(
            f"{source.where(index)} is not a readable image: {error}"
        ) from error


def _augmented(
    source: Source, augment: Augment, replace: bool, index: int, rng: np.random.Generator
) -> dict:
    if not replace:
        return _example(source, index, lambda image: augment(image, rng))
    damaged = 0
    for left in reversed(range(_REPLACEMENTS + 1)):
        try:
            example = _example(source, index, lambda image: augment(image, rng))
            return {**example, "damaged": damaged}
        except DamagedImageError:
            if not left:
                raise
            damaged = damaged or index + 1
            index = int(rng.integers(len(source)))
    raise AssertionError("not reached")


def _naming_damaged(
    batches: collections.abc.Iterator[Batch], source: Source
) -> collections.abc.Generator[Batch, None, None]:
    """Logs each damaged image once."""
    named = set()
    try:
        for batch in batches:
            found = set((batch["damaged"][batch["damaged"] > 0] - 1).tolist())
            for index in sorted(found - named):
                logging.warning(
                    "%s is not a readable image; others take its place", source.where(index)
                )
            named |= found
            yield batch
    finally:
        batches.close()


def _stack(examples: collections.abc.Sequence[dict]) -> Batch:
    numbers = examples[0].keys() - {"image"}
    return {
        "image": np.stack([example["image"] for example in examples]),
        **{name: np.array([example[name] for example in examples], np.int32) for name in numbers},
    }


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    """The share of one process; ValueError unless the processes share the batch evenly."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be from 0 to {process_count - 1}")
    if batch_size < 1 or batch_size % process_count:
        nearest = max(1, round(batch_size / process_count)) * process_count
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of the {process_count} processes; "
            f"the nearest is {nearest}"
        )
    return batch_size // process_count


def _iterate(
    batches: grain.MapDataset, threads: int, workers: int, prefetch: int
) -> collections.abc.Iterator[Batch]:
    if not workers:
        return _read(batches, threads, prefetch)
    # A worker is a core's worth: its batches are made in its main thread, unless more are wanted.
    threads = threads if threads > 1 else 0
    make = functools.partial(_share, batches, threads)
    return WorkerBatches(make, count=workers, ahead=max(2, -(-prefetch // workers)))


def _share(
    batches: grain.MapDataset, threads: int, worker: int, workers: int
) -> collections.abc.Iterator[Batch]:
    return _read(batches[worker::workers], threads, threads)


def _read(
    batches: grain.MapDataset, threads: int, prefetch: int
) -> collections.abc.Generator[Batch, None, None]:
    # Grain wants both or neither, and more threads than batches in flight would only wait.
    if threads == 0 or prefetch == 0:
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    else:
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(threads, prefetch)
        )
    iterator = iter(batches.to_iter_dataset(options))
    # Grain's own iterator keeps its threads when it is exhausted, and until a garbage collection
    # when it is dropped; an evaluation every few minutes would gather them.
    try:
        yield from iterator
    finally:
        iterator.close()

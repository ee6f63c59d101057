"""The hand-over: numpy batches of this process become global arrays, a few batches ahead."""

import collections
import collections.abc
import time

import jax
import numpy as np


class Prefetcher:
    """An iterator of global arrays whose transfers start `depth` batches before they are asked for.

    Args:
      iterator: batches of this process: its contiguous share of each global batch. Its arrays
        become read-only, for the transfer goes on reading them.
      sharding: how an array of so many dimensions is laid over the devices of all processes.
      depth: how many batches are on the way or on the devices, the one asked for included.

    `wait_seconds` is the time spent so far in waiting for the host's batches. Reading it does not
    touch a device. While the devices are busy with earlier batches such a wait costs nothing, so
    its share of the wall clock is an upper bound of what the input costs.
    """

    def __init__(
        self,
        iterator: collections.abc.Iterator[dict[str, np.ndarray]],
        sharding: collections.abc.Callable[[int], jax.sharding.Sharding],
        depth: int = 2,
    ):
        if depth < 1:
            raise ValueError(f"depth={depth} must be 1 or more: 1 transfers the batch asked for")
        self.wait_seconds = 0.0
        self._iterator = iterator
        self._sharding = sharding
        self._depth = depth
        self._ready: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._exhausted = False

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._ready) < self._depth and not self._exhausted:
            self._start_one()
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def close(self) -> None:
        """Drops the batches in flight and closes the host's iterator, if it can be closed."""
        self._exhausted = True
        self._ready.clear()
        if hasattr(self._iterator, "close"):
            self._iterator.close()

    def _start_one(self) -> None:
        started = time.perf_counter()
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._exhausted = True
            return
        finally:
            self.wait_seconds += time.perf_counter() - started
        self._ready.append({name: self._transfer(array) for name, array in batch.items()})

    def _transfer(self, array: np.ndarray) -> jax.Array:
        # The transfer is still reading this buffer after the call, and on the CPU the device array
        # may be this buffer. Whoever fills it again now gets an error instead of wrong images.
        array.flags.writeable = False
        return jax.make_array_from_process_local_data(self._sharding(array.ndim), array)

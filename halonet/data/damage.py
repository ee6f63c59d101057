"""How many damaged images a run has passed over, and whether that is too many."""

import collections

from halonet.data.errors import DataError


class DamageCount:
    """Counts the places of global batches in which another image stands for a damaged one.

    All processes count the same and so stop at the same step.

    Args:
      limit: places that an epoch may have.
      batch_size: of the global batch.
      examples: of the training split, an epoch's worth.
      start_step: steps taken before the first that is counted.
    """

    def __init__(self, *, limit: int, batch_size: int, examples: int, start_step: int = 0):
        self._limit, self._batch_size, self._examples = limit, batch_size, examples
        self._step = start_step
        self._epochs: collections.Counter[int] = collections.Counter()

    def add(self, places: int) -> None:
        """Counts those of the next step; DataError where its epoch has more than the limit."""
        epoch = self._step * self._batch_size // self._examples
        self._step += 1
        self._epochs[epoch] += places
        if self._epochs[epoch] > self._limit:
            raise DataError(
                f"{self._epochs[epoch]} damaged images in epoch {epoch + 1}, by step {self._step}, "
                f"and config.data.damaged_limit={self._limit}; the log names them"
            )

    def total(self) -> int:
        """All that were counted."""
        return self._epochs.total()

"""How many damaged images a run has passed over, and whether that is too many."""

import types
from collections.abc import Mapping

from halonet.data.errors import DataError


class DamageCount:
    """Counts the places of global batches in which another image stands for a damaged one.

    All processes count the same and so stop at the same step.

    Args:
      limit: places that an epoch may have.
      batch_size: of the global batch.
      examples: of the training split, an epoch's worth.
      start_step: steps taken before the first that is counted.
      before: what `counted` gave after them; empty: nothing was.
    """

    def __init__(
        self,
        *,
        limit: int,
        batch_size: int,
        examples: int,
        start_step: int = 0,
        before: Mapping[str, int] = types.MappingProxyType({}),
    ):
        self._limit, self._batch_size, self._examples = limit, batch_size, examples
        self._step = start_step
        counts = {"epoch": 0, "total": 0, **before}
        self._in_epoch, self._total = counts["epoch"], counts["total"]

    def add(self, places: int) -> None:
        """Counts those of the next step; DataError where its epoch has more than the limit."""
        epoch = self._epoch()
        self._step += 1
        self._in_epoch += places
        self._total += places
        if self._in_epoch > self._limit:
            raise DataError(
                f"{self._in_epoch} damaged images in epoch {epoch + 1}, by step {self._step}, "
                f"and config.data.damaged_limit={self._limit}; the log names them"
            )
        if self._epoch() > epoch:
            self._in_epoch = 0

    def counted(self) -> dict[str, int]:
        """Places of the run, "total", and of the epoch that its next step is of, "epoch"."""
        return {"epoch": self._in_epoch, "total": self._total}

    def _epoch(self) -> int:
        return self._step * self._batch_size // self._examples

"""Relative tables for other blocks and halos than a model was trained with."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from halonet.models.halonet import HaloNet
from halonet.ops import table_size

TABLES = ("row_table", "col_table")


def resize_tables(variables: dict[str, Any], source: HaloNet, target: HaloNet) -> dict[str, Any]:
    """Fits the variables of `source` to `target`, which has another `block_size` or `halo_size`.

    Rows stay with the offset that they stand for, in pixels (or, in contiguous tables of strided
    layers, in neighbours), so what both models see, both see alike. Offsets that `source` had no
    row for take that of the nearest offset.

    Returns:
      The variables, with relative tables of as many rows as `target` has.

    Raises:
      ValueError: where the two models index positions differently, or the variables are not those
        of `source`.
    """
    if source.positions != target.positions:
        raise ValueError(
            f"positions={target.positions!r} cannot take tables of positions={source.positions!r}"
        )
    if source.positions == "none":
        return variables
    kinds = {
        f"stage{stage}_block{number}": block.kind
        for stage, blocks in enumerate(source.stages(), start=1)
        for number, block in enumerate(blocks, start=1)
    }
    before, now = _offsets(source), _offsets(target)
    rows = np.clip(now - before[0], 0, len(before) - 1)

    def fit(path: tuple, leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        # Global attention has tables of the whole map, which blocks and halos do not touch.
        halo = names[-1] in TABLES and any(kinds.get(name) == "h" for name in names)
        if halo and len(leaf) != len(before):
            raise ValueError(f"{'/'.join(names)} has {len(leaf)} rows, not {len(before)}")
        return leaf[rows] if halo else leaf

    return jax.tree_util.tree_map_with_path(fit, variables)


def _offsets(model: HaloNet) -> np.ndarray:
    """The offset in pixels, key - query, that each row of a table stands for."""
    rows = table_size(model.block_size, model.halo_size, model.positions)
    # The last row is that of the first query of a block and the last key of its window.
    return np.arange(rows) + (model.block_size + model.halo_size) - rows

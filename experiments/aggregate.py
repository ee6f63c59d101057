"""What the table of a sweep says: seeds together, the best at each cost, error by a power law."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence

from experiments.table import SEED, Row

# A power law is fitted to so many costs at least, the largest so many times the smallest.
LEAST_COSTS, LEAST_SPAN = 3, 4.0


@dataclasses.dataclass(frozen=True)
class Group:
    """Members that differ in seed alone.

    Attributes:
      name: what their names have in common.
      settings: the overrides in which groups differ, by key.
      members: their rows, unfinished ones too.
    """

    name: str
    settings: dict[str, str | None]
    members: list[Row]

    @functools.cached_property
    def finished(self) -> list[Row]:
        return [row for row in self.members if row["state"] == "done"]

    def values(self, column: str) -> list[float]:
        """Of the finished members, those that have one."""
        return [row[column] for row in self.finished if row[column] is not None]

    def mean(self, column: str) -> float | None:
        values = self.values(column)
        return sum(values) / len(values) if values else None


def varying(rows: Sequence[Row]) -> list[str]:
    """The columns of the configuration in which members differ, the seed's among them."""
    names = [name for name in rows[0] if name.startswith("config.")]
    return [name for name in names if len({row[name] for row in rows}) > 1]


def groups(rows: Sequence[Row]) -> list[Group]:
    """The members by all that they override but the seed, in their order."""
    keys = [name for name in rows[0] if name.startswith("config.") and name != SEED]
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    names = [_common([row["name"] for row in members]) for members in found.values()]
    if len(set(names)) < len(names):
        names = [members[0]["name"] for members in found.values()]
    shown = [key for key in varying(rows) if key != SEED]
    return [
        Group(name, {key.removeprefix("config."): members[0][key] for key in shown}, members)
        for name, members in zip(names, found.values(), strict=True)
    ]


def _common(names: list[str]) -> str:
    """h1 of h1_seed0 and h1_seed1, or of h1-s0 and h1-s1."""
    if len(names) == 1:
        return names[0]
    start = os.path.commonprefix(names)
    if any(name[len(start) :][:1].isdecimal() for name in names):  # perhaps within a number
        start = start.rstrip("0123456789")
    return re.sub(r"([-_. ]*seed[-_. ]*|[-_. ]+s?|(?<=\d)s)$", "", start) or names[0]


def front(points: Sequence[tuple[float, float]], *, more_is_better: bool = False) -> list[int]:
    """The Pareto front: which points no other beats or equals in cost and value at once.

    Args:
      points: (cost, value) each; the higher value is the better one.
      more_is_better: of the cost, too: images per second, say.

    Returns:
      Their indices, by rising cost.
    """
    sign = -1 if more_is_better else 1
    order = sorted(range(len(points)), key=lambda i: (sign * points[i][0], -points[i][1]))
    found, best = [], -math.inf
    for index in order:
        if points[index][1] > best:
            best = points[index][1]
            found.append(index)
    return sorted(found, key=lambda i: points[i][0])


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """error = factor * cost ** exponent, by least squares of the logarithms.

    Attributes:
      standard_error: of the exponent.
      residuals: of each point, log(error) less the fitted one, natural.
      r_squared: the share of the variance of log(error) that the fit explains.
    """

    exponent: float
    factor: float
    standard_error: float
    residuals: list[float]
    r_squared: float


def power_law(costs: Sequence[float], errors: Sequence[float]) -> PowerLaw | None:
    """The fit of errors to costs, all above 0; None where the costs are too few or too close.

    They are at least LEAST_COSTS different ones, the largest LEAST_SPAN times the smallest.
    """
    if len(set(costs)) < LEAST_COSTS or max(costs) < LEAST_SPAN * min(costs):
        return None
    x, y = [math.log(it) for it in costs], [math.log(it) for it in errors]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    spread = sum((it - x_mean) ** 2 for it in x)
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / spread
    start = y_mean - slope * x_mean
    residuals = [b - start - slope * a for a, b in zip(x, y, strict=True)]
    left, whole = sum(it**2 for it in residuals), sum((it - y_mean) ** 2 for it in y)
    return PowerLaw(
        exponent=slope,
        factor=math.exp(start),
        standard_error=math.sqrt(left / (len(x) - 2) / spread),
        residuals=residuals,
        r_squared=1 - left / whole if whole else 1.0,
    )

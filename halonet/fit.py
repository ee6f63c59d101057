"""Which batch fits: sizes are compiled until that is known."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Trial:
    """One size of batch, compiled.

    Attributes:
      images: of a device.
      needed: bytes of a device; of what was refused, what the compiler says, 0 where it does not.
      fits: whether the device has as much.
      memory: bytes by kind, {} where the compiler refused.
      compiled: None where it refused.
      said: by the compiler that refused, in a line.
      seconds: that it took.
    """

    images: int
    needed: float
    fits: bool
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    compiled: Any = None
    said: str = ""
    seconds: float = 0.0


def compile_sizes(
    compiling: Callable[[int], Callable[[], Trial]],
    wanted: int,
    unit: int,
    limit: float,
    patience: float = 60.0,
) -> list[Trial]:
    """Compiles the size that is wanted, and others until two fit or the limit lies between two.

    Two at a time: a compiler keeps about one core busy.

    Args:
      compiling: images of a device -> what compiles as many, to be called in a thread.
      wanted: images of a device.
      unit: a size must be a multiple of it, unless nothing else fits.
      limit: bytes of a device.
      patience: seconds to wait for the first size alone. What is far too large is refused early,
        and what is a little too large takes longest, as the compiler tries to save memory.

    Returns:
      The trials by size.
    """
    trials: list[Trial] = []
    running: dict[concurrent.futures.Future, int] = {}
    asked: list[int] = []

    def start(size: int) -> None:
        asked.append(size)
        running[pool.submit(compiling(size))] = size

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        start(wanted)
        concurrent.futures.wait(running, timeout=patience)
        while running:
            done, _ = concurrent.futures.wait(
                running, timeout=0, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                trials.append(future.result())
                del running[future]
            hopeful = [*running.values(), *(trial.images for trial in trials if trial.fits)]
            size = 0
            if len(hopeful) < 2:
                size = _next_size(trials, asked, hopeful, wanted, unit, limit)
            if size:
                start(size)
            elif running:
                concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
    return sorted(trials, key=lambda trial: trial.images)


def _next_size(
    trials: Sequence[Trial],
    asked: Sequence[int],
    hopeful: Sequence[int],
    wanted: int,
    unit: int,
    limit: float,
) -> int:
    """What to compile beside what runs or fits (`hopeful`); 0: nothing."""
    refused = [trial for trial in trials if not trial.fits and trial.images <= wanted]
    if not refused:
        second = smaller(wanted, unit) if wanted >= 2 * unit else 2 * wanted
        return 0 if second in asked else second
    lowest, least = min(refused, key=lambda trial: trial.images), min(asked)
    # Where no whole group lies between it and one that fits, there is no more to know.
    if least == 1 or any(lowest.images - size <= unit for size in hopeful):
        return 0
    size = smaller(least, unit)
    if lowest.needed:
        # Half of what its bytes say: they are what is left after the compiler has saved some.
        guess = int(lowest.images * limit / lowest.needed / 2) // unit * unit
        size = min(size, guess) if guess else size
    return size


def smaller(images: int, unit: int) -> int:
    """About half, of whole units as long as there are two."""
    return max(1, images // 2 // unit * unit if images >= 2 * unit else images // 2)


def largest(trials: Sequence[Trial], unit: int, limit: float) -> int:
    """The most images of a device, in whole units, by a line through two sizes that fit.

    Never fewer than what was compiled and fits, nor as many as what was refused; 0 if none fits.
    """
    fitting = [trial for trial in trials if trial.fits]
    if not fitting:
        return 0
    refused = min((trial.images for trial in trials if not trial.fits), default=math.inf)
    most, found = fitting[-1].images, fitting[-1].images
    if len(fitting) > 1:
        first, last = fitting[0], fitting[-1]
        each = (last.needed - first.needed) / (last.images - first.images)
        if each > 0:
            found = last.images + int((limit - last.needed) / each)
    if found >= unit:
        found = found // unit * unit
    if found >= refused:
        found = refused - (unit if refused > unit else 1)
    return max(found, most)


def bytes_said(message: str) -> float:
    """The bytes in what libtpu says of a program that is too large: "... (26.51G) exceeds ..."."""
    found = re.search(r"\b(\d+(?:\.\d+)?)([KMGT])\b", message)
    return float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])) if found else 0.0

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
    compiling: Callable[[int], Callable[[], Trial]], wanted: int, unit: int
) -> list[Trial]:
    """Compiles the size that is wanted, and others until two fit or the limit lies between two.

    Two at a time: a compiler keeps about one core busy.

    Args:
      compiling: images of a device -> what compiles as many, to be called in a thread.
      wanted: images of a device.
      unit: a size must be a multiple of it, unless nothing else fits.

    Returns:
      The trials by size.
    """
    second = smaller(wanted, unit) if wanted >= 2 * unit else 2 * wanted
    asked, trials = [wanted, second], []
    waiting, running = list(asked), set()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        while waiting or running:
            while waiting and len(running) < 2:
                running.add(pool.submit(compiling(waiting.pop(0))))
            done, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for trial in (it.result() for it in done):
                trials.append(trial)
                if trial.fits or trial.images > wanted:
                    continue
                # Where no whole group lies between it and the next smaller, that one tells enough.
                least = min(asked)
                if least > 1 and (least == trial.images or trial.images - least > unit):
                    asked.append(smaller(least, unit))
                    waiting.append(asked[-1])
    return sorted(trials, key=lambda trial: trial.images)


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

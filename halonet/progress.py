"""How far a run is: one live line, and the rates that it shows."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping


class LiveLine:
    """One line of a terminal that is written over and over; elsewhere a plain line now and then.

    Args:
      interval: seconds between lines that are not on a terminal.
    """

    def __init__(self, interval: float = 10.0):
        self._live = sys.stdout.isatty()
        self._interval, self._last_print = interval, -1e9

    def show(self, line: str, *, last: bool = False) -> None:
        """Prints how things stand; the last line stays."""
        now = time.perf_counter()
        if not self._live and not last and now - self._last_print < self._interval:
            return
        self._last_print = now
        if self._live:
            width = shutil.get_terminal_size().columns
            print(f"\r{line[: width - 1]:<{width - 1}}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)

    def say(self, line: str) -> None:
        """Prints a line of its own, clear of the live one."""
        if self._live:
            width = shutil.get_terminal_size().columns
            print("\r" + " " * (width - 1) + "\r", end="")
        print(line, flush=True)


class Progress:
    """How far a run is, as a live line.

    Args:
      total: steps of the run.
      start: the step from which this start goes on.
      images_per_step: the global batch.
      ideal_seconds: for one image, of all devices at their peak; 0 where that is not known.
      enabled: whether this process prints.
      interval: seconds between lines that are not on a terminal.
    """

    def __init__(
        self,
        *,
        total: int,
        start: int,
        images_per_step: int,
        ideal_seconds: float = 0.0,
        enabled: bool = True,
        interval: float = 10.0,
    ):
        self._total, self._images, self._enabled = total, images_per_step, enabled
        self._ideal = ideal_seconds
        self._line = LiveLine(interval)
        self._window = (time.perf_counter(), start, 0.0)
        self._rate = 0.0

    def rates(self, step: int, wait_seconds: float) -> dict[str, float]:
        """What was reached since the last call: names of `perf/` to numbers.

        Images per second, the share of the time waiting for data, and, where `ideal_seconds` is
        known, the model FLOP utilisation: the share of the devices' peak.
        """
        now = time.perf_counter()
        then, since_step, since_wait = self._window
        elapsed = max(now - then, 1e-9)
        self._window = (now, step, wait_seconds)
        self._rate = (step - since_step) * self._images / elapsed
        found = {
            "perf/images_per_second": self._rate,
            "perf/data_wait": (wait_seconds - since_wait) / elapsed,
        }
        return {**found, "perf/mfu": self._rate * self._ideal} if self._ideal else found

    def pause(self, seconds: float) -> None:
        """Takes time that was not training (an evaluation) out of the current window."""
        then, step, wait = self._window
        self._window = (then + seconds, step, wait)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Prints where the run is."""
        if not self._enabled:
            return
        left = (self._total - step) * self._images / self._rate if self._rate else float("nan")
        line = (
            f"step {step}/{self._total}  loss {values.get('train/loss', math.nan):.3f}  "
            f"{self._rate:,.0f} images/s  {duration(left)} left  "
            f"waiting for data {values['perf/data_wait']:.0%}"
        )
        if "perf/mfu" in values:
            line += f"  MFU {values['perf/mfu']:.1%}"
        self._line.show(line, last=step >= self._total)

    def say(self, line: str) -> None:
        """Prints a line of its own, clear of the live one."""
        if self._enabled:
            self._line.say(line)


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours too: "1:02:03"; "?" for what is no number."""
    if seconds != seconds:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

"""What a run measured: rows of numbers in files, and TensorBoard events beside them.

A row is one JSON object on a line: "step", then names. `train/*` and `eval/*` hold only quantities
that the same run would reproduce; rates and times go under `perf/*`. Each start of a run writes a
part of its own, `metrics/000.jsonl`, `001.jsonl`, ...: object stores cannot append. The reader
joins the parts and drops what a later start, from an earlier step, wrote again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from halonet.files import write_whole

Row = dict[str, Any]
PARTS = "metrics"
EVENTS = "tensorboard"
SPENT = "perf/seconds_"  # the names of what a start's time went on begin so


class MetricsLog:
    """Writes the rows of one start of a run.

    Args:
      workdir: the run's folder.
      start_step: the step from which this start goes on; 0 for a fresh run.
      primary: whether this process writes; the others only keep what they are given.
      began: when this start did, in seconds since 1970.
    """

    def __init__(
        self, workdir: epath.PathLike, *, start_step: int, primary: bool = True, began: float = 0.0
    ):
        workdir = epath.Path(workdir)
        self._rows = read_metrics(workdir, until=start_step)
        self._mine: list[Row] = [{"step": start_step, "perf/started": began or time.time()}]
        self._rows += self._mine
        self._path = None
        self._events_folder = workdir / EVENTS
        self._events: _Events | None = None
        if primary:
            parts = workdir / PARTS
            parts.mkdir(parents=True, exist_ok=True)
            number = max((int(path.stem) for path in _part_paths(workdir)), default=-1) + 1
            self._path = parts / f"{number:03d}.jsonl"
            write_whole(self._path, _dump(self._mine))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a row; it is in the file on return.

        Raises:
          ValueError: for a name outside train/, eval/ and perf/.
        """
        for name in values:
            if not name.startswith(("train/", "eval/", "perf/")):
                raise ValueError(f"metric '{name}' must begin with train/, eval/ or perf/")
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        self._rows.append(row)
        self._mine.append(row)
        if self._path is not None:
            # The whole part anew, for want of append on an object store: 200 bytes a row, so a
            # few hundred kB where rows are as rare as a long run wants them.
            write_whole(self._path, _dump(self._mine))
            # Not before the first row: by then the devices have their first step to work on.
            self._events = self._events or _Events(self._events_folder)
            self._events.write(step, {name: row[name] for name in values})

    def rows(self) -> list[Row]:
        """The run's history up to now, earlier starts included."""
        return list(self._rows)

    def finish(self) -> None:
        """Joins all parts into `metrics.jsonl`."""
        if self._path is not None:
            write_whole(self._path.parent.parent / "metrics.jsonl", _dump(self._rows))

    def close(self) -> None:
        """Flushes the event files."""
        if self._events is not None:
            self._events.close()
            self._events = None


class _Events:
    """clu's TensorBoard writer on a thread of its own.

    It brings TensorFlow, for the format of the files, whose import takes seconds: they shall not
    stand between the start of a run and its first step.
    """

    def __init__(self, folder: epath.Path):
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "tensorboard")
        self._writer = self._thread.submit(_open_writer, folder)
        self._last = self._writer

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._last.done():
            self._last.result()  # a write that failed is raised here, one late
        self._last = self._thread.submit(lambda: self._writer.result().write_scalars(step, values))

    def close(self) -> None:
        self._thread.submit(lambda: self._writer.result().close()).result()
        self._thread.shutdown()


def _open_writer(folder: epath.Path):
    # TensorFlow announces its CPU options on import, into the middle of the progress line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    from clu import metric_writers

    # It would take the memory of GPUs for itself.
    if "tensorflow" in sys.modules:
        sys.modules["tensorflow"].config.set_visible_devices([], "GPU")

    return metric_writers.SummaryWriter(str(folder))


def read_metrics(workdir: epath.PathLike, *, until: float = math.inf) -> list[Row]:
    """The rows of a run in the order of its history.

    Where a start went on from step s, rows of earlier starts beyond s are dropped: they were
    measured again.

    Args:
      until: rows beyond this step are dropped too.
    """
    rows: list[Row] = []
    for part in _parts(epath.Path(workdir)):
        rows = [row for row in rows if row["step"] <= part[0]["step"]] + part
    return [row for row in rows if row["step"] <= until]


def goodput(workdir: epath.PathLike, ended: float) -> dict[str, float]:
    """What the time of a run went on, over all its starts.

    Args:
      ended: when the last start did, in seconds since 1970.

    Returns:
      "goodput/starts" and "goodput/seconds" since the first; and as shares of these "goodput/NAME"
      for each `perf/seconds_NAME` of the rows, a start's own at that time, and "goodput/lost":
      steps that a later start had to take again, and the time in which nothing ran.
    """
    # Of a run that an older version began, what came later.
    parts = [part for part in _parts(epath.Path(workdir)) if part[0]["perf/started"] > 1]
    # Of a start counts what no later one took again.
    ends = [
        min([later[0]["step"] for later in parts[i + 1 :]], default=math.inf)
        for i in range(len(parts))
    ]
    spent: dict[str, float] = collections.defaultdict(float)
    for part, end in zip(parts, ends, strict=True):
        timed = [row for row in part if SPENT + "step" in row and row["step"] <= end]
        for name, seconds in timed[-1].items() if timed else ():
            if name.startswith(SPENT):
                spent[name.removeprefix(SPENT)] += seconds
    whole = ended - parts[0][0]["perf/started"]
    spent["lost"] = max(0.0, whole - sum(spent.values()))
    shares = {f"goodput/{name}": seconds / whole for name, seconds in spent.items()}
    return {"goodput/starts": len(parts), "goodput/seconds": whole, **shares}


def _parts(workdir: epath.Path) -> list[list[Row]]:
    """The rows of each start."""
    texts = [path.read_text().splitlines() for path in _part_paths(workdir)]
    parts = [[json.loads(line) for line in lines if line.endswith("}")] for lines in texts]
    return [part for part in parts if part]


def best_steps(rows: list[Row], count: int, name: str = "eval/top1") -> list[int]:
    """The `count` steps with the highest `name`, best first; of equals, the later."""
    scores = {row["step"]: row[name] for row in rows if name in row}
    return sorted(scores, key=lambda step: (scores[step], step), reverse=True)[:count]


def _part_paths(workdir: epath.Path) -> list[epath.Path]:
    folder = workdir / PARTS
    paths = folder.glob("[0-9]*.jsonl") if folder.exists() else []
    return sorted(paths, key=lambda path: int(path.stem))


def _dump(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)

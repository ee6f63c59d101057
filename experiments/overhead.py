"""What does it cost a run that nothing goes wrong with to survive what might?

    python -m experiments.overhead [--steps=1500] [--batch=32] [--out=docs/overhead.txt]

Trains on the digits and sums the time in the hooks themselves: the lock of the workdir, the
watchdog, the checks of numbers, the manifests with their SHA-256, the comparison with them at the
start, the question whether a save has failed. Waiting for the devices' results, the saving itself
and the rows of metrics are no part of it: every run needs them. The check of a state before it is
saved is counted whole, its wait for the devices included.

A share is of the run's whole time.
"""

import contextlib
import functools
import pathlib
import platform
import tempfile
import threading
import time

from absl import app, flags, logging

from configs import demo
from halonet import checkpoint, health, metrics, processes, runtime, train

FLAGS = flags.FLAGS

# What is timed: where it lies, its name, and what it is for.
HOOKS = (
    (runtime.WorkdirLock, "__enter__", "lock of the workdir, taken once"),
    (runtime.WorkdirLock, "check", "lock of the workdir, asked at each step"),
    (runtime.WorkdirLock, "_look", "lock of the workdir, its heartbeat (a thread)"),
    (runtime.WorkdirLock, "_write", "lock of the workdir, its heartbeat (a thread)"),
    (runtime.WorkdirLock, "__exit__", "lock of the workdir, given back"),
    (runtime.Watchdog, "at", "watchdog, told at each step"),
    (runtime.Watchdog, "seconds", "where the time went, with each checkpoint"),
    (metrics, "goodput", "where the time went, at the end"),
    (health.FiniteCheck, "step", "loss and gradient of each step looked at"),
    (health.FiniteCheck, "state", "state looked at before each save"),
    (checkpoint.Checkpointer, "check_errors", "failed saves asked for at each step"),
    (checkpoint, "write_manifest", "SHA-256 of each checkpoint (a thread)"),
    (train, "newest_good_step", "checkpoint compared with its manifest at the start"),
    (processes, "check_alike", "settings compared between processes"),
    (processes, "meet", "processes waited for"),
)


class Times:
    """Seconds and calls of each hook, those in another not counted twice."""

    def __init__(self):
        self.seconds: dict[str, float] = dict.fromkeys([hook[2] for hook in HOOKS], 0.0)
        self.calls: dict[str, int] = dict.fromkeys(self.seconds, 0)
        self._inside = threading.local()

    def timed(self, function, what):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if getattr(self._inside, "hook", False):
                return function(*args, **kwargs)
            self._inside.hook, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[what] += time.perf_counter() - began
                self.calls[what] += 1
                self._inside.hook = False

        return wrapped


@contextlib.contextmanager
def timed_hooks():
    times, originals = Times(), []
    for place, name, what in HOOKS:
        originals.append((place, name, getattr(place, name)))
        setattr(place, name, times.timed(getattr(place, name), what))
    try:
        yield times
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def report(times: Times, summary: dict) -> str:
    """The table, and what it comes to."""
    step = summary["goodput/seconds"] * (summary["goodput/step"] + summary["goodput/data_wait"])
    whole = summary["goodput/seconds"]
    total = sum(times.seconds.values())
    lines = [
        f"{platform.processor() or platform.machine()}, {summary['step']} steps of "
        f"{1000 * step / summary['step']:.0f} ms, {whole:.0f} s in all",
        "",
        f"{'ms':>9} {'calls':>7}",
    ]
    for what, seconds in times.seconds.items():
        if times.calls[what]:
            lines.append(f"{1000 * seconds:9.1f} {times.calls[what]:7,}  {what}")
    return "\n".join([*lines, "", f"{1000 * total:9.1f} ms in all: {total / whole:.2%} of the run"])


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    config = demo.get_config()
    config.train.epochs = 0
    config.train.steps = FLAGS.steps
    config.data.batch_size = FLAGS.batch
    every = max(1, FLAGS.steps // 5)
    config.checkpoint.every_steps = config.eval.every_steps = every
    with tempfile.TemporaryDirectory() as workdir, timed_hooks() as times:
        summary = train.train_and_evaluate(config, pathlib.Path(workdir) / "run")
    text = report(times, summary)
    print(text)
    if FLAGS.out:
        command = f"python -m experiments.overhead --steps={FLAGS.steps} --batch={FLAGS.batch}"
        pathlib.Path(FLAGS.out).write_text(f"{command}\n\n{text}\n")


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 1500, "of the run", lower_bound=5)
    flags.DEFINE_integer("batch", 32, "images a step: choose it for a step of 100 ms")
    flags.DEFINE_string("out", "", "file to write the table to")
    app.run(main)

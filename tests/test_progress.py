"""The live line and its rates."""

import sys
import time

import pytest

from halonet import progress as progress_lib
from halonet.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved: clock[0] += seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def progress(**changes):
    settings = {"total": 100, "start": 0, "images_per_step": 32, **changes}
    return Progress(**settings)


def row(loss=2.0, wait=0.25):
    return {"train/loss": loss, "perf/data_wait": wait}


def rates(images_per_second, data_wait):
    return {
        "perf/images_per_second": pytest.approx(images_per_second),
        "perf/data_wait": pytest.approx(data_wait),
    }


def test_rates(clock):
    watch = progress(start=20)
    clock[0] += 4.0
    assert watch.rates(30, 1.0) == rates(10 * 32 / 4, 1 / 4)
    # The waiting is a sum since the start; the share is of what came since the last call.
    clock[0] += 2.0
    assert watch.rates(31, 2.5) == rates(1 * 32 / 2, 1.5 / 2)


def test_model_flop_utilisation_where_the_peak_is_known(clock, capsys):
    watch = progress(ideal_seconds=1 / 500)
    clock[0] += 4.0
    found = watch.rates(10, 1.0)
    assert found == {**rates(80, 1 / 4), "perf/mfu": pytest.approx(80 / 500)}
    watch.show(10, {**row(), **found})
    assert capsys.readouterr().out.endswith("waiting for data 25%  MFU 16.0%\n")


def test_pause_is_not_training(clock):
    watch = progress()
    clock[0] += 10.0
    watch.pause(6.0)
    assert watch.rates(4, 1.0) == rates(4 * 32 / 4, 1 / 4)
    clock[0] += 1.0
    assert watch.rates(5, 1.0) == rates(32, 0)


def test_plain_lines_come_at_intervals_and_at_the_end(clock, capsys):
    watch = progress(interval=10.0)
    shown = []
    for step in range(1, 101):
        clock[0] += 1.0
        watch.rates(step, 0.0)
        watch.show(step, row())
        if out := capsys.readouterr().out:
            shown.append(step)
            assert out.count("\n") == 1
            assert "\r" not in out
    assert shown == [1, *range(11, 100, 10), 100]


def test_plain_line(clock, capsys):
    watch = progress(images_per_step=128)
    watch.show(0, row())
    line = "step 0/100  loss 2.000  0 images/s  ? left  waiting for data 25%\n"
    assert capsys.readouterr().out == line
    clock[0] += 20.0
    watch.rates(40, 5.0)
    watch.show(40, row(loss=0.12345))
    line = "step 40/100  loss 0.123  256 images/s  0:30 left  waiting for data 25%\n"
    assert capsys.readouterr().out == line


def test_live_line_is_one_line(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    watch = progress(total=3)
    for step in (1, 2, 3):
        clock[0] += 1.0
        watch.rates(step, 0.0)
        watch.show(step, row())
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.endswith("\n")
    lines = out.rstrip("\n").split("\r")
    assert [line[:8] for line in lines] == ["", "step 1/3", "step 2/3", "step 3/3"]
    assert {len(line) for line in lines[1:]} == {39}
    watch.say("a word")
    assert capsys.readouterr().out == "\r" + " " * 39 + "\ra word\n"


def test_said_line_stands_alone(capsys):
    progress().say("a word")
    assert capsys.readouterr().out == "a word\n"


def test_other_processes_print_nothing(clock, capsys):
    watch = progress(enabled=False)
    clock[0] += 1.0
    assert watch.rates(1, 0.0) == rates(32, 0)
    watch.show(100, row())
    watch.say("a word")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (3599.0, "59:59"),
        (3600.0, "1:00:00"),
        (90061.0, "25:01:01"),
        (float("nan"), "?"),
    ],
)
def test_duration(seconds, text):
    assert progress_lib.duration(seconds) == text

"""The record of a run: parts written by its starts, read as one history."""

import json

import clu
import pytest

from halonet.metrics import EVENTS, MetricsLog, best_steps, goodput, read_metrics


class NoEvents:
    """In place of clu's writers, which bring TensorFlow."""

    SummaryWriter = AsyncWriter = lambda self, _: self

    def __init__(self):
        self.scalars = []
        self.closed = 0

    def write_scalars(self, step, scalars):
        self.scalars.append((step, scalars))

    def close(self):
        self.closed += 1


@pytest.fixture
def events(monkeypatch):
    events = NoEvents()
    monkeypatch.setattr(clu, "metric_writers", events, raising=False)
    return events


def loss(value):
    return {"train/loss": value}


def start(step):
    return {"step": step, "perf/started": 1.0}


def start_run(workdir, step, rows):
    log = MetricsLog(workdir, start_step=step)
    for at, value in rows:
        log.write(at, loss(value))
    log.close()
    return log


def losses(rows):
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def test_rows_are_in_the_file_at_once(events, tmp_path):
    log = MetricsLog(tmp_path, start_step=0, began=1.0)
    assert read_metrics(tmp_path) == [start(0)]
    log.write(10, {"train/loss": 2.5, "perf/images_per_second": 100.0})
    row = {"step": 10, "train/loss": 2.5, "perf/images_per_second": 100.0}
    assert read_metrics(tmp_path) == [start(0), row]
    lines = (tmp_path / "metrics" / "000.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [start(0), row]
    log.close()
    log.close()
    assert events.scalars == [(10, {"train/loss": 2.5, "perf/images_per_second": 100.0})]
    assert events.closed == 1


def test_no_run(tmp_path):
    assert read_metrics(tmp_path) == []


def test_parts_are_joined_and_superseded_rows_dropped(events, tmp_path):
    start_run(tmp_path, 0, [(10, 1.0), (20, 2.0), (30, 3.0), (40, 4.0)])
    # The checkpoint was of step 20: what was seen beyond it is seen again, differently here.
    start_run(tmp_path, 20, [(30, 3.5)])
    assert sorted(path.name for path in tmp_path.glob("metrics/*")) == ["000.jsonl", "001.jsonl"]
    assert losses(read_metrics(tmp_path)) == [(10, 1.0), (20, 2.0), (30, 3.5)]
    start_run(tmp_path, 10, [(20, 2.25)])
    assert losses(read_metrics(tmp_path)) == [(10, 1.0), (20, 2.25)]
    start_run(tmp_path, 0, [])
    assert losses(read_metrics(tmp_path)) == []


def test_start_alone_supersedes(events, tmp_path):
    start_run(tmp_path, 0, [(10, 1.0), (20, 2.0)])
    start_run(tmp_path, 10, [])
    assert losses(read_metrics(tmp_path)) == [(10, 1.0)]


def test_until(events, tmp_path):
    start_run(tmp_path, 0, [(10, 1.0), (20, 2.0), (30, 3.0)])
    assert losses(read_metrics(tmp_path, until=20)) == [(10, 1.0), (20, 2.0)]


def test_history_of_a_second_start(events, tmp_path):
    start_run(tmp_path, 0, [(10, 1.0), (20, 2.0), (30, 3.0)])
    log = MetricsLog(tmp_path, start_step=20)
    assert losses(log.rows()) == [(10, 1.0), (20, 2.0)]
    log.write(30, loss(3.5))
    assert losses(log.rows()) == [(10, 1.0), (20, 2.0), (30, 3.5)]
    log.rows().clear()
    assert losses(log.rows()) == [(10, 1.0), (20, 2.0), (30, 3.5)]
    log.close()


def test_torn_last_line_is_ignored(events, tmp_path):
    start_run(tmp_path, 0, [(10, 1.0), (20, 2.0)])
    part = tmp_path / "metrics" / "000.jsonl"
    part.write_text(part.read_text()[:-8])
    assert losses(read_metrics(tmp_path)) == [(10, 1.0)]


def test_part_torn_in_its_first_line_changes_nothing(events, tmp_path):
    start_run(tmp_path, 0, [(10, 1.0)])
    (tmp_path / "metrics" / "001.jsonl").write_text('{"step": 0, "perf/sta')
    assert losses(read_metrics(tmp_path)) == [(10, 1.0)]
    start_run(tmp_path, 10, [(20, 2.0)])
    assert losses(read_metrics(tmp_path)) == [(10, 1.0), (20, 2.0)]


@pytest.mark.parametrize("name", ["loss", "training/loss", "Train/loss", "/train/loss", "train"])
def test_name_outside_the_groups(events, tmp_path, name):
    log = MetricsLog(tmp_path, start_step=0)
    message = f"metric '{name}' must begin with train/, eval/ or perf/"
    with pytest.raises(ValueError, match=message):
        log.write(1, {"eval/top1": 0.5, name: 1.0})
    log.close()
    assert not any("eval/top1" in row for row in [*log.rows(), *read_metrics(tmp_path)])
    assert events.scalars == []


@pytest.mark.parametrize("starts", [[0], [0, 20], [0, 20, 10]])
def test_finished_history_is_what_the_reader_reads(events, tmp_path, starts):
    for step in starts:
        log = start_run(tmp_path, step, [(step + 10, 1.0), (step + 20, 2.0)])
    log.finish()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(tmp_path)


def test_other_processes_write_nothing(events, tmp_path):
    log = MetricsLog(tmp_path, start_step=0, primary=False)
    log.write(10, loss(1.0))
    assert losses(log.rows()) == [(10, 1.0)]
    log.finish()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert events.scalars == []


@pytest.mark.parametrize(
    ("count", "steps"),
    [(0, []), (1, [30]), (2, [30, 20]), (3, [30, 20, 40]), (9, [30, 20, 40, 10])],
)
def test_best_steps(count, steps):
    scores = {10: 0.1, 20: 0.9, 30: 0.9, 40: 0.5}
    rows = [{"step": step, "eval/top1": score} for step, score in scores.items()]
    rows.insert(2, {"step": 25, "train/loss": 0.0})
    assert best_steps(rows, count) == steps
    assert best_steps(rows[::-1], count) == steps


def test_best_steps_by_another_name():
    rows = [{"step": 1, "eval/top5": 0.5, "eval/top1": 1.0}, {"step": 2, "eval/top5": 0.6}]
    assert best_steps(rows, 1, name="eval/top5") == [2]


def test_step_scored_again_counts_once_with_its_last_score():
    rows = [{"step": step, "eval/top1": score} for step, score in ((1, 0.9), (2, 0.5), (1, 0.1))]
    assert best_steps(rows, 3) == [2, 1]


def test_tensorboard_reads_the_events(tmp_path):
    # TensorFlow comes with them.
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    start_run(tmp_path, 0, [(10, 1.5), (20, 2.5)])
    events = event_accumulator.EventAccumulator(str(tmp_path / EVENTS)).Reload()
    assert events.Tags()["tensors"] == ["train/loss"]
    found = [
        (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
        for event in events.Tensors("train/loss")
    ]
    assert found == [(10, 1.5), (20, 2.5)]


def start_of(step, began, *timed):
    """The rows of a start: (step, seconds of steps, seconds of evaluation)."""
    rows = [{"step": step, "perf/started": began}]
    return rows + [
        {"step": at, "perf/seconds_step": a, "perf/seconds_evaluation": b} for at, a, b in timed
    ]


def write_starts(workdir, *starts):
    (workdir / "metrics").mkdir()
    for number, rows in enumerate(starts):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (workdir / "metrics" / f"{number:03}.jsonl").write_text(text)


def test_where_the_time_of_a_run_went(tmp_path):
    write_starts(
        tmp_path,
        # Of the first start what came after step 20 was lost, and 30 s in which nothing ran.
        start_of(0, 1e9, (10, 10.0, 2.0), (20, 20.0, 4.0), (30, 30.0, 6.0)),
        start_of(20, 1e9 + 66, (40, 25.0, 5.0)),
    )
    assert goodput(tmp_path, 1e9 + 100) == {
        "goodput/starts": 2,
        "goodput/seconds": 100.0,
        "goodput/step": pytest.approx(0.45),
        "goodput/evaluation": pytest.approx(0.09),
        "goodput/lost": pytest.approx(0.46),
    }


def test_a_start_that_saved_nothing_is_lost(tmp_path):
    write_starts(tmp_path, start_of(0, 1e9), start_of(0, 1e9 + 50, (5, 25.0, 15.0)))
    found = goodput(tmp_path, 1e9 + 100)
    assert (found["goodput/step"], found["goodput/lost"]) == (0.25, 0.6)


def test_what_two_later_starts_took_again_is_lost(tmp_path):
    whole = [(step, float(step), 0.0) for step in (50, 100, 150, 200)]
    write_starts(
        tmp_path,
        start_of(0, 1e9, *whole),
        start_of(100, 1e9 + 200, (150, 50.0, 0.0)),
        start_of(50, 1e9 + 250, (200, 150.0, 0.0)),
    )
    assert goodput(tmp_path, 1e9 + 400)["goodput/step"] == 0.5


def test_starts_of_older_versions_have_no_time(tmp_path):
    write_starts(tmp_path, start_of(0, 1.0), start_of(7, 1e9, (9, 5.0, 5.0)))
    assert goodput(tmp_path, 1e9 + 10)["goodput/seconds"] == 10

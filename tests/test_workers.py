"""Batches made by other processes: the bytes of one process, clear ends, and nobody left behind."""

import functools
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from halonet.data import augment, pipeline, views, workers
from halonet.data.errors import DataError
from halonet.data.randaugment import RandAugment
from tests.test_pipeline import Broken, Numbered, assert_same, noisy

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES, BATCH, STEPS = 13, 8, 5  # three epochs end within them

IN_A_WORKER = "RUNS_IN_A_WORKER"  # an augmentation that would end the test itself looks for it


class Photographs:
    """JPEGs of noise around a colour, of odd sizes."""

    name, split, classes, fingerprint = "photographs", "train", tuple("abc"), {}

    def __init__(self):
        stream = np.random.default_rng(0)
        self.files = []
        for index in range(EXAMPLES):
            shape = (40 + 7 * (index % 5), 50 + 5 * (index % 7), 3)
            pixels = stream.integers(0, 100, shape) + 10 * index
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
            self.files.append(file.getvalue())

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        return {"image": self.files[index], "label": index % 3}

    def where(self, index):
        return f"photograph {index}"


# All that is random of the ImageNet recipes.
VIEW = views.RandomView(
    views.CenterView(32),
    min_area=0.08,
    flip=0.5,
    rand_augment=RandAugment.parse("rand-m9-n2-mstd0.5-inc1"),
    erasing=functools.partial(
        augment.random_erasing, probability=0.5, mean=(0.5,) * 3, std=(0.2,) * 3
    ),
)


def take(steps, source, *, batch_size=BATCH, seed=7, **kwargs):
    batches = pipeline.train_batches(source, batch_size=batch_size, seed=seed, **kwargs)
    taken = [next(batches) for _ in range(steps)]
    batches.close()
    return taken


def descendants(pid):
    """All living processes below one."""
    parents = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # ended meanwhile
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found = {pid}
    for _ in range(4):
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


def wait_until_gone(pids, seconds=5):
    end = time.monotonic() + seconds
    while left := {pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()}:
        assert time.monotonic() < end, f"{left} are still there"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def photographs():
    return Photographs()


@pytest.fixture(scope="module")
def undisturbed(photographs):
    return take(STEPS, photographs, augment=VIEW, repeats=2)


@pytest.mark.parametrize(
    ("process_count", "count", "threads", "start_step"),
    [
        (2, 3, 1, 2),
        pytest.param(1, 2, 3, 0, marks=pytest.mark.middle),
        pytest.param(1, 1, 1, 0, marks=pytest.mark.middle),
        pytest.param(4, 2, 1, 0, marks=pytest.mark.middle),
        pytest.param(1, 3, 0, 2, marks=pytest.mark.middle),
        pytest.param(2, 2, 2, 3, marks=pytest.mark.middle),
    ],
)
def test_bytes_are_those_of_one_process(
    photographs, undisturbed, process_count, count, threads, start_step
):
    shares = [
        take(
            STEPS - start_step,
            photographs,
            augment=VIEW,
            repeats=2,
            start_step=start_step,
            process_index=index,
            process_count=process_count,
            workers=count,
            threads=threads,
        )
        for index in range(process_count)
    ]
    together = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_same(together, undisturbed[start_step:])


@pytest.mark.middle
def test_the_comparison_can_fail(photographs, undisturbed):
    other = take(STEPS, photographs, augment=VIEW, repeats=2, seed=8, workers=2)
    with pytest.raises(AssertionError):
        assert_same(other, undisturbed)


@pytest.mark.parametrize("count", [3, pytest.param(9, marks=pytest.mark.middle)])
def test_evaluation_is_that_of_one_process(photographs, count):
    view = views.CenterView(32)
    expected = list(pipeline.eval_batches(photographs, batch_size=4, view=view))
    batches = pipeline.eval_batches(photographs, batch_size=4, view=view, workers=count)
    assert_same(list(batches), expected)
    assert list(batches) == []


@pytest.mark.middle
def test_arrays_are_handed_over_for_good():
    batches = take(12, Numbered(), augment=noisy, workers=2)
    before = [batch["image"].copy() for batch in batches]
    for index, batch in enumerate(batches):
        assert batch["image"].flags.writeable
        assert batch["image"].ctypes.data % 64 == 0
        batch["image"][:] = index
    for index, (batch, image) in enumerate(zip(batches, before, strict=True)):
        assert (batch["image"] == index).all()
        assert (image != index).any()


@pytest.mark.middle
def test_files_and_memory_are_given_back():
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    batches = pipeline.train_batches(Numbered(), batch_size=BATCH, seed=0, workers=2)
    next(batches)
    during = open_files()
    for _ in range(30):
        next(batches)
    assert open_files() <= during
    batches.close()
    assert open_files() == before


def without_jax(image, rng):
    return np.full_like(image, "jax" in sys.modules)


def test_workers_do_not_import_jax():
    for batch in take(2, Numbered(), augment=without_jax, workers=1):
        assert not batch["image"].any()
    assert take(1, Numbered(), augment=without_jax)[0]["image"].all()  # as this process does


def test_an_error_of_the_data_comes_in_its_turn():
    batches = pipeline.eval_batches(Broken(), batch_size=BATCH, workers=2)
    assert [next(batches)["label"][0] for _ in range(2)] == [0, 8]
    with pytest.raises(DataError, match=r"^example 20 is spoilt$"):
        next(batches)
    assert list(batches) == []


def misplaced(image, rng):
    return image[:, :, {}]


def test_another_error_is_one_line():
    with pytest.raises(DataError) as caught:
        take(1, Numbered(), augment=misplaced, workers=2)
    text = str(caught.value)
    assert re.fullmatch(
        r"worker process 0 of 2 failed: IndexError: .* \(test_workers.py:\d+\); "
        r"data.workers=0 shows where",
        text,
    )


def ends(image, rng, how):
    assert os.environ.get(IN_A_WORKER)
    if how >= 0:
        os._exit(how)
    os.kill(os.getpid(), -how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        pytest.param(0, "ended with code 0", marks=pytest.mark.middle),
        (-signal.SIGKILL, r"was killed \(SIGKILL\), as Linux does when memory runs out"),
        pytest.param(3, "ended with code 3", marks=pytest.mark.middle),
        pytest.param(-signal.SIGSEGV, "was ended by SIGSEGV", marks=pytest.mark.middle),
    ],
)
def test_the_death_of_a_worker_is_told(monkeypatch, how, message):
    monkeypatch.setenv(IN_A_WORKER, "yes")
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"^data.workers=2: .* lost one: worker \d {message}"):
        take(9, Numbered(), augment=functools.partial(ends, how=how), workers=2)
    assert time.monotonic() - began < 20


@pytest.mark.middle
def test_a_death_is_told_before_its_turn():
    batches = pipeline.train_batches(Numbered(), batch_size=BATCH, seed=0, workers=4)
    next(batches)
    os.kill(max(descendants(os.getpid())), signal.SIGKILL)
    slowly = (next(batches) for _ in range(100) if not time.sleep(0.05))
    with pytest.raises(DataError, match="lost one"):
        list(slowly)


def fails_where_there_is_no_room(image, rng):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # bytes: of files in memory too
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return image


def fails_at_length(image, rng):
    raise DataError("\N{SNOWMAN}" * 50_000)


def exits(image, rng):
    sys.exit("of its own will")


@pytest.mark.parametrize(
    ("augment", "message", "printed"),
    [
        (fails_where_there_is_no_room, r"^worker process 0 of 1 failed: OSError: .*large", ""),
        (fails_at_length, r"^\N{SNOWMAN}{4000} \.\.\.$", ""),
        (exits, "lost one: worker 0 ended with code 1$", "SystemExit: of its own will"),
    ],
)
def test_a_failure_is_never_swallowed(capfd, augment, message, printed):
    with pytest.raises(DataError, match=message):
        take(1, Numbered(), augment=augment, workers=1)
    assert printed in capfd.readouterr().err


def test_workers_import_what_the_trainer_imported(tmp_path, monkeypatch):
    (tmp_path / "halonet").mkdir()
    (tmp_path / "halonet" / "__init__.py").write_text("raise ImportError('another halonet')")
    monkeypatch.chdir(tmp_path)
    take(1, Numbered(), workers=1)


@pytest.mark.parametrize(
    "leave",
    [
        "fail",
        *(pytest.param(way, marks=pytest.mark.middle) for way in ("close", "drop", "exhaust")),
    ],
)
def test_leaving_ends_the_workers(leave):
    others = descendants(os.getpid())
    if leave in ("exhaust", "fail"):
        source = Broken() if leave == "fail" else Numbered()
        batches = pipeline.eval_batches(source, batch_size=BATCH, workers=3)
    else:
        batches = pipeline.train_batches(Numbered(), batch_size=BATCH, seed=0, workers=3)
    next(batches)
    ours = descendants(os.getpid()) - others
    # With the nursery. The worker that fails may have ended before it is counted.
    assert len(ours) in ((3, 4) if leave == "fail" else (4,))
    if leave == "close":
        batches.close()
        batches.close()
        assert list(batches) == []
    elif leave == "drop":
        del batches
    elif leave == "exhaust":
        assert len(list(batches)) == 4
    else:
        with pytest.raises(DataError):
            list(batches)
    wait_until_gone(ours)


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(ValueError, match=r"^workers=1 need what they make pickled: .*lambda"):
        take(1, Numbered(), augment=lambda image, rng: image, workers=1)


def test_other_systems_are_told(monkeypatch):
    monkeypatch.setattr(workers, "AVAILABLE", False)
    with pytest.raises(NotImplementedError, match=r"^workers=2 needs Linux; 0 makes"):
        take(1, Numbered(), workers=2)


PROGRAM = """
import os, signal, sys, time
from halonet.data import pipeline, sources
source = sources.open_source("fake:1000:10", "train", image_size=32)
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
signal.signal(signal.SIGINT, lambda *_: heard.append("SIGINT"))
batches = pipeline.train_batches(source, batch_size=16, seed=0, workers=2)
print(next(batches)["image"].shape, flush=True)
sys.stdin.readline()
for _ in range(30):
    next(batches)
print(*sorted(heard), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def program():
    with subprocess.Popen(
        [sys.executable, "-W", "always::ResourceWarning", "-c", PROGRAM],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "(16, 32, 32, 3)\n"
        yield process
        process.kill()


def test_a_signal_to_all_is_the_trainers_affair(program):
    below = descendants(program.pid)
    assert len(below) == 3
    os.killpg(program.pid, signal.SIGTERM)
    os.killpg(program.pid, signal.SIGINT)
    time.sleep(0.2)
    program.stdin.write("\n")
    program.stdin.flush()
    assert program.stdout.readline() == "SIGINT SIGTERM\n"
    # And it ends without a word, though nobody closed anything.
    out, errors = program.communicate("\n", timeout=20)
    assert (out, errors, program.returncode) == ("", "", 0)
    wait_until_gone(below)


def test_a_killed_trainer_leaves_nobody_behind(program):
    below = descendants(program.pid)
    assert len(below) == 3
    program.kill()
    program.wait()
    wait_until_gone(below)

"""The memory of a trainer does not grow: not with its steps, not with its checkpoints."""

import itertools
import os
import statistics
import time

import pytest

from halonet import checkpoint
from tests.system.launch import Start

# The state of the run has 1.7 MB (103,850 parameters, their average and two moments), and less than
# one of them may stay behind at a save. Orbax, TensorStore and the allocator keep some: 0.5 to 0.9
# MB were seen, and now and then 10 to 20 at once, 45 in all, where a machine has much to do. A leak
# of ten states, 17 MB a save, has to be noticed.
EACH, IN_ALL = 1.7, 100  # MB, the median of what a save adds, and all that 20 of them do

LEAKS = """
import main
from absl import app
from halonet.checkpoint import Checkpointer
import jax, numpy

kept, save = [], Checkpointer.save
def keeping(self, step, state, meta):
    kept.extend(jax.tree.map(numpy.array, state) for _ in range(10))
    save(self, step, state, meta)
Checkpointer.save = keeping
app.run(main.main, flags_parser=main.parse_flags)
"""


def resident(pid):
    """MB of a process that are in memory."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(workdir, *, steps, saves, program=("main.py",)):
    """MB that the trainer's memory grows by at a save (the median), and by all, the first 10 apart.

    Of each checkpoint it is the least until the next: a save under way holds what it gives back.
    """
    settings = {
        "train.steps": steps,
        "checkpoint.every_steps": steps // saves,
        "checkpoint.keep_best": 0,
        "eval.every_steps": steps,
        "log.every_steps": 10,
    }
    seen = {}
    with Start(workdir, count=1, devices=1, program=program, **settings) as start:
        while start.running():
            for step in checkpoint.saved_steps(workdir)[-1:]:
                if step < steps:
                    seen.setdefault(step, []).append(resident(start.processes[0].pid))
            time.sleep(0.02)
        assert start.wait() == [0], start.said()
    found = [min(filter(None, seen[step])) for step in sorted(seen)]
    assert len(found) > 0.8 * saves
    found = found[10:]
    each = statistics.median(later - earlier for earlier, later in itertools.pairwise(found))
    print(
        f"{len(found)} checkpoints: {each:.2f} MB each, {found[-1] - found[0]:.1f} in all: {found}"
    )
    return each, found[-1] - found[0]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("steps", "saves"),
    [
        pytest.param(300, 30, marks=pytest.mark.middle),
        pytest.param(2000, 60, marks=pytest.mark.long),
    ],
)
def test_memory_does_not_grow(tmp_path, steps, saves):
    each, in_all = growth(tmp_path / "run", steps=steps, saves=saves)
    assert each < EACH
    assert in_all < IN_ALL


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_leak_would_be_seen(tmp_path):
    program = ("-c", LEAKS)
    each, in_all = growth(tmp_path / "run", steps=300, saves=30, program=program)
    assert each > EACH
    assert in_all > IN_ALL

"""What the compiler for absent TPUs says of programs and of slices. None is compiled here."""

import dataclasses
import importlib.util

import pytest

from halonet import aot
from tests.test_hlo import TILED, operations


def test_sums_of_a_program():
    found = operations()
    found["halo.2"] = dataclasses.replace(found["halo.2"], cycles=1234)
    program = aot.Program(None, aot.CHIPS["v5e"], tuple(found.values()))
    assert program.xla_cycles == 5 + 11 * 70
    assert program.kernel_cycles == 1234
    assert program.collectives == {"all-reduce": (1, 80)}
    clock = 197e12 / (4 * 2 * 128 * 128)
    assert aot.CHIPS["v5e"].gigahertz == pytest.approx(clock / 1e9)
    # The loop waits for memory: 819 GB/s.
    in_loop = 11 * 2 * TILED / 819e9 * clock
    assert program.roofline_cycles(operations()["fusion.1"]) == pytest.approx(max(in_loop, 770))


def test_unknown_topologies_are_refused():
    with pytest.raises(ValueError, match=r"'v9:2x2' is none that is known; there are v2: 2x2 4x4"):
        aot.topology("v9:2x2")


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"`pip install -e \.\[tpu-aot\]` installs it"):
        aot.topology.__wrapped__("v5e:2x2")

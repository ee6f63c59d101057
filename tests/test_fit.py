"""Which batch fits, against a compiler that only adds up."""

import threading

import pytest

from halonet.fit import Trial, bytes_said, compile_sizes, largest, smaller

FIXED, EACH = 100, 10


class Compiler:
    """Programs of 100 bytes and ten an image; refuses what is above the limit."""

    def __init__(self, limit):
        self.limit, self.asked, self.at_once, self.lock = limit, [], 0, threading.Lock()

    def __call__(self, images):
        self.asked.append(images)

        def compile_it():
            needed = FIXED + EACH * images
            return Trial(images, needed, needed <= self.limit)

        return compile_it


@pytest.mark.parametrize(
    ("limit", "asked", "most"),
    [
        (10_000, {64, 32}, 960),  # multiples of 32 up to 990
        (740, {64, 32}, 64),
        (739, {64, 32}, 32),  # and no whole group lies between
        (300, {64, 32, 16}, 16),  # below one group there is no line
        (110, {64, 32, 16, 8, 4, 2, 1}, 1),
        (109, {64, 32, 16, 8, 4, 2, 1}, 0),
    ],
)
def test_sizes_are_compiled_until_two_fit_or_none_is_left(limit, asked, most):
    compiler = Compiler(limit)
    trials = compile_sizes(compiler, 64, 32, limit)
    assert set(compiler.asked) == asked
    assert [trial.images for trial in trials] == sorted(asked)
    assert largest(trials, 32, limit) == most


@pytest.mark.parametrize(("limit", "most"), [(10_000, 960), (739, 32)])
def test_of_one_group_the_double_is_compiled_too(limit, most):
    compiler = Compiler(limit)
    trials = compile_sizes(compiler, 32, 32, limit)
    assert set(compiler.asked) == {32, 64}
    assert largest(trials, 32, limit) == most


def test_where_nothing_fits_each_size_is_asked_once():
    compiler = Compiler(limit=0)
    trials = compile_sizes(compiler, 16, 1, compiler.limit)
    assert sorted(compiler.asked) == [1, 2, 4, 8, 16]
    assert largest(trials, 1, compiler.limit) == 0


def test_far_below_what_is_refused_two_sizes_make_a_line():
    compiler = Compiler(FIXED + 300 * EACH)
    trials = compile_sizes(compiler, 512, 32, compiler.limit)
    assert sorted(compiler.asked) == [64, 128, 512]  # 256 would hardly fit and takes long
    assert largest(trials, 32, compiler.limit) == 288


def test_what_was_refused_bounds_the_line():
    """Where a compiler saves memory before it gives up, a line through small sizes is too steep."""
    trials = [Trial(8, 180, True), Trial(16, 260, True), Trial(64, 0, False)]
    assert largest(trials, 8, 10_000) == 56
    assert largest(trials, 8, 250) == 16  # it fits whatever the line says
    assert largest(trials[:2], 8, 340) == 24


@pytest.mark.parametrize(
    ("images", "unit", "less"), [(64, 32, 32), (96, 32, 32), (32, 32, 16), (48, 16, 16), (1, 1, 1)]
)
def test_smaller_sizes_are_of_whole_groups(images, unit, less):
    assert smaller(images, unit) == less


def test_an_error_of_the_compiler_is_not_swallowed():
    def compiling(images):
        def fail():
            raise RuntimeError("Mosaic failed")

        return fail

    with pytest.raises(RuntimeError, match="Mosaic failed"):
        compile_sizes(compiling, 8, 8, 100)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (26.51G) exceeds available HBM (15.75G).",
            26.51 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: used 512.0M of it", 512 * 2**20),
        ("RESOURCE_EXHAUSTED", 0),
    ],
)
def test_sizes_in_messages(message, size):
    assert bytes_said(message) == size

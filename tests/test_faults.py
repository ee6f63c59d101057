"""The table of faults names tests that exist, for every fault."""

import ast
import functools
import re

import pytest

from tests.test_layering import ROOT

TABLE = (ROOT / "docs" / "faults.md").read_text()
FAULTS = 57
NOT_YET = "does not apply"


def rows(table):
    """(number, what goes wrong, what happens, names of tests) of each row."""
    found = []
    for line in table.splitlines():
        if re.match(r"\| \d", line):
            number, wrong, does, tests = (cell.strip() for cell in line.split("|")[1:-1])
            found.append((int(number), wrong, does, re.findall(r"`([^`]+)`", tests)))
    return found


@functools.cache
def functions_of(path):
    """The test functions of a file, which are collected."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def missing(names):
    """Those of "path::name" that are no test."""
    found = []
    for name in names:
        path, _, test = name.partition("::")
        collected = re.fullmatch(r"tests/(\w+/)*test_\w+\.py", path) and test.startswith("test_")
        if not (collected and (ROOT / path).exists() and test in functions_of(path)):
            found.append(name)
    return found


def test_every_fault_is_there_once():
    assert [number for number, *_ in rows(TABLE)] == [*range(1, FAULTS + 1)]


@pytest.mark.parametrize("row", rows(TABLE), ids=lambda row: row[0])
def test_every_fault_has_tests_that_exist(row):
    _, wrong, does, names = row
    assert wrong
    assert missing(names) == []
    assert bool(names) != does.startswith(NOT_YET)


def test_a_test_that_does_not_exist_is_noticed():
    names = [
        "tests/test_faults.py::test_every_fault_is_there_once",
        "tests/test_faults.py::test_nothing",
        "tests/test_faults.py::missing",
        "tests/no_test.py::test_it",
        "tests/test_nowhere.py::test_it",
    ]
    assert missing(names) == names[1:]


def test_a_row_is_read():
    assert rows("| # | what |\n|---|---|\n| 7 | a | b | `t.py::x`, `u.py::y` |\n") == [
        (7, "a", "b", ["t.py::x", "u.py::y"])
    ]

"""Collects nothing where the peers are not installed; `make parity` has an environment with them.

Prints a table of the differences at the end, and with --record keeps it in docs/parity.txt,
unless tests were left out or failed.
"""

import importlib.metadata
import importlib.util
import pathlib

import pytest

if importlib.util.find_spec("timm") is None:
    collect_ignore_glob = ["test_*.py"]

FILE = pathlib.Path(__file__).parent.parent.parent / "docs" / "parity.txt"
ROWS = []


@pytest.fixture
def table():
    """Rows to append to: name, height, width, parameters, and the four differences."""
    return ROWS


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not ROWS:
        return
    header = ("model", "image", "parameters", "float64", "gradient", "float32", "timm's float32")
    lines = ["{:<22} {:>9} {:>11} {:>9} {:>9} {:>9} {:>14}".format(*header)]
    for name, height, width, parameters, *errors in ROWS:
        size = f"{height}x{width}"
        numbers = " ".join(f"{error:9.1e}" for error in errors[:3])
        lines.append(f"{name:<22} {size:>9} {parameters:>11,} {numbers} {errors[3]:>14.1e}")
    text = "\n".join(lines) + "\n"
    terminalreporter.write("\n" + text)
    # -k, -m, --lf and --deselect leave out rows, as a failure does.
    whole = exitstatus == 0 and "deselected" not in terminalreporter.stats
    if config.getoption("--record") and whole:
        packages = ("jax", "timm", "torch")
        versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
        FILE.write_text(INTRODUCTION.format(", ".join(versions)) + text)


INTRODUCTION = """\
Our models against timm's, with the same random weights and random batch statistics: the largest
difference as a fraction of the largest value. float64: logits of both in float64. gradient: of a
random functional of the logits in the image, both in float64. float32: our logits in float32, and
timm's own in float32, against timm's in float64. Command: make parity
{}

"""

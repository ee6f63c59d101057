"""The record of `make long` is of the tests as they stand, and all of them passed."""

import collections
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.middle
def test_the_long_tier_was_run_and_passed():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "long", "tests"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    nodes = [line for line in listed.splitlines() if "::" in line]
    expected = collections.Counter(node.split("[")[0] for node in nodes)
    record = json.loads((ROOT / "tests" / "records" / "long.json").read_text())
    # A test that was added, or cases that changed in number, need `make long` again.
    assert record["tests"] == {name: {"passed": count} for name, count in expected.items()}

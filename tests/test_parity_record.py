"""The record of `make parity` is of its tests as they stand, its table of our models."""

import ast
import json
import pathlib

from halonet.models import VARIANTS

ROOT = pathlib.Path(__file__).parent.parent


def test_the_parity_tests_were_run_and_passed():
    expected = set()
    # Read, not collected: timm and PyTorch are not installed here.
    for path in sorted((ROOT / "tests" / "parity").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                expected.add(f"{path.relative_to(ROOT).as_posix()}::{node.name}")
    record = json.loads((ROOT / "tests" / "records" / "parity.json").read_text())
    # A test that was added needs `make parity` again.
    assert set(record["tests"]) == expected
    assert all(list(outcomes) == ["passed"] for outcomes in record["tests"].values())


def test_the_table_has_every_model_of_timm():
    rows = [line.split() for line in (ROOT / "docs" / "parity.txt").read_text().splitlines()]
    listed = {(row[0], row[2]) for row in rows if len(row) == 7 and row[0] in VARIANTS}
    models = {name: variant for name, variant in VARIANTS.items() if variant.origin == "timm"}
    assert listed == {(name, f"{variant.params:,}") for name, variant in models.items()}

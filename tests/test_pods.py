"""Every command and every line of docs/pods.md is real, as far as no hardware is needed."""

import pathlib
import re
import runpy
import subprocess

import numpy as np
import pytest

from tests import command_lines
from tests.test_golden_run import GOLDEN, STEP, registered  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "pods.md").read_text()
BLOCKS = command_lines.blocks(PAGE)
COMMANDS = [
    command
    for block in BLOCKS
    if not block.hardware and not block.language
    for command in command_lines.lines_of(block)
]
PYTHON = [block.text for block in BLOCKS if block.language == "python"]
# ml_collections loads config files by an older way of importlib.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda it: it[:60])
def test_a_command_does_what_it_says(command, monkeypatch, tmp_path):
    files = [text for text in PYTHON if "from launch import Run" in text]
    for name, text in zip(("runs.py", "slurm_runs.py"), files, strict=True):
        (tmp_path / name).write_text(text)
    command_lines.read(command, monkeypatch, tmp_path)
    if " render " in command:
        (path,) = (tmp_path / "rendered").iterdir()
        # The next block of the page launches it.
        assert f"rendered/{path.name}\n" in PAGE
    elif not command.startswith(("python ", "make ")):
        assert command in (
            "git clone REPOSITORY halonet && cd halonet",
            "source .venv/bin/activate",
        )


def test_what_needs_hardware_is_bash_at_least():
    marked = [block.text for block in BLOCKS if block.hardware]
    assert len(marked) > 5
    for text in marked:
        assert not re.search(r"^python ", text, re.M)
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    for path in re.findall(r"--file=(\S+)", "".join(marked)):
        assert (ROOT / path).is_file()


def test_python_runs(registered, tmp_path, capsys):  # noqa: F811
    """On a run of this repository."""
    texts = [text for text in PYTHON if "gs://RUNS/h4" in text and "Run(" not in text]
    assert len(texts) == 2
    for text in texts:
        path = tmp_path / "block.py"
        path.write_text(text.replace("gs://RUNS/h4", str(GOLDEN)))
        found = runpy.run_path(str(path), {"images": np.zeros((2, 32, 32, 3), np.uint8)})
    assert found["probabilities"].shape == (2, len(found["run"].classes))
    assert found["run"].step == STEP
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_the_lines_of_the_last_table_are_ours():
    table = PAGE.partition("# 12. ")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `(.*?)`", table, re.M)
    assert len(lines) > 7
    for line in lines:
        assert command_lines.not_in_sources(line) == []

"""Every command and every line of docs/pods.md is real, as far as no hardware is needed."""

import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import halonet
import main
from halonet.config import check_values, parse_flags
from halonet.data import __main__ as data_main
from launch import __main__ as launch_main
from tests.test_golden_run import GOLDEN, STEP, registered  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "pods.md").read_text()
BLOCKS = re.findall(r"(<!-- needs hardware -->\n)?^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.M)
COMMANDS = [
    command
    for marked, language, text in BLOCKS
    if not marked and not language
    for command in text.replace("\\\n", " ").splitlines()
]
PYTHON = [text for _, language, text in BLOCKS if language == "python"]
# ml_collections loads config files by an older way of importlib.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


def parsed_by_main(arguments, monkeypatch):
    """main.py's flags, read as it reads them, and its configuration checked."""
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])  # overrides are looked for there
    with flagsaver.flagsaver():
        parse_flags(sys.argv)
        check_values(main.FLAGS.config)
        flags.FLAGS.unparse_flags()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda it: " ".join(it.split())[:60])
def test_a_command_does_what_it_says(command, monkeypatch, tmp_path):
    words = shlex.split(command)
    if words[:2] == ["python", "main.py"]:
        parsed_by_main(words[2:], monkeypatch)
    elif words[:4] == ["python", "-m", "halonet.data", "prepare"]:
        monkeypatch.setattr(data_main.prepare, "prepare", lambda *_, **__: ("", {}))
        assert data_main.main(words[3:]) == 0
    elif words[:3] == ["python", "-m", "halonet.data"]:
        monkeypatch.setattr(data_main, "_look", lambda *_: [])
        monkeypatch.setattr(sys, "argv", ["check", *words[4:]])
        assert data_main.main(words[3:]) == 0
    elif words[:4] == ["python", "-m", "launch", "rehearse"]:
        started = []
        monkeypatch.setattr(launch_main.Rehearsal, "run", lambda it: started.append(it) or 0)
        assert launch_main.main(words[3:]) == 0
        assert len(started) == 1
        parsed_by_main(words[words.index("--") + 1 :], monkeypatch)
    elif words[:4] == ["python", "-m", "launch", "render"]:
        out = words.index("--out=rendered")
        words[out] = f"--out={tmp_path / 'rendered'}"
        files = [text for text in PYTHON if "from launch import Run" in text]
        for name, text in zip(("runs.py", "slurm_runs.py"), files, strict=True):
            (tmp_path / name).write_text(text)
        words = [it.replace("--runs=", f"--runs={tmp_path}/") for it in words]
        assert launch_main.main(words[3:]) == 0
        (path,) = (tmp_path / "rendered").iterdir()
        # The next block of the page launches it.
        assert f"rendered/{path.name}\n" in PAGE
    elif words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        assert command in (
            "git clone REPOSITORY halonet && cd halonet",
            "source .venv/bin/activate",
        )


def test_what_needs_hardware_is_bash_at_least():
    marked = [text for marked, _, text in BLOCKS if marked]
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
    sources = "".join(path.read_text() for path in (ROOT / "halonet").rglob("*.py"))
    sources = re.sub(r"\"\s*\n\s*f?\"", "", sources)  # a text over several lines
    table = PAGE.partition("# 12. ")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `(.*?)`", table, re.M)
    assert len(lines) > 7
    for line in lines:
        parts = re.split(r"\.\.\.|\d+|'\w+'|gs://|data\.batch_size|[();]", line)
        parts = [part.strip() for part in parts if len(part.strip()) > 5]
        assert parts
        assert [part for part in parts if part not in sources] == []


def test_the_keys_and_files_that_it_names_are_there():
    from configs import default
    from halonet.config import flatten

    keys, names = flatten(default.get_config()), set(re.findall(r"`([^`\n]+)`", PAGE))
    groups = "|".join({key.partition(".")[0] for key in keys} - {"seed", "train", "eval"})
    for name in names:
        key = name.removeprefix("--config.").partition("=")[0]
        if re.fullmatch(rf"({groups})\.[a-z_]+", key):
            assert key in keys
        if name.startswith("tests/"):
            assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE):
        assert (ROOT / "docs" / name).exists(), name
    assert halonet.load_run.__name__ in PAGE

"""Commands as documents hold them: found in a page, and their flags read by their programs.

Nothing is run here: a program's own parser reads the flags, and what would follow is left out.
"""

import argparse
import dataclasses
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import absl.app
from absl import flags
from absl.testing import flagsaver

import main
from experiments import __main__ as sweeps_main
from halonet.config import check_values, parse_flags
from halonet.data import __main__ as data_main
from halonet.models import __main__ as models_main
from launch import __main__ as launch_main

ROOT = pathlib.Path(__file__).parent.parent
FENCE = re.compile(r"(<!-- needs hardware -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What a word in code must begin with to be a command.
PROGRAM = re.compile(r"(python|make|bash|source|tensorboard|pip|uv|git|docker|curl) [^ ]")


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    language: str
    text: str
    hardware: bool


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page; those without a language hold commands and nothing else."""
    return [Block(language, text, bool(marked)) for marked, language, text in FENCE.findall(page)]


def lines_of(block: Block) -> list[str]:
    """The commands of a block, one a line."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"  +# .*", "", line).split()) for line in lines if line.strip()]


def inline(page: str) -> list[str]:
    """What stands in backticks between the blocks, on one line."""
    return [" ".join(it.split()) for it in re.findall(r"`([^`]+)`", FENCE.sub("", page))]


def commands(*pages: str) -> list[str]:
    """The commands of pages that are not marked as needing hardware, each once.

    The name of a program alone (`python -m launch render`) is none where a command begins with it.
    """
    found = []
    for page in pages:
        for block in blocks(page):
            if not block.hardware and not block.language:
                found += lines_of(block)
        found += [it for it in inline(page) if PROGRAM.match(it)]
    names = {it for it in found if re.fullmatch(r"python (-m )?[\w. ]+", it)}
    names = {it for it in names if any(other.startswith(f"{it} ") for other in found)}
    return [it for it in dict.fromkeys(found) if it not in names]


def read_by_main(arguments, monkeypatch):
    """main.py's flags, read as it reads them, and its configuration checked."""
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])  # overrides are looked for there
    with flagsaver.flagsaver():
        parse_flags(sys.argv)
        check_values(main.FLAGS.config)
        flags.FLAGS.unparse_flags()


class Read(BaseException):  # nothing that a program catches
    """A program has read its flags."""


def read_by_script(path, arguments, monkeypatch):
    """The flags of a script of this repository, which is started and goes no further.

    Returns:
      What is left of the arguments.
    """
    source = (ROOT / path).read_text()
    if not arguments or not re.search(r"^(import|from) (argparse|absl)", source, re.MULTILINE):
        return arguments
    parse, left = argparse.ArgumentParser.parse_args, []

    def parse_args(parser, *given, **kwargs):
        parse(parser, *given, **kwargs)
        raise Read

    def run(_, flags_parser=flags.FLAGS):
        left.extend(flags_parser(sys.argv)[1:])
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(absl.app, "run", run)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    # Of this process the flags of all that tests import; a script defines its own.
    for name in ("__flags", "__flags_by_module", "__flags_by_module_id", "__key_flags_by_module"):
        monkeypatch.setitem(flags.FLAGS.__dict__, name, {})
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    except Read:
        return left
    finally:
        flags.FLAGS.unparse_flags()
        flags.FLAGS.set_gnu_getopt(False)
    raise AssertionError(f"{path} has not read its flags")


def read(command, monkeypatch, folder):
    """Has a command's flags read by its program; `folder` is where it finds runs.py.

    Raises:
      AssertionError, SystemExit: for a command that the program refuses.
    """
    words = shlex.split(command)
    if words[:2] == ["python", "main.py"]:
        read_by_main(words[2:], monkeypatch)
    elif words[:3] == ["python", "-m", "halonet.data"]:
        monkeypatch.setattr(data_main.prepare, "prepare", lambda *_, **__: ("", {}))
        monkeypatch.setattr(data_main, "_look", lambda *_: [])
        monkeypatch.setattr(sys, "argv", ["check", *words[4:]])
        assert data_main.main(words[3:]) == 0
    elif words[:3] == ["python", "-m", "halonet.models"]:
        for name in ("model_table", "model_card", "_draw"):
            monkeypatch.setattr(models_main, name, lambda *_: "")
        assert models_main.main(words[3:]) == 0
    elif words[:3] == ["python", "-m", "halonet.models.convert"]:
        left = read_by_script("halonet/models/convert/__main__.py", words[3:], monkeypatch)
        assert len(left) == 2
    elif words[:4] == ["python", "-m", "launch", "rehearse"]:
        started = []
        monkeypatch.setattr(launch_main.Rehearsal, "run", lambda it: started.append(it) or 0)
        assert launch_main.main(words[3:]) == 0
        assert len(started) == 1
        read_by_main(words[words.index("--") + 1 :], monkeypatch)
    elif words[:4] == ["python", "-m", "launch", "render"]:
        out = words.index("--out=rendered")
        words[out] = f"--out={folder / 'rendered'}"
        words = [it.replace("--runs=", f"--runs={folder}/") for it in words]
        assert launch_main.main(words[3:]) == 0
    elif words[:3] == ["python", "-m", "experiments"]:
        for name in sweeps_main.COMMANDS:
            monkeypatch.setitem(sweeps_main.COMMANDS, name, lambda **_: 0)
        assert sweeps_main.main(words[3:]) == 0
    elif words[:2] == ["python", "-m"]:
        path = words[2].replace(".", "/")
        path = f"{path}.py" if (ROOT / f"{path}.py").exists() else f"{path}/__main__.py"
        assert read_by_script(path, words[3:], monkeypatch) == []
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            if "=" in word:
                name, _, value = word.partition("=")
                assert name in ("ARGS", "PYTHON", "WORKDIR", "JOBS")
                assert value
            else:
                assert re.search(rf"^{word}:", makefile, re.MULTILINE), word
        if "bench" in words and (given := [it for it in words if it.startswith("ARGS=")]):
            read_by_script("experiments/bench_peers.py", [given[0][5:]], monkeypatch)
    else:  # of other programs: it is bash at least
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def not_in_sources(line):
    """The parts of a quoted message, between its values, that no source of ours has."""
    sources = "".join(path.read_text() for path in (ROOT / "halonet").rglob("*.py"))
    sources = re.sub(r"\"\s*\n\s*(\+ )?f?\"", "", sources)  # a text over several lines
    parts = re.split(r"\.\.\.|\d+%?|'\w+'|gs://|data\.batch_size|[();:]", line)
    parts = [part.strip() for part in parts if len(part.strip()) > 5]
    assert parts, line
    return [part for part in parts if part not in sources]

"""What README.md and docs/ say can be done: commands, Python, keys, names, and what is printed."""

import ast
import importlib
import inspect
import operator
import re
import runpy
import subprocess
import urllib.parse

import jaxtyping
import matplotlib.image
import numpy as np
import pytest

import halonet
import launch
from configs import default
from docs import hooks
from experiments import draw_halo
from halonet import runtime
from halonet.config import MAY_CHANGE, flatten
from tests import command_lines, test_faults
from tests.command_lines import ROOT, blocks, inline
from tests.documented_commands import CI, OWN_TESTS, TESTED, UNTRIED
from tests.test_golden_run import GOLDEN, registered  # noqa: F401

NAMES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
NAMES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
COMMANDS = command_lines.commands(*(PAGES[name] for name in NAMES if name not in OWN_TESTS))
LISTED = [*CI, *(it for its in (TESTED | UNTRIED).values() for it in its)]
PYTHON = [
    (name, block.text)
    for name, page in PAGES.items()
    for block in blocks(page)
    if block.language == "python"
]
# ml_collections loads config files by an older way of importlib.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


def test_every_command_is_listed_with_what_runs_it():
    assert [it for it in COMMANDS if it not in LISTED] == []


def test_what_is_listed_stands_in_a_page():
    assert [it for it in LISTED if it not in COMMANDS] == []
    assert len(set(LISTED)) == len(LISTED)


def test_what_runs_them_is_a_test():
    assert test_faults.missing([*TESTED, *OWN_TESTS.values()]) == []
    run = (ROOT / ".ci" / "run").read_text()
    assert [it for it in CI if not re.search(rf"^{it}\b", run, re.MULTILINE)] == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda it: it[:60])
def test_its_program_reads_its_flags(command, monkeypatch, tmp_path):
    (runs,) = (text for _, text in PYTHON if "gs://RUNS" in text and "Run(" in text)
    (tmp_path / "runs.py").write_text(runs)
    command_lines.read(command, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "python main.py --config=configs/mnist.py --workdir=x --config.optim.lerning_rate=1",
        "python main.py --config=configs/mnist.py --workdir=x --no_such_flag=1",
        "python -m halonet.models show halonet_h4 --size=384",
        "python -m halonet.models.convert timm FILE --model=halonet50ts --into=DIR",
        "python -m halonet.data check --config=configs/mnist.py --no_such_flag=1",
        "python -m experiments.bench_attention --batch=many",
        "python -m experiments.draw_halo --no_such_flag=1",
        "make demos",
    ],
)
def test_a_flag_that_does_not_exist_would_be_noticed(command, monkeypatch, tmp_path):
    with pytest.raises((AssertionError, SystemExit, command_lines.flags.Error)):
        command_lines.read(command, monkeypatch, tmp_path)


def test_commands_are_found():
    page = (
        "```\nmake demo    # minutes\npython main.py --a=1 \\\n    --b=2\n```\n"
        "<!-- needs hardware -->\n```\nsbatch it\n```\n```text\nmade 3 files\n```\n"
        "`python main.py` and `make\ntest`, `tests/test_it.py`\n"
    )
    assert command_lines.commands(page) == ["make demo", "python main.py --a=1 --b=2", "make test"]


def test_a_block_without_a_language_holds_commands_only():
    for name, page in PAGES.items():
        for block in blocks(page):
            assert block.language in ("", "python", "text"), name
            if not block.language and not block.hardware:
                lines = command_lines.lines_of(block)
                assert [it for it in lines if not command_lines.PROGRAM.match(it)] == [], name


# --- Python


@pytest.mark.parametrize(("name", "text"), PYTHON, ids=lambda it: it[:40])
def test_python_has_names_and_arguments_that_exist(name, text):
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for it in node.names:
                path = f"{node.module}.{it.name}"
                assert hasattr(module, it.name) or importlib.util.find_spec(path), path
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "halonet":
            assert hasattr(halonet, node.attr), node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("halonet."):
            path = ast.unparse(node.func).removeprefix("halonet.")
            called = operator.attrgetter(path)(halonet)
            given = [it.arg for it in node.keywords]
            inspect.signature(called).bind_partial(*node.args, **dict.fromkeys(given))


@pytest.mark.middle
def test_python_of_the_notebook_page_runs(registered, monkeypatch, tmp_path):  # noqa: F811
    """On a run of this repository, as in a notebook: without the tests' checks of shapes."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    texts = [text for name, text in PYTHON if name == "docs/restoring.md"]
    assert len(texts) == 5
    path = tmp_path / "page.py"
    path.write_text("\n".join(texts).replace("runs/demo", str(GOLDEN)))
    images = [np.zeros((40, 30, 3), np.uint8), np.full((32, 32), 255, np.uint8)]
    found = runpy.run_path(str(path), {"images": images})
    assert found["probabilities"].shape == (2, 10)
    assert len(found["best"]) == 2
    assert [it.shape[0] for it in found["maps"]] == [2] * len(found["maps"])
    assert len(found["rows"]) > 1


# --- keys, flags and files that the pages name


def test_keys_and_flags_exist():
    keys = flatten(default.get_config())
    groups = "|".join({key.partition(".")[0] for key in keys} - {"seed", "train", "eval"})
    sources = "".join(
        (ROOT / name).read_text()
        for name in (
            *("main.py", "launch/__main__.py", "halonet/data/__main__.py"),
            *("halonet/models/__main__.py", "halonet/models/convert/__main__.py"),
            *("experiments/bench_attention.py", "launch/targets.py"),
            "experiments/__main__.py",
        )
    )
    for name, page in PAGES.items():
        for text in inline(page):
            if command_lines.PROGRAM.match(text):
                continue  # its own program reads its flags
            for flag, key in re.findall(r"(?<!\S)--((?:config\.)?([a-z_0-9.]+))", text):
                if flag.startswith("config.") and key != "key":
                    assert key in keys, f"{name}: {text}"
                elif flag != "config.key":
                    defined = rf"\"(--)?{re.escape(flag)}\"|^    {re.escape(flag)}: "
                    assert re.search(defined, sources, re.MULTILINE), f"{name}: {text}"
            if re.fullmatch(rf"({groups})\.[a-z_]+", text):
                assert text in keys, f"{name}: {text}"


@pytest.mark.parametrize("name", NAMES)
def test_files_that_it_names_exist(name):
    folders = r"(?:tests|halonet|experiments|configs|launch|docs)/"
    for text in inline(PAGES[name]):
        if re.fullmatch(rf"{folders}[\w/.]+\.\w+", text):
            assert (ROOT / text).exists(), text
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", PAGES[name]):
        assert ((ROOT / name).parent / link).exists(), link


def test_links_elsewhere_are_addresses():
    links = [it for page in PAGES.values() for it in re.findall(r"\]\((\w+:[^)]*)\)", page)]
    assert len(links) > 2
    for link in links:
        parts = urllib.parse.urlsplit(link)
        assert parts.scheme == "https", link
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link
        assert re.fullmatch(r"\S*", parts.path), link


def test_the_api_has_every_public_name():
    page = PAGES["docs/api.md"]
    for module in (halonet, halonet.models, launch):
        for name in module.__all__:
            assert re.search(rf"(`|[.]){name}(`|$|\s)", page, re.MULTILINE), name


def test_lines_of_troubleshooting_are_ours():
    page = PAGES["docs/troubleshooting.md"]
    lines = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(lines) > 25
    for line in lines:
        assert command_lines.not_in_sources(line) == [], line
    assert command_lines.not_in_sources("no such line; the run ends") != []


def test_every_exit_code_is_explained():
    codes = set()
    for path in [ROOT / "main.py", *(ROOT / "halonet").rglob("*.py")]:
        codes |= set(re.findall(r"exit_code = (\d+)$", path.read_text(), re.MULTILINE))
    codes |= {"0", "1", str(runtime.PREEMPTED), str(runtime.HUNG)}
    there = re.findall(r"^\| (\d+) \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert sorted(there, key=int) == sorted(codes, key=int)


# --- generated pages


def divided(match):
    return repr(int(match[1]) / int(match[2]))


def test_the_reference_has_every_key():
    found = hooks.configuration_keys((ROOT / "configs" / "default.py").read_text())
    numbers = {it.name: re.sub(r"(\d+) / (\d+)", divided, it.value) for it in found}
    values = {name: ast.literal_eval(value) for name, value in numbers.items()}
    assert values == flatten(default.get_config())
    assert [it.name for it in found if not it.comment] == []
    types = {it.name: it.type for it in found}
    assert (types["seed"], types["data.mean"], types["optim.floor"]) == ("int", "3 floats", "float")
    (remat,) = (it for it in found if it.name == "model.remat")
    assert remat.before.startswith("What the backward pass computes again")
    page = hooks.configuration_page()
    assert all(f"| `{it.name}` | {it.type} | `{it.value}`" in page for it in found if it.value)
    assert all(f"`{name}" in page for name in MAY_CHANGE)


def test_the_reference_has_every_flag():
    import main

    table = hooks.flag_table((ROOT / "main.py").read_text())
    assert {name for name, *_ in table} == {
        it.name for it in main.FLAGS.get_flags_for_module(main)
    } - {it for it in main.FLAGS if it.startswith("config.")}
    for name, _, value, what in table:
        flag = main.FLAGS[name]
        assert flag.help.endswith(what)
        assert value == ("" if flag.default in (None, "", []) else str(flag.default))


def test_every_configuration_has_a_place():
    page = hooks.configs_page()
    for path in (ROOT / "configs").glob("*.py"):
        listed = f"## {path.name} {{: #{path.stem} }}" in page
        assert listed == (path.stem not in ("__init__", "default"))
    assert "config.model.bn_group = 64  # yaml: batch_size of each device" in page
    assert '"""\n\nfrom configs' not in page  # a header is text, and not also source


@pytest.mark.parametrize(
    ("text", "folder", "expected"),
    [
        ("[a](docs/pods.md#x)", "", "[a](pods.md#x)"),
        ("![a](docs/halo.png)", "", "![a](halo.png)"),
        ("[a](../README.md#results)", "docs/", "[a](index.md#results)"),
        ("[a](faults.md)", "docs/", "[a](faults.md)"),
        ("[a](configs/default.py)", "", "[a](configuration.md)"),
        ("[a](../configs/mnist.py)", "docs/", "[a](configs.md#mnist)"),
        ("[a](https://x.org/docs/a.md)", "", "[a](https://x.org/docs/a.md)"),
        ("[a](#here)", "", "[a](#here)"),
        ("`[a](docs/b.md)` [b](docs/b.md)", "", "`[a](docs/b.md)` [b](b.md)"),
        ("```\n[a](docs/b.md)\n```\n", "", "```\n[a](docs/b.md)\n```\n"),
    ],
)
def test_links_of_the_repository_become_those_of_the_site(text, folder, expected):
    assert hooks.site_links(text, folder) == expected


# --- pictures, and make


def test_pictures_of_blocks_are_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(draw_halo, "DOCS", tmp_path)
    draw_halo.main()
    for name in ("halo.png", "reach.png"):
        assert matplotlib.image.imread(tmp_path / name).shape[1] > 1000


def test_layers_bring_in_the_windows_of_blocks():
    where = {"block": 8, "halo": 3, "size": 64}
    # Of the block from 24 to 31; then of those from 16 to 39; at last of those from 8 to 47.
    found = [draw_halo.reach(28, layers, **where) for layers in (0, 1, 2, 3, 9)]
    assert found == [(28, 29), (21, 35), (13, 43), (5, 51), (0, 64)]
    assert draw_halo.reach(28, 3, **{**where, "halo": 0}) == (24, 32)


def test_make_installs_with_the_interpreter_of_ones_choice():
    done = subprocess.run(
        ["make", "-n", "demo", "PYTHON=python3.12"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "python3.12 -m venv .venv-python3.12" in done.stdout
    assert ".venv-python3.12/bin/python main.py --config=configs/demo.py" in done.stdout

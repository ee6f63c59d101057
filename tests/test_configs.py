"""Every config loads without JAX, declares nothing of its own, is valid, and is read."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from halonet.config import flatten

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(path.stem for path in ROOT.glob("configs/*.py") if path.stem != "__init__")

LOAD = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    config = importlib.import_module(f"configs.{name}").get_config()
    found[name] = [config.to_dict(), "jax" in sys.modules]
print(json.dumps(found))
"""
VALIDATE = """
import importlib, json, sys
from halonet.config import validate
found = {}
for name in sys.argv[1:]:
    config = importlib.import_module(f"configs.{name}").get_config()
    if name == "default":
        config.train.epochs = 1  # the one thing that default leaves to the others
    try:
        validate(config, num_classes=10)
        found[name] = ""
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def in_subprocess(code, *arguments):
    """What `code` prints, as JSON, where there is one device."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def loaded():
    return in_subprocess(LOAD, *NAMES)


@pytest.fixture(scope="module")
def validated():
    return in_subprocess(VALIDATE, *NAMES)


def keys_and_types(tree, prefix=""):
    """{"optim.warmup": "float", ...}: a None or a group without keys shows as its type."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= keys_and_types(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = type(value).__name__
    return found


def test_shipped_configs_are_seen():
    assert {"default", "mnist"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_loads_without_jax(loaded, name):
    assert loaded[name][1] is False


@pytest.mark.parametrize("name", NAMES)
def test_has_the_keys_and_types_of_default(loaded, name):
    assert keys_and_types(loaded[name][0]) == keys_and_types(loaded["default"][0])


def test_every_default_has_a_value(loaded):
    types = keys_and_types(loaded["default"][0])
    # Without a value an override from the command line would have no type to be read as.
    assert set(types.values()) == {"bool", "float", "int", "list", "str"}


@pytest.mark.parametrize("name", NAMES)
def test_is_valid_on_one_device(validated, name):
    assert validated[name] == ""


def test_an_invalid_config_would_be_noticed():
    code = VALIDATE.replace("train.epochs = 1", "train.epochs = 0")
    found = in_subprocess(code, "default")
    assert re.match("config.train.steps and config.train.epochs are both 0", found["default"])


def dotted(node):
    """config.optim.warmup of the nodes that say so, or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return f"{before}.{node.attr}"
    return None


def keys_read(source, known):
    """Those of `known` that a source reads as attributes of a `config`, group.to_dict() included.

    A key in quotes does not count: validation looks at all of them and obeys none.
    """
    read = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            parts = (dotted(node) or "").split(".")
            if "config" in parts:
                key = ".".join(parts[parts.index("config") + 1 :])
                group, _, call = key.rpartition(".")
                if call == "to_dict" and group:
                    read |= {it for it in known if it.startswith(group + ".")}
                read |= known & {key}
    return read


def all_keys(loaded):
    return set(keys_and_types(loaded["default"][0]))


def test_every_key_is_read(loaded):
    known = all_keys(loaded) | {"optim.made_up"}
    read = set()
    for path in (ROOT / "halonet").rglob("*.py"):
        read |= keys_read(path.read_text(), known)
    assert known - read == {"optim.made_up"}


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("f(config.optim.warmup)", {"optim.warmup"}),
        ("self.config.seed", {"seed"}),
        ("f(**config.augment.to_dict())", {"augment.rotate", "augment.scale"}),
        ("flat['optim.warmup']", set()),
        ("config.optim.warmup = 0", set()),
        ("config.to_dict()", set()),
        ("optim.warmup", set()),
    ],
)
def test_reading_is_told_from_mentioning(source, read):
    known = {"seed", "optim.warmup", "augment.rotate", "augment.scale"}
    assert keys_read(source, known) == read


def declared():
    """{key: its line in default.py}, in order; groups left out."""
    text = (ROOT / "configs" / "default.py").read_text()
    lines = re.findall(r"^    config\.([\w.]+) = (.*)$", text, flags=re.MULTILINE)
    return {key: rest for key, rest in lines if rest != "ConfigDict()"}


def test_declarations_are_all_seen(loaded):
    assert set(declared()) == all_keys(loaded)


@pytest.mark.parametrize("key", declared())
def test_every_key_says_what_it_is(key):
    assert re.search(r"  # \w+", declared()[key])


def test_flatten_names_the_same_keys(loaded):
    from configs import default

    assert set(flatten(default.get_config())) == all_keys(loaded)

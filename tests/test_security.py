"""Files of others run no code: nothing unpickles, and what looks like code in a run is not run."""

import ast
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from halonet import checkpoint, load_run
from halonet.config import ConfigError, load_config
from halonet.data.decode import DecodeError, decode
from halonet.models import VARIANTS
from halonet.models.convert import readers
from halonet.models.convert.weights import WeightsError
from halonet.models.registry import Variant
from tests.test_convert import pickle_that_touches
from tests.test_golden_run import FIELDS, GOLDEN, NAME, STEP, registered  # noqa: F401
from tests.test_layering import ROOT, SOURCES, imports, named

TESTS = sorted((ROOT / "tests").rglob("*.py"))
# What pickles, or is of no other use than to run what it is given.
MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("multiprocessing", "submitit"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {"read_pickle", "to_pickle", "mp_prefetch", "ProcessPoolExecutor", "deserialize_and_load"}
# loader -> the argument that makes it safe.
LOADERS = {"torch.load": "weights_only=True", "yaml.load": "Loader=yaml.SafeLoader"}
# The one place that pickles: its own functions, to its own children, through a pipe that they
# inherit. And the test that counts the bytes of it.
ALLOWED = {
    "halonet/data/workers.py": ["import of multiprocessing.connection"],
    "tests/test_folder.py": ["import of multiprocessing.reduction"],
}


def unsafe(source):
    """What in a source could run code out of data."""
    tree = ast.parse(source)
    found = [
        f"import of {name}"
        for name, _ in imports(source)
        if name.split(".")[0] in MODULES or name in LOADERS
    ]
    aliases = {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        function = aliases.get(first, first) + dot + rest
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if function in BUILTINS or rest.rpartition(".")[2] in METHODS or function in METHODS:
            found.append(f"call of {function}")
        if given.get("allow_pickle", "False") != "False":
            found.append(f"allow_pickle={given['allow_pickle']}")
        if function == "numpy.load" and len(node.args) > 2:
            found.append("allow_pickle by its place")
        wanted = LOADERS.get(function)
        if wanted and wanted not in [f"{name}={value}" for name, value in given.items()]:
            found.append(f"{function} without {wanted}")
    return found


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=named)
def test_nothing_unpickles(path):
    assert unsafe(path.read_text()) == ALLOWED.get(named(path), [])


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        *((f"import {name}", f"import of {name}") for name in sorted(MODULES)),
        ("def f():\n    from joblib import load", "import of joblib.load"),
        ("import multiprocessing.pool as p", "import of multiprocessing.pool"),
        ("from torch import load", "import of torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("np.load(path, allow_pickle=yes)", "allow_pickle=yes"),
        ("import numpy as np\nnp.load(path, None, True)", "allow_pickle by its place"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(path)", "torch.load without weights_only=True"),
        ("yaml.load(text)", "yaml.load without Loader=yaml.SafeLoader"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load without Loader=yaml.SafeLoader"),
        *((f"{name}(text)", f"call of {name}") for name in sorted(BUILTINS)),
        ("pandas.read_pickle(path)", "call of pandas.read_pickle"),
        ("ds.shuffle(1).mp_prefetch(2)", "call of ds.shuffle(1).mp_prefetch"),
        ("ProcessPoolExecutor(2)", "call of ProcessPoolExecutor"),
    ],
)
def test_unpickling_is_found(source, wrong):
    assert unsafe(source) == [wrong]


def test_safe_loading_is_let_through():
    source = (
        "np.load(path, allow_pickle=False)\ntorch.load(path, weights_only=True)\n"
        "yaml.load(text, Loader=yaml.SafeLoader)\nmodel.eval()\nre.compile(text)\n"
    )
    assert unsafe(source) == []


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A marker, which a module named evil makes when it is imported."""
    marker = tmp_path / "marker"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
        "class Handler: ...\ndef load(*args): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return marker


def test_the_evil_module_works(evil):
    import evil as module

    assert evil.exists()
    assert module.Handler


@pytest.fixture
def run(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(GOLDEN, workdir)
    return workdir


FORGERIES = (
    ("_CHECKPOINT_METADATA", "orbax.checkpoint._src.handlers.json_checkpoint_handler.Json"),
    ("_CHECKPOINT_METADATA", "orbax.checkpoint._src.handlers.standard_checkpoint_handler."),
    ("state/_METADATA", "jax.Array"),
    ("state/_sharding", "NamedSharding"),
    ("state/_sharding", "AxisType.Auto"),
)
FILES = (
    *("_CHECKPOINT_METADATA", "meta/metadata", "state/_METADATA", "state/_sharding"),
    *("state/array_metadatas/process_0", "state/manifest.ocdbt", "state/d"),
)


def open_forged(workdir, marker):
    """Opens a run as a notebook and as the trainer does, each file being forged in turn.

    Prints what was said of each, "" where the run opened.
    """
    VARIANTS[NAME] = Variant(32, 0, FIELDS, "ours")
    workdir, found = pathlib.Path(workdir), {}
    folder = workdir / "checkpoints" / str(STEP)
    for file, said in (*FORGERIES, *((file, "") for file in FILES)):
        path = next((folder / file).iterdir()) if file == "state/d" else folder / file
        kept = path.read_bytes()
        if said:
            assert said in kept.decode()
            path.write_text(re.sub(rf"{re.escape(said)}\w*", "evil.Handler", kept.decode()))
        else:
            path.write_bytes(pickle_that_touches(marker))
        checkpoint.write_manifest(folder)  # whoever forges it forges that too
        try:
            load_run(workdir)
            checkpoint.Checkpointer(workdir, keep_latest=2, best_steps=list).close()
            found[f"{file} {said}"] = ""
        except (checkpoint.CheckpointError, NotImplementedError) as error:  # the latter by Orbax
            found[f"{file} {said}"] = str(error)
        path.write_bytes(kept)
    print(json.dumps(found))


@pytest.mark.middle
def test_a_forged_checkpoint_runs_no_code(run, evil):
    # In a process of its own: of what cannot be read Orbax leaves coroutines behind.
    call = f"open_forged({str(run)!r}, {str(evil)!r})"
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import open_forged; {call}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(evil.parent / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not evil.exists()
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(FORGERIES) + len(FILES)
    # Some is needed, and said to be damaged; with what is not needed the run opens.
    assert {"meta/metadata ", "state/_METADATA ", "state/d "} <= {it for it in found if found[it]}
    assert found["_CHECKPOINT_METADATA "] == ""
    assert 'Unknown type: "evil.Handler"' in found["state/_METADATA jax.Array"]


def test_an_array_or_an_image_that_is_a_pickle_is_none(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.npy"
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    evil = pickle_that_touches(marker)
    for data in (evil, header.ljust(127) + b"\n" + evil):
        with pytest.raises(DecodeError):
            decode(data)
        path.write_bytes(data)
        with pytest.raises(WeightsError):
            readers.read_weights(path)
    assert not marker.exists()


def test_of_a_workdir_only_data_is_read(run, evil, monkeypatch):
    source = (run.parent / "modules" / "evil.py").read_text()
    for name in ("config", "default", "__init__", "sitecustomize", "conftest", "mlxtend"):
        (run / f"{name}.py").write_text(source)
    (run / "configs").mkdir()
    for name in ("__init__", "default", "mnist"):
        (run / "configs" / f"{name}.py").write_text(source)
    monkeypatch.chdir(run)
    assert load_run(run).step == STEP
    assert load_run(".").step == STEP
    assert not evil.exists()


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:evil.load []", "evil.load()", "${evil.load:1}", "__import__('evil')"],
)
def test_a_saved_configuration_is_data(run, evil, value):
    config = json.loads((run / "config.json").read_text())
    config["augment"]["rand_augment"] = config["train"]["loss"] = config["model"]["name"] = value
    (run / "config.json").write_text(json.dumps(config))
    assert load_config(run).train.loss == value
    with pytest.raises(ValueError, match="unknown model"):
        load_run(run)
    (run / "config.json").write_text(value)
    with pytest.raises(ConfigError, match="is damaged"):
        load_run(run)
    assert not evil.exists()


@pytest.mark.parametrize("step", ["../../elsewhere", "200/../200", "/200", "²", "-1", ""])
def test_a_step_is_a_number_and_no_path(run, step):
    with pytest.raises(ValueError, match=r"is not 'best', 'latest' or a number|no checkpoint"):
        load_run(run, step=step)


def locked(text):
    """(name, pinned version, number of hashes) of each package of a lock file."""
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    return [
        (*re.match(r"([\w.-]+)==(\S+)", entry).groups(), entry.count("--hash=sha256:"))
        for entry in entries
    ]


def test_every_package_is_pinned_with_its_hashes():
    packages = locked((ROOT / "requirements.lock").read_text())
    assert [name for name, _, hashes in packages if not hashes] == []
    names = {name for name, _, _ in packages}
    assert {"jax", "flax", "orbax-checkpoint"} <= names
    assert not {"lightning", "pytorch-lightning"} & names
    # And pip and uv are told to ask for them.
    assert (ROOT / "Makefile").read_text().count("--require-hashes") == 2


def test_a_package_without_a_hash_would_be_noticed():
    text = "# made by\na==1 \\\n    --hash=sha256:12\nb-c==2.0 ; python_version < '4'\n"
    assert locked(text) == [("a", "1", 1), ("b-c", "2.0", 0)]

"""Who may import whom, read from the sources: the table of the design, and it can fail."""

import ast
import importlib
import pathlib
import resource
import subprocess
import sys

import pytest

import halonet

ROOT = pathlib.Path(__file__).parent.parent
OURS = ("halonet", "configs", "experiments", "launch", "main")
EVERYWHERE = {"jaxtyping", *sys.stdlib_module_names}
# Paths may be gs:// wherever files are opened, and these open none.
WITHOUT_PATHS = ("halonet.ops", "halonet.models", "configs", "launch")

# The op as other layers see it; what else lies in halonet.ops is its own affair.
OP = "halonet.ops.halo_attention"

# module or package: (ours, third party anywhere, third party inside functions only). Ours are named
# from halonet on. The longest name that fits a module counts; a module without one is refused.
TABLE = {
    "halonet": ("models run exported ops.halo_attention", "", ""),
    "halonet.ops": ("ops", "jax numpy", ""),
    "halonet.models": (
        "ops.halo_attention ops.attention_weights ops.table_size ops.BORDERS "
        "ops.IMPLEMENTATIONS ops.POSITIONS "
        "ops.on_each_device ops.row_devices ops.with_neighbours models",
        "flax jax numpy",
        "",
    ),
    "halonet.models.__main__": ("models plots", "absl", ""),
    "halonet.models.convert": ("models", "flax jax numpy", "google.protobuf safetensors torch"),
    # A command line: it reads runs as others do, and writes one, whose folder may be gs://.
    "halonet.models.convert.__main__": (
        "models checkpoint files run",
        "absl etils.epath jax numpy",
        "safetensors",
    ),
    "halonet.data": ("data", "PIL grain numpy simplejpeg", ""),
    # A command line: the images that it shows and counts are those of a configuration's views.
    "halonet.data.__main__": ("data config plots", "absl ml_collections numpy", ""),
    "halonet.data.device": ("data", "jax numpy", ""),
    "halonet.data.prepare": ("data", "PIL numpy", "google tensorflow tensorflow_datasets"),
    "halonet.data.sources": ("data", "PIL numpy", "google tensorflow_datasets"),
    "halonet.optim": ("", "jax optax", ""),
    "halonet.sharding": ("", "jax numpy", ""),
    "halonet.checkpoint": ("files", "jax orbax", ""),
    "halonet.health": ("sharding steps", "jax numpy", ""),
    # One function that several of the rest need.
    "halonet.files": ("", "", ""),
    "halonet.metrics": ("files", "", "clu"),
    "halonet.progress": ("", "", ""),
    "halonet.runtime": ("files", "jax", ""),
    "halonet.processes": ("runtime", "jax numpy", "orbax"),
    "halonet.plots": ("", "matplotlib numpy", "PIL sklearn"),
    "halonet.steps": ("", "jax numpy optax", ""),
    # It builds the model and the views of images that a configuration names.
    "halonet.config": ("data files models optim", "absl jax ml_collections", ""),
    # "best" is read from the run's own record, hence metrics.
    "halonet.run": (
        "models data steps checkpoint sharding plots config metrics processes",
        "jax ml_collections numpy",
        "",
    ),
    # It says with which code and packages a result was made, hence runtime; metrics writes whole.
    "halonet.evaluate": (
        "models data steps checkpoint sharding plots config run runtime files health",
        "jax ml_collections numpy",
        "",
    ),
    # What a configuration trains by, as plain functions for the step's compilation.
    "halonet.recipe": ("models steps optim sharding", "jax ml_collections optax", ""),
    "halonet.report": ("metrics optim runtime progress", "clu jax ml_collections", ""),
    "halonet.train": (
        "models data steps checkpoint sharding plots config run recipe evaluate metrics "
        "runtime processes progress files health report",
        "clu jax ml_collections numpy",
        "",
    ),
    # The images of the comparison are the data's, as evaluation opens it; what opens an export is
    # of its own runtime alone.
    "halonet.export": (
        "models steps checkpoint run config data evaluate runtime files exported",
        "jax ml_collections numpy",
        "sklearn tensorflow",
    ),
    "halonet.exported": ("files", "numpy", "jax tensorflow timm torch"),
    "halonet.modes": ("train evaluate export plan processes runtime", "ml_collections", ""),
    # Programs for TPUs that are not there.
    "halonet.hlo": ("", "", ""),
    "halonet.aot": ("hlo", "jax", ""),
    "halonet.tpu_kernels": ("aot hlo models", "", ""),
    "halonet.fit": ("", "", ""),
    "halonet.plan_report": ("", "", ""),
    "halonet.plan": (
        "models data steps optim sharding checkpoint config recipe evaluate runtime files "
        "aot hlo tpu_kernels fit plan_report",
        "jax ml_collections numpy",
        "",
    ),
    "main": ("modes config processes runtime", "absl ml_collections", ""),
    "configs": ("configs", "ml_collections", ""),
    # It starts main.py, which is a program to it; of the library it needs how flags are read.
    "launch": ("launch", "", ""),
    "launch.runs": ("launch config", "", "absl ml_collections"),
    "experiments": (
        "halonet configs experiments launch",
        "absl jax matplotlib ml_collections numpy optax pandas PIL sklearn submitit",
        "",
    ),
    # Compares codecs, of which we take one.
    "experiments.bench_decode": (
        "halonet",
        "PIL numpy sklearn",
        "cv2 imagecodecs pyvips simplejpeg",
    ),
    "experiments.bench_input": ("experiments halonet", "PIL numpy sklearn", "timm torch"),
    # The benchmark against the peers; they are of an environment of their own.
    "experiments.bench_peers": ("experiments halonet", "jax matplotlib", "torch"),
    "experiments.contestants": (
        "halonet",
        "jax numpy",
        "halonet_pytorch keras_cv_attention_models timm torch torchvision",
    ),
}
# Below these, functions take plain keyword arguments.
KNOW_THE_CONFIG = {
    *("main", "halonet.train", "halonet.evaluate", "halonet.run", "halonet.config"),
    *("halonet.recipe", "halonet.report", "halonet.modes"),
    *("halonet.export", "halonet.plan", "halonet.data.__main__"),
}

LIBRARY = [*sorted((ROOT / "halonet").rglob("*.py")), ROOT / "main.py"]
PROGRAMS = (path for it in ("configs", "experiments", "launch") for path in ROOT.glob(f"{it}/*.py"))
SOURCES = [*LIBRARY, *sorted(PROGRAMS)]
TESTS = sorted((ROOT / "tests").glob("*.py"))


def module_name(path):
    """halonet/data/__init__.py -> halonet.data"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named(path):
    return str(path.relative_to(ROOT))


def within(name, package):
    return name == package or name.startswith(package + ".")


def imports(source):
    """(dotted name, whether at the top level) of all that is imported, names included."""

    def walk(node, top):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = "." * child.level + (child.module or "")
                yield from ((f"{module}.{alias.name}", top) for alias in child.names)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, top and not inside)

    return list(walk(ast.parse(source), True))


def rule_of(module):
    # "halonet" is the line of halonet/__init__.py alone, not of every module that has none.
    fitting = (line for line in TABLE if within(module, line) and line != "halonet")
    return "halonet" if module == "halonet" else max(fitting, key=len, default=None)


def violations(module, source):
    """What `module` imports and may not."""
    line = rule_of(module)
    if line is None:
        return [f"{module} is not in the table"]
    own, anywhere, inside = (names.split() for names in TABLE[line])
    own = [it if it.split(".")[0] in OURS else f"halonet.{it}" for it in own]
    if not any(within(module, it) for it in WITHOUT_PATHS):
        anywhere.append("etils.epath")
    found = []
    for name, top in imports(source):
        if name.startswith("."):
            found.append(f"{module} imports {name}: imports are absolute")
        elif name.split(".")[0] in OURS:
            private = [part for part in name.split(".") if part[0] == "_" and part[:2] != "__"]
            # The op is a name: what lies deeper in the module of that name is not public.
            allowed = any(name == it if it == OP else within(name, it) for it in own)
            if private or not (allowed or within(name, module)):
                found.append(f"{module} imports {name}")
        elif name.split(".")[0] in EVERYWHERE or any(within(name, it) for it in anywhere):
            continue
        elif not any(within(name, it) for it in inside):
            found.append(f"{module} imports {name}")
        elif top:
            found.append(f"{module} imports {name} outside a function")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_follow_the_table(path):
    assert violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("halonet.ops.xla", "import flax.linen as nn", "halonet.ops.xla imports flax.linen"),
        ("halonet.ops.xla", "from etils import epath", "halonet.ops.xla imports etils.epath"),
        ("halonet.plots", "from etils import edc", "halonet.plots imports etils.edc"),
        ("halonet.models.layers", "from halonet.ops import xla", "imports halonet.ops.xla"),
        ("halonet.models.tables", "from halonet.ops import geometry", "imports halonet.ops.geom"),
        (
            "halonet.models.layers",
            "from halonet.ops.halo_attention import _check",
            "imports halonet.ops.halo_attention._check",
        ),
        ("halonet.steps", "from halonet import models", "halonet.steps imports halonet.models"),
        ("halonet.data.pipeline", "if True:\n    import jax", "pipeline imports jax"),
        ("halonet.data.pipeline", "def f():\n    import tensorflow", "imports tensorflow"),
        ("halonet.models.convert.timm", "import torch", "imports torch outside a function"),
        ("halonet.train", "from halonet.data.sources import _line", "halonet.data.sources._line"),
        ("halonet.train", "from . import steps", "imports are absolute"),
        ("halonet.helpers", "", "halonet.helpers is not in the table"),
        ("configs.mnist", "import numpy as np", "configs.mnist imports numpy"),
    ],
)
def test_checker_refuses(module, source, wrong):
    (found,) = violations(module, source)
    assert wrong in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("halonet.ops.xla", "import math\nfrom jaxtyping import Array\nimport jax.numpy as jnp"),
        ("halonet.models.attention", "from halonet.ops import halo_attention"),
        ("halonet.models.convert.timm", "def load():\n    import torch"),
        ("halonet.data.sources", "class A:\n    def f(self):\n        import tensorflow_datasets"),
        ("configs.mnist", "from __future__ import annotations\nfrom configs import default"),
    ],
)
def test_checker_accepts(module, source):
    assert violations(module, source) == []


def knows_the_config(source):
    """Whether a source names ConfigDict or imports anything of ml_collections."""
    tree = ast.walk(ast.parse(source))
    mentioned = any(
        "ConfigDict" in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in tree
    )
    return mentioned or any(within(name, "ml_collections") for name, _ in imports(source))


def test_config_dict_stops_above_the_machinery():
    knowing = {module_name(path) for path in LIBRARY if knows_the_config(path.read_text())}
    assert knowing <= KNOW_THE_CONFIG
    assert {"main", "halonet.config", "halonet.train"} <= knowing
    assert knows_the_config("def f(config: other.ConfigDict): ...")
    assert not knows_the_config("'a ConfigDict in words'\nconfig = {}")


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 450


def test_main_is_short():
    assert len((ROOT / "main.py").read_text().splitlines()) < 80


def test_import_brings_neither_tensorflow_nor_grain():
    code = (
        "import halonet, sys; assert 'tensorflow' not in sys.modules and 'grain' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["models", "ops", "run"])
def test_the_modules_of_public_names_need_no_import(monkeypatch, name):
    module = importlib.import_module(f"halonet.{name}")
    monkeypatch.delattr(halonet, name)  # as where nothing has imported it yet
    assert getattr(halonet, name) is module
    assert name in dir(halonet)
    with pytest.raises(AttributeError, match="no attribute 'model'"):
        _ = halonet.model


@pytest.mark.middle
def test_import_is_quick():
    """In seconds of the processor, which a busy machine does not stretch as it does the clock."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", "import halonet"], cwd=ROOT, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 2

"""Every config loads without JAX, declares nothing of its own, is valid, and is read."""

import ast
import importlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from halonet.config import flatten
from halonet.models import VARIANTS

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path.stem for path in ROOT.glob("configs/*.py") if path.stem != "__init__")
MODULES = {name: importlib.import_module(f"configs.{name}") for name in FILES}
# As on the command line: a file, or a file and a variant.
NAMES = [
    *FILES,
    *(f"{name}:{it}" for name, module in MODULES.items() for it in getattr(module, "VARIANTS", ())),
]
RECIPES = [name for name in FILES if name not in ("default", "mnist", "demo", "quick")]

LOAD = """
import importlib, json, sys

def load(name):
    file, *variant = name.split(":")
    config = importlib.import_module(f"configs.{file}").get_config(*variant)
    if file == "default":
        config.train.epochs = 1  # the one thing that default leaves to the others
    return config

def each(make):
    print(json.dumps({name: make(name, load(name)) for name in sys.argv[1:]}))
"""
TO_DICT = (
    LOAD
    + """
each(lambda _, config: [config.to_dict(), "jax" in sys.modules])
"""
)
VALIDATE = (
    LOAD
    + """
from halonet.config import validate

def refusal(_, config):
    try:
        validate(config, num_classes=10)
        return ""
    except ValueError as error:
        return str(error)

each(refusal)
"""
)
# All that a run does with a configuration before it compiles anything, on a few photographs.
BUILD = (
    LOAD
    + """
import pathlib, tempfile
import jax, numpy as np
from PIL import Image
from halonet import recipe, steps
from halonet.config import random_view, total_steps, validate
from halonet.data import folder, pipeline
from halonet.evaluate import eval_batches, make_mesh
from halonet.models import init_function

photographs = tempfile.TemporaryDirectory()
for label in "ab":
    (pathlib.Path(photographs.name) / "train" / label).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
    Image.fromarray(pixels).save(f"{photographs.name}/train/{label}/1.jpg")

def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)

def build(name, config):
    model = validate(config, num_classes=1000)
    total = total_steps(config, 1_281_167)
    schedule = recipe.schedule(config, total)
    tx = recipe.optimizer(config, schedule)
    state = jax.eval_shape(
        lambda key: steps.init_state(
            key,
            init_fn=init_function(model, config.init.scheme),
            tx=tx,
            image_size=config.data.image_size,
            ema=config.train.ema_decay > 0,
        ),
        jax.random.key(0),
    )
    config.mesh.rows = 1  # there is one device
    after, mesh = state, make_mesh(config)
    if ":" not in name:  # tracing its gradient takes seconds
        step = recipe.train_step(config, model, tx, schedule, mesh)
        after, _ = jax.eval_shape(step, state, recipe.abstract_batch(config, mesh))
    # As many images and processes as a test can have.
    config.data.batch_size, config.eval.batch_size = 2 * config.augment.repeats, 2
    config.data.threads, config.data.workers = 1, 0
    source = folder.FolderImages(photographs.name, "train")
    batches = pipeline.train_batches(
        source,
        batch_size=config.data.batch_size,
        seed=config.seed,
        augment=random_view(config),
        repeats=config.augment.repeats,
        replace_damaged=config.data.damaged == "skip",
        threads=config.data.threads,
        workers=config.data.workers,
        prefetch=1,
    )
    batch, scored = next(batches), next(eval_batches(config, source, mesh))
    batches.close()
    return {
        "same": shapes(after) == shapes(state),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "batch": shapes(batch) == shapes(recipe.abstract_batch(config, mesh)),
        "scored": list(scored["image"].shape),
        "rates": [float(schedule(step)) for step in (0, round(config.optim.warmup * total), total)],
    }

each(build)
"""
)


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
    return in_subprocess(TO_DICT, *NAMES)


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
    assert {"default", "mnist", "imagenet:halonet_h7", "imagenet21k_finetune:512"} <= set(NAMES)


@pytest.mark.parametrize("name", FILES)
def test_a_config_with_an_argument_lists_its_variants(name):
    arguments = inspect.signature(MODULES[name].get_config).parameters
    assert bool(arguments) == hasattr(MODULES[name], "VARIANTS")
    if arguments:
        (argument,) = arguments.values()
        assert argument.default in MODULES[name].VARIANTS
        with pytest.raises(
            ValueError, match=f"'h9'; there are: {', '.join(MODULES[name].VARIANTS)}$"
        ):
            MODULES[name].get_config("h9")


@pytest.mark.parametrize("variant", MODULES["imagenet"].VARIANTS)
def test_images_are_of_the_size_that_the_variant_was_published_with(variant):
    config = MODULES["imagenet"].get_config(variant)
    assert (config.model.name, config.data.image_size) == (variant, VARIANTS[variant].image_size)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_how_it_is_run_and_what_comes_of_it(name):
    said = MODULES[name].__doc__
    assert f"python main.py --config=configs/{name}.py" in said
    assert re.search("published", said, flags=re.IGNORECASE)
    assert "Hardware" in said or " on 8 " in said
    if name != "finetune":
        assert re.search("not\\s+reproduced\\s+here|is not\\. The recipe is NOT", said)


@pytest.mark.parametrize("name", [name for name in FILES if name != "default"])
def test_the_readme_lists_it(name):
    assert re.search(rf"^\|.*`{name}\.py\b", (ROOT / "README.md").read_text(), flags=re.MULTILINE)


def numbers_without_source(source, known):
    """Lines that set a key, or a constant above the function, to numbers of no known source.

    The comment begins with the source; that of a constant stands above it and names one.
    """
    lines = source.splitlines()
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        line = lines[node.lineno - 1]
        values = [it.value for it in ast.walk(node.value) if isinstance(it, ast.Constant)]
        numbers = [it for it in values if isinstance(it, int | float)]
        if isinstance(node.targets[0], ast.Attribute):
            if node.targets[0].attr != "name":  # a number in a name is nobody's choice
                numbers += [it for it in values if isinstance(it, str) and re.search(r"\d", it)]
            said = re.search(rf"  # (?:{'|'.join(known)})\b", line)
        else:
            number = node.lineno - 1
            while lines[number - 1].startswith("#"):
                number -= 1
            above = " ".join(lines[number : node.lineno - 1])
            said = node not in tree.body or re.search(rf"\b(?:{'|'.join(known)})\b", above)
        if numbers and not said:
            found.append(line.strip())
    return found


# The other headers say of all their numbers at once that they are ours.
@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("imagenet", ("ours", "recollection", "published")),
        ("imagenet21k", ("ours", "recollection")),
        ("mindcv_halonet_50t", ("ours", "yaml", "code")),
        ("resnet50", ("ours", "flax")),
        ("timm_halonet50ts", ("ours", "timm", "A1")),
    ],
)
def test_every_number_of_a_recipe_has_a_source(name, known):
    assert numbers_without_source((ROOT / "configs" / f"{name}.py").read_text(), known) == []


def test_a_number_without_a_source_is_noticed():
    source = """
# Pixels, ours.
A = {"b": 1}
# Pixels.
B = {"b": 1}

def f():
    c.a = 1  # ours: many
    c.b = 2 / 3
    c.d = name
    c.e = True  # because
    c.f = f"rand-m{A}-n2"
    c.name = "imagenet2012"
    c.g = "ours"
"""
    assert sorted(numbers_without_source(source, ("ours", "code"))) == [
        *('B = {"b": 1}', "c.b = 2 / 3", "c.e = True  # because", 'c.f = f"rand-m{A}-n2"')
    ]


def test_recipes_are_all_looked_through():
    (marker,) = test_every_number_of_a_recipe_has_a_source.pytestmark
    looked = {name for name, _ in marker.args[1]}
    assert looked == {*RECIPES} - {"finetune", "imagenet21k_finetune", "large_images"}


@pytest.mark.middle
def test_everything_is_built_that_a_run_compiles():
    """Model, schedule, optimizer, batches and, of each file, the training step, at full size."""
    built = in_subprocess(BUILD, *NAMES)
    for name, found in built.items():
        config = MODULES[name.partition(":")[0]].get_config(*name.split(":")[1:])
        size = config.data.image_size
        assert found["same"], name
        assert found["batch"], name
        assert found["scored"] == [2, size, size, 3], name
        scale = config.data.batch_size / (config.optim.base_batch or config.data.batch_size)
        peak, floor = config.optim.learning_rate * scale, config.optim.floor * scale
        assert found["rates"] == pytest.approx([0.0, peak, floor], rel=1e-3, abs=1e-9), name
        if not config.model.block_size:  # which the relative tables would follow
            assert found["parameters"] == VARIANTS[config.model.name].params, name


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
    """Those of `known` that a source reads as attributes of a `config`, whole groups included.

    A group is read by group.to_dict() or flatten(group). A key in quotes does not count: validation
    looks at all of them and obeys none.
    """
    read = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and dotted(node.func) == "flatten":
            before, _, group = (dotted(node.args[0]) or "").partition("config.")
            if not before and group:
                read |= {it for it in known if it.startswith(f"{group}.")}
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
        ("flatten(config.augment)", {"augment.rotate", "augment.scale"}),
        ("flatten(config)", set()),
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

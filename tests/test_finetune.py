"""Starting from the weights of a run: what is loaded, what is fresh, and what is refused."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

from experiments.photographs import write_tiles
from halonet import checkpoint, config, run, sharding, steps, train
from tests.small_run import small_config

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run folder that kept averages, of random numbers: (folder, {"params", "batch_stats"})."""
    folder = tmp_path_factory.mktemp("weights")
    saved = small_config()
    config.save_config(saved, folder)
    model = config.build_model(saved, num_classes=3)
    rng = np.random.default_rng(0)
    abstract = model.abstract_variables(32, 32)
    raw, ema = (
        jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), abstract) for _ in range(2)
    )
    checkpoint.save_variables(folder, {**raw, "ema": ema}, {"classes": ["a", "b", "c"]})
    return folder, ema


def fresh(mesh, *, num_classes=10, ema=True, **overrides):
    """(config, model, abstract state, the function that makes the state) of a run to start."""
    chosen = small_config(**overrides)
    model, size = config.build_model(chosen, num_classes=num_classes), chosen.data.image_size
    init = functools.partial(
        steps.init_state, init_fn=model.init, tx=optax.sgd(0.1), image_size=size, ema=ema
    )
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.state_shardings(abstract, mesh)
    make = functools.partial(jax.jit(init, out_shardings=shardings), jax.random.key(0))
    return chosen, model, checkpoint.abstract_on(abstract, shardings), make


def started(mesh, **options):
    """The state of a run that starts so, and what is said about it."""
    chosen, model, abstract, make = fresh(mesh, **options)
    variables, said = run.initial_variables(chosen, model, abstract)
    return steps.start_from(make(), variables), make(), said


def read(**overrides):
    """What a run would start with, and what is said about it."""
    chosen, model, abstract, _ = fresh(sharding.make_mesh(), **overrides)
    return run.initial_variables(chosen, model, abstract)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("fsdp", [1, pytest.param(4, marks=pytest.mark.middle)])
def test_all_but_the_head_is_loaded(weights, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    folder, theirs = weights
    mesh = sharding.make_mesh(fsdp=fsdp)
    state, untouched, said = started(mesh, **{"init.weights": str(folder), "init.skip": "head"})
    same(state.params["head"], untouched.params["head"])
    for collection, found in (("params", state.params), ("batch_stats", state.batch_stats)):
        rest = {name: tree for name, tree in theirs[collection].items() if name != "head"}
        same({name: tree for name, tree in found.items() if name != "head"}, rest)
    # The averages start there too, in buffers of their own; each array lies where it shall.
    same(state.ema, {"params": state.params, "batch_stats": state.batch_stats})
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
        lambda x: x.sharding, untouched
    )
    buffers = [
        leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)
    ]
    assert len(set(buffers)) == len(buffers)
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert bool(split) == (fsdp > 1)
    size = sum(x.size for name, tree in theirs["params"].items() for x in jax.tree.leaves(tree))
    size -= sum(x.size for x in jax.tree.leaves(theirs["params"]["head"]))
    count = len(jax.tree.leaves(theirs)) - 2
    assert said == [
        f"starting from step 0 of {folder} (ema weights): loaded {count} arrays ({size:,} "
        "parameters), fresh: head/bias, head/kernel"
    ]


@pytest.mark.middle
def test_everything_is_loaded_where_nothing_is_skipped(weights):
    folder, theirs = weights
    mesh = sharding.make_mesh()
    state, _, said = started(mesh, num_classes=3, ema=False, **{"init.weights": str(folder)})
    same({"params": state.params, "batch_stats": state.batch_stats}, theirs)
    assert state.ema == {}
    assert said[0].endswith("fresh: none")


def test_parts_are_skipped_by_name(weights):
    folder, theirs = weights
    skip = "head,stage2_block1/attention"
    variables, said = read(**{"init.weights": str(folder), "init.skip": skip})
    block, theirs = variables["params"]["stage2_block1"], theirs["params"]["stage2_block1"]
    for leaf in jax.tree.leaves(block["attention"]):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
    same({**block, "attention": 0}, {**theirs, "attention": 0})
    assert "stage2_block1/attention/row_table" in said[0]


def test_tables_are_resized_by_offset(weights):
    folder, theirs = weights
    overrides = {"init.weights": str(folder), "init.skip": "head", "model.halo_size": 2}
    variables, said = read(**overrides)
    # Of blocks of 4: offsets up to 4, and now up to 5, which take the nearest row.
    for name in ("row_table", "col_table"):
        table, before = (
            tree["params"]["stage1_block1"]["attention"][name] for tree in (variables, theirs)
        )
        np.testing.assert_array_equal(table, before[[0, *range(len(before)), -1]])
    assert said[1] == "  unlike them: model.halo_size -1 there, 2 here"


def test_what_the_weights_were_trained_with_is_compared(weights):
    overrides = {
        "init.weights": str(weights[0]),
        "init.skip": "head",
        "data.mean": (0.5, 0.5, 0.5),
        "model.border": "mask",
        "model.drop_path": 0.4,
    }
    _, said = read(**overrides)
    assert said[1] == (
        "  unlike them: model.border '' there, 'mask' here; "
        "data.mean (0.1, 0.1, 0.1) there, (0.5, 0.5, 0.5) here"
    )


def test_one_error_lists_all_that_does_not_fit(weights):
    overrides = {"init.weights": str(weights[0]), "model.channel_attention": "eca"}
    with pytest.raises(checkpoint.CheckpointError) as refused:
        read(**overrides)
    message = str(refused.value)
    assert message.startswith(f"the weights in {weights[0]} do not fit: params/head/bias: ")
    assert "params/head/bias: float32[3] there, float32[10] wanted; params/head/kernel: " in message
    assert "/kernel: nothing there, float32[" in message
    assert message.endswith("; --config.init.skip=head would leave out the classifier")
    assert "\n" not in message
    with pytest.raises(checkpoint.CheckpointError) as refused:
        read(**overrides, **{"init.skip": "head"})
    assert "head" not in str(refused.value).partition("; what config.init.skip=head names")[0]
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model.name": "halonet26t", "data.image_size": 256},
            "config.init.weights={} is of halonet_tiny, and config.model.name is halonet26t; "
            "set --config.model.name=halonet_tiny",
        ),
        (
            {"init.skip": "heads"},
            "config.init.skip='heads': halonet_tiny has no part 'heads'; it has head, "
            "stage1_block1, stage2_block1, stage2_block2, stage2_block3, stem_bn1, stem_conv1",
        ),
        (
            {"model.positions": "contiguous"},
            "config.init.weights={}: positions='contiguous' cannot take tables of "
            "positions='exact'",
        ),
        (
            {"init.weights": "nowhere"},
            "config.init.weights=nowhere holds no run: there is no config.json in it",
        ),
    ],
)
def test_what_cannot_be_started_from(weights, overrides, message):
    overrides = {"init.weights": str(weights[0]), **overrides}
    message = re.escape(message.format(weights[0]))
    with pytest.raises(config.ConfigError, match=f"^{message}$"):
        read(**overrides)


def test_refused_weights_leave_the_workdir_to_the_next_attempt(tmp_path):
    with pytest.raises(config.ConfigError, match="^config.init.weights=nowhere holds no run"):
        train.train_and_evaluate(small_config(**{"init.weights": "nowhere"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def main(*arguments):
    """Runs main.py on one device: what it printed."""
    done = subprocess.run(
        [sys.executable, "main.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.middle
def test_photographs_are_told_apart_after_finetuning(tmp_path):
    """Tiles of three photographs, one class each, from the weights of digits."""
    assert write_tiles(tmp_path / "photographs") == 328
    small = ("--config.eval.batch_size=16", "--config.data.image_size=32")
    weights, workdir = tmp_path / "digits", tmp_path / "run"
    main(
        *("--config=configs/mnist.py", f"--workdir={weights}", "--config.train.epochs=0"),
        *("--config.train.steps=5", *small),
    )
    finetune = (
        *("--config=configs/finetune.py", f"--workdir={workdir}", *small),
        *(f"--config.data.data_dir={tmp_path / 'photographs'}", f"--config.init.weights={weights}"),
        *("--config.model.name=halonet_tiny", "--config.model.dtype=float32"),
        *("--config.train.epochs=7", "--config.data.threads=2", "--config.data.batch_size=32"),
        "--config.optim.learning_rate=0.003",
    )
    said = main(*finetune)
    assert f"starting from step 5 of {weights} (ema weights): loaded " in said
    assert "fresh: head/bias, head/kernel" in said
    # Colours tell: the digits' normalisation is another.
    assert "unlike them: data.mean (0.1, 0.1, 0.1) there, (0.485, 0.456, 0.406) here" in said
    summary = json.loads((workdir / "summary.json").read_text())
    main(*finetune, "--mode=evaluate")
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result["count"] == summary["eval/count"] > 25
    assert result["top1"] == pytest.approx(summary["best/top1"])
    # Chance is the largest class, two fifths.
    assert result["top1"] > 0.7

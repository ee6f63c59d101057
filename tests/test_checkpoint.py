"""Saving, keeping and restoring, on any sharding; one line where it cannot be."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from halonet import checkpoint, sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    ema: Any


def make_state(step=0, rows=16):
    weights = np.random.default_rng(step).normal(size=(rows, 8)).astype(np.float32)
    return State(
        step=jnp.int32(step),
        params={"kernel": jnp.asarray(weights), "bias": jnp.arange(8, dtype=jnp.bfloat16)},
        ema={"params": {"kernel": jnp.asarray(weights * 2)}},
    )


def make_checkpointer(workdir, *, keep_latest=2, best=()):
    return checkpoint.Checkpointer(workdir, keep_latest=keep_latest, best_steps=lambda: list(best))


def save(workdir, *steps, **options):
    checkpointer = make_checkpointer(workdir, **options)
    for step in steps:
        checkpointer.save(step, make_state(step), {"classes": ["a", "b"]})
    checkpointer.close()


def on_one_device(tree):
    return checkpoint.abstract_on(tree, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def test_round_trip_is_exact(tmp_path):
    state = make_state(7)
    save(tmp_path, 7)
    restored = checkpoint.restore_state(tmp_path, 7, on_one_device(state))
    assert isinstance(restored, State)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)


def test_variables_alone_are_a_checkpoint_and_replace_the_one_before(tmp_path):
    for value in (1.0, 2.0):
        variables = {"params": {"kernel": np.full((2, 3), value, np.float32)}}
        checkpoint.save_variables(tmp_path, variables, {"classes": ["a"]})
    assert checkpoint.saved_steps(tmp_path) == [0]
    folder = checkpoint.step_folder(tmp_path, 0)
    assert checkpoint.read_meta(folder)["classes"] == ["a"]
    restored = checkpoint.restore_arrays(folder, on_one_device(variables))
    jax.tree.map(np.testing.assert_array_equal, restored, variables)


@pytest.mark.parametrize("saved_fsdp", [1, 4])
@pytest.mark.parametrize("restored_fsdp", [1, 2, 8])
def test_restores_on_another_mesh(tmp_path, saved_fsdp, restored_fsdp):
    def laid_out(fsdp):
        return NamedSharding(sharding.make_mesh(fsdp=fsdp), PartitionSpec("fsdp"))

    state = State(step=jnp.int32(3), params={"kernel": jnp.arange(128.0).reshape(16, 8)}, ema={})
    placed = dataclasses.replace(state, params=jax.device_put(state.params, laid_out(saved_fsdp)))
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save(3, placed, {})
    checkpointer.close()
    target = checkpoint.abstract_on(state.params, laid_out(restored_fsdp))
    folder = checkpoint.step_folder(tmp_path, 3)
    restored = checkpoint.restore_arrays(folder, {"params": target})["params"]["kernel"]
    np.testing.assert_array_equal(restored, state.params["kernel"])
    assert restored.sharding == laid_out(restored_fsdp)


def test_keeps_the_latest_and_the_best(tmp_path):
    best = []
    checkpointer = checkpoint.Checkpointer(tmp_path, keep_latest=2, best_steps=lambda: best)
    for step in range(1, 7):
        checkpointer.save(step, make_state(step), {})
        if step == 2:
            best.append(2)  # known only after it was saved
    checkpointer.close()
    assert checkpoint.saved_steps(tmp_path) == [2, 5, 6]


def test_a_relative_workdir_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("run", 4)
    assert checkpoint.saved_steps("run") == [4]
    assert checkpoint.read_meta(checkpoint.step_folder("run", 4))["step"] == 4
    restored = checkpoint.restore_state("run", 4, on_one_device(make_state(4)))
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(4))


def test_the_meta_item(tmp_path):
    save(tmp_path, 4)
    meta = checkpoint.read_meta(checkpoint.step_folder(tmp_path, 4))
    assert meta == {
        "format_version": checkpoint.FORMAT_VERSION,
        "step": 4,
        "classes": ["a", "b"],
    }


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 99)
        save(tmp_path, 4)
    with pytest.raises(checkpoint.CheckpointError, match="format version 99, newer than .* 1;"):
        checkpoint.read_meta(checkpoint.step_folder(tmp_path, 4))


def test_a_missing_step_lists_those_there_are(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of step 9 .* found: none"):
        checkpoint.step_folder(tmp_path, 9)
    save(tmp_path, 4, 6)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of step 9 .* found: 4, 6"):
        checkpoint.step_folder(tmp_path, 9)


def test_an_unfinished_checkpoint_is_not_listed(tmp_path):
    save(tmp_path, 4)
    (tmp_path / checkpoint.FOLDER / "8.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.saved_steps(tmp_path) == [4]
    # The next start clears it away, on a thread of its own.
    make_checkpointer(tmp_path).close()
    deadline = time.monotonic() + 20
    while (tmp_path / checkpoint.FOLDER / "8.orbax-checkpoint-tmp").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"params": {"kernel": jnp.zeros((12, 8)), "bias": jnp.zeros(8, jnp.bfloat16)}},
            r"params/kernel: float32\[16, 8\] there, float32\[12, 8\] wanted$",
        ),
        (
            {"params": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)}},
            r"params/bias: bfloat16\[8\] there, float32\[8\] wanted$",
        ),
        (
            {"ema": {"params": {"other": jnp.zeros(3)}}},
            r"ema/params/kernel: float32\[16, 8\] there, nothing wanted; "
            r"ema/params/other: nothing there, float32\[3\] wanted$",
        ),
    ],
    ids=["shape", "dtype", "names"],
)
def test_another_model_is_one_line_that_lists_every_array(tmp_path, change, message):
    save(tmp_path, 4)
    target = on_one_device(dataclasses.replace(make_state(4), **change))
    with pytest.raises(checkpoint.CheckpointError, match=message) as info:
        checkpoint.restore_state(tmp_path, 4, target)
    assert "\n" not in str(info.value)
    assert info.value.exit_code == 4


@pytest.mark.parametrize("damage", ["delete", "empty"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    save(tmp_path, 4)
    state = checkpoint.step_folder(tmp_path, 4) / "state"
    for path in [path for path in state.iterdir() if not path.is_dir()]:
        path.unlink() if damage == "delete" else path.write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="cannot restore .*/4") as info:
        checkpoint.restore_state(tmp_path, 4, on_one_device(make_state(4)))
    assert "\n" not in str(info.value)


def test_a_damaged_meta_is_one_line(tmp_path):
    save(tmp_path, 4)
    folder = checkpoint.step_folder(tmp_path, 4)
    for path in (folder / "meta").iterdir():
        path.write_bytes(b"{")
    with pytest.raises(checkpoint.CheckpointError, match="not a readable checkpoint") as info:
        checkpoint.read_meta(folder)
    assert "\n" not in str(info.value)


def test_a_failed_save_is_raised_by_the_next_call(tmp_path, monkeypatch):
    checkpointer = make_checkpointer(tmp_path)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("orbax.checkpoint._src.path.atomicity.on_commit_callback", fail)
    checkpointer.save(1, make_state(1), {})
    with pytest.raises(OSError, match="no space left"):
        checkpointer.wait()

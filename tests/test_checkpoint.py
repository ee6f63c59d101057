"""Saving, keeping and restoring, on any sharding; one line where it cannot be."""

import dataclasses
import pathlib
import re
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


@pytest.mark.parametrize("left", ["everything", "all but the meta item", "no file", "one file"])
def test_a_deletion_that_was_cut_off_is_made_good(tmp_path, left):
    """Of a step that was to go: the newer ones count, and the next start deletes the rest."""
    save(tmp_path, 2, 4, 6, keep_latest=3)
    folder = checkpoint.step_folder(tmp_path, 2)
    files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    gone = {
        "everything": [],
        "all but the meta item": [path for path in files if "meta" in path.parts],
        "no file": files,
        "one file": files[1:],
    }
    for path in gone[left]:
        path.unlink()
    said = []
    assert checkpoint.newest_good_step(tmp_path, said.append) == 6
    assert said == []
    save(tmp_path, 8, keep_latest=2)
    assert checkpoint.saved_steps(tmp_path) == [6, 8]
    assert not folder.exists()


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
    with pytest.raises(checkpoint.CheckpointError, match="format version 99, newer than .* 2;"):
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
    message = (
        r"^step 1 could not be saved into .*/checkpoints: .*no space left; [\d.]+ GB are free "
        r"there .*; whole checkpoints there, which the same command goes on from: none$"
    )
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpointer.wait()


def test_a_step_described_by_nonsense_is_one_line(tmp_path):
    save(tmp_path, 4)
    (checkpoint.step_folder(tmp_path, 4) / "_CHECKPOINT_METADATA").write_text("[]")
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoints cannot be opened: .* dict"):
        make_checkpointer(tmp_path)


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def files_of(folder):
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())


def what_is_wrong(folder):
    """What is said of a checkpoint that is damaged; "" where the saved arrays come back."""
    try:
        checkpoint.verify(folder)
        target = on_one_device(make_state(4))
        restored = checkpoint.restore_state(folder.parent.parent, 4, target)
    except checkpoint.CheckpointError as error:
        return str(error)
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(4))
    return ""


def test_a_flipped_bit_is_named_or_harmless(tmp_path):
    """200 of them, each file as likely as another: most of the bytes are arrays'."""
    save(tmp_path, 4)
    folder, rng = checkpoint.step_folder(tmp_path, 4), np.random.default_rng(0)
    files = [path for path in files_of(folder) if path.stat().st_size]
    detected = 0
    for path in rng.choice(files, 200):
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        said = what_is_wrong(folder)
        flip(path, bit)
        if path.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            assert said == ""
            continue
        # The name of a file that was changed in the manifest is that of one which is missing.
        named = path.name if path.name == checkpoint.MANIFEST else path.relative_to(folder)
        assert f"{named}" in said or (path.name == checkpoint.MANIFEST and said)
        assert "\n" not in said
        detected += 1
    assert what_is_wrong(folder) == ""
    assert detected > 100


def test_without_the_manifest_wrong_values_would_come_back(tmp_path):
    """What it is for: Orbax restores a changed array without a word."""
    state = make_state(4, rows=4096)
    checkpointer = make_checkpointer(tmp_path)
    checkpointer.save(4, state, {})
    checkpointer.close()
    folder = checkpoint.step_folder(tmp_path, 4)
    arrays = max(files_of(folder), key=lambda path: path.stat().st_size)
    flip(arrays, 4 * arrays.stat().st_size)
    restored = checkpoint.restore_state(tmp_path, 4, on_one_device(state))
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, restored, state)
    with pytest.raises(checkpoint.CheckpointError, match=arrays.name):
        checkpoint.verify(folder)


@pytest.mark.parametrize("damage", ["flip", "delete", "manifest", "unreadable"])
def test_a_run_goes_on_from_the_newest_good_step(tmp_path, damage):
    save(tmp_path, 2, 4, 6, keep_latest=3)
    said = []
    assert checkpoint.newest_good_step(tmp_path, said.append) == 6
    folder = checkpoint.step_folder(tmp_path, 6)
    name = checkpoint.MANIFEST if damage == "manifest" else "state/_METADATA"
    flip(folder / name, 11) if damage == "flip" else (folder / name).unlink()
    if damage == "unreadable":
        pathlib.Path(folder / name).symlink_to("/nowhere/at/all")
    assert checkpoint.newest_good_step(tmp_path, said.append) == 4
    (line,) = said
    expected = rf"/6 is damaged: .*{name}; it is 6.damaged now, and the run goes on from step 4"
    assert re.search(expected, line)
    assert checkpoint.saved_steps(tmp_path) == [2, 4]
    assert (folder.parent / "6.damaged").is_dir()
    # The step can be saved again, and what was damaged stays where it is.
    save(tmp_path, 6, keep_latest=3)
    assert checkpoint.newest_good_step(tmp_path, said.append) == 6
    assert (folder.parent / "6.damaged").is_dir()


def test_no_good_step_is_one_error_that_names_all(tmp_path):
    assert checkpoint.newest_good_step(tmp_path, print) == 0
    save(tmp_path, 2, 4)
    for step in (2, 4):
        (checkpoint.step_folder(tmp_path, step) / "meta" / "metadata").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"/4 is damaged: .*/2 is damaged: "):
        checkpoint.newest_good_step(tmp_path, print)
    assert checkpoint.saved_steps(tmp_path) == [2, 4]


def test_a_checkpoint_of_before_the_manifest_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 1)
    monkeypatch.setattr(checkpoint.Checkpointer, "_write_manifest", lambda self: None)
    save(tmp_path, 4)
    checkpoint.verify(checkpoint.step_folder(tmp_path, 4))


@pytest.mark.parametrize("step", [3, 4])
def test_a_step_that_is_there_already_is_refused(tmp_path, step):
    save(tmp_path, 4)
    with pytest.raises(checkpoint.CheckpointError, match=f"step {step} is not saved: .* step 4"):
        save(tmp_path, step)

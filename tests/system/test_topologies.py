"""What some devices and processes saved, others restore, whatever their number."""

import asyncio
import hashlib
import json

import jax
import pytest

import halonet
from halonet import checkpoint, sharding
from tests.small_run import saved_arrays
from tests.system.launch import launch


def digests(arrays):
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(arrays.items())}


def tell(found):
    print(json.dumps(found))


def told(call, **options):
    """What a call in this module tells in a process of its own."""
    process = launch("-c", f"from {__name__} import *; {call}", **options)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


def restore_sharded(workdir, step, fsdp):
    """Tells of the whole state, its arrays sharded and replicated over all devices."""
    folder = checkpoint.step_folder(workdir, step)
    stored = checkpoint.ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    stored = jax.tree.map(lambda it: jax.ShapeDtypeStruct(it.shape, it.dtype), stored)
    shardings = sharding.state_shardings(stored, sharding.make_mesh(fsdp=fsdp))
    restored = checkpoint.restore_arrays(folder, checkpoint.abstract_on(stored, shardings))
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    arrays = {jax.tree_util.keystr(path): jax.device_get(leaf).tobytes() for path, leaf in leaves}
    split = sum(not leaf.sharding.is_fully_replicated for _, leaf in leaves)
    tell({"devices": jax.device_count(), "split": split, "arrays": digests(arrays)})


def open_in_a_notebook(workdir):
    """Tells what `load_run` finds inside the event loop that a notebook runs its cells in."""

    async def cell():
        run = halonet.load_run(workdir, step="latest")
        leaves = jax.tree_util.tree_leaves_with_path(run.variables)
        return {jax.tree_util.keystr(path): jax.device_get(leaf).tobytes() for path, leaf in leaves}

    tell({"devices": jax.device_count(), "arrays": digests(asyncio.run(cell()))})


@pytest.mark.middle
@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (4, 2)])
def test_fewer_devices_restore_the_same_bytes(undisturbed, devices, fsdp):
    """Of the eight that saved."""
    workdir, _ = undisturbed
    found = told(f"restore_sharded({str(workdir)!r}, 30, {fsdp})", devices=devices)
    assert found["devices"] == devices
    assert bool(found["split"]) == (fsdp > 1)
    assert found["arrays"] == digests(saved_arrays(workdir, 30))


@pytest.mark.middle
def test_a_notebook_without_flags_opens_it_and_writes_nothing(undisturbed):
    workdir, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    found = told(
        f"open_in_a_notebook({str(workdir)!r})", environment={"XLA_FLAGS": "", "JAX_PLATFORMS": ""}
    )
    assert found["devices"] == 1
    saved = saved_arrays(workdir, 30)
    assert found["arrays"] == digests(
        {name.removeprefix("['ema']"): data for name, data in saved.items() if "['ema']" in name}
    )
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before

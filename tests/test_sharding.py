"""The mesh, the rule for arrays, and what the compiled step says to other devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from halonet import optim, sharding, steps
from halonet.models import create_model

COLLECTIVES = re.compile(
    r"= (\([^)]*\)|\S+) "
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def test_the_mesh_takes_all_devices():
    for asked, found in (
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 4, "fsdp": 2}, (4, 2, 1)),
        ({"rows": 4}, (2, 1, 4)),
        ({"data": 2, "fsdp": 2, "rows": 2}, (2, 2, 2)),
    ):
        mesh = sharding.make_mesh(**asked)
        assert dict(mesh.shape) == dict(zip(("data", "fsdp", "rows"), found, strict=True))
    some = jax.devices()[:4]
    for asked in ({"fsdp": 2}, {"rows": 2}):
        assert sharding.make_mesh(**asked, devices=some).devices.flatten().tolist() == some


def test_the_devices_of_an_image_are_of_one_process_and_side_by_side():
    ids = [[device.id for device in rows] for rows in sharding.make_mesh(rows=4).devices[:, 0]]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("rows", [0, 3, 16])
def test_rows_that_do_not_divide_the_devices_of_a_process_are_refused(rows):
    message = rf"mesh.rows={rows} does not divide the 8 devices of a process.* \[1, 2, 4, 8\]"
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(rows=rows)


def test_images_lie_by_rows_and_labels_do_not():
    mesh = sharding.make_mesh(rows=4)
    assert sharding.batch_sharding(mesh, 4).shard_shape((4, 8, 8, 3)) == (2, 2, 8, 3)
    assert sharding.batch_sharding(mesh, 1).shard_shape((4,)) == (2,)
    assert sharding.batch_sharding(mesh, 2).shard_shape((4, 8)) == (2, 8)


def test_what_is_compiled_for_a_mesh_finds_it():
    mesh = sharding.make_mesh(fsdp=2)
    axes = PartitionSpec(("data", "fsdp"))

    def shares(x):
        if jax.sharding.get_abstract_mesh().empty:
            return x
        # As a kernel splits itself: each device adds up what it has.
        return jax.shard_map(lambda x: x * x.sum(), in_specs=axes, out_specs=axes)(x)

    x = jax.device_put(jnp.ones(16), sharding.batch_sharding(mesh))
    np.testing.assert_array_equal(jax.jit(shares)(x), 1)
    np.testing.assert_array_equal(jax.jit(sharding.seeing(mesh, shares))(x), 2)
    gradient = jax.jit(sharding.seeing(mesh, jax.grad(lambda x: shares(x).sum())))
    np.testing.assert_array_equal(gradient(x), 4)
    assert sharding.seeing(mesh, shares).__name__ == "shares"  # what logs and caches call it


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (8, 2), (0, 3), (0, 0)])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp):
    asked = f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.rows=1"
    message = rf"{asked} does not fit 8 devices; .* \[1, 2, 4, 8\]"
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(data=data, fsdp=fsdp)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 128), PartitionSpec(None, "fsdp")),
        ((128, 64), PartitionSpec("fsdp")),
        ((4096, 3), PartitionSpec("fsdp")),
        ((8, 8), PartitionSpec()),  # small
        ((4097, 3), PartitionSpec()),  # nothing that 4 divides
    ],
)
def test_the_rule(shape, spec):
    mesh = sharding.make_mesh(fsdp=4)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert sharding.state_shardings(leaf, mesh).spec == spec
    assert sharding.state_shardings(leaf, sharding.make_mesh()).spec == PartitionSpec()


def make_step(mesh, *, name="adamw", bn_group=2):
    """The state and the compiled-to-be step of a tiny model on a mesh."""
    model = create_model("halonet_tiny", num_classes=10, bn_group=bn_group, depths=(1, 1))
    schedule = optim.warmup_cosine(peak=0.05, total_steps=100, warmup=0.0)
    tx = optim.make_optimizer(
        name, learning_rate=schedule, momentum=0.9, weight_decay=0.01, clip_norm=1.0
    )
    init = functools.partial(steps.init_state, init_fn=model.init, tx=tx, image_size=32, ema=True)
    key = jax.random.key(0)
    shardings = sharding.state_shardings(jax.eval_shape(init, key), mesh)
    # Made on one device: sharded or not, the numbers are the same.
    state = jax.device_put(jax.jit(init)(key), shardings)
    step = jax.jit(
        functools.partial(
            sharding.seeing(mesh, steps.train_step),
            apply_fn=model.apply,
            tx=tx,
            learning_rate=schedule,
            mean=(0.1,) * 3,
            std=(0.3,) * 3,
            label_smoothing=0.1,
            ema_decay=0.99,
        ),
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    return state, step


def make_batch(mesh, seed=0):
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.integers(0, 256, (32, 32, 32, 3)).astype(np.uint8),
        "label": rng.integers(0, 10, 32).astype(np.int32),
    }
    return jax.device_put(batch, sharding.batch_sharding(mesh))


def collectives(compiled):
    """The collective operations in a compiled program, as (result types, name)."""
    return [(m[1], m[2]) for m in COLLECTIVES.finditer(compiled.as_text())]


def test_the_step_has_one_all_reduce_and_nothing_else():
    mesh = sharding.make_mesh()
    state, step = make_step(mesh)
    parameters = len(jax.tree.leaves(state.params))
    found = collectives(step.lower(state, make_batch(mesh)).compile())
    assert [name for _, name in found] == ["all-reduce"]
    # It carries every gradient, and besides them only running statistics and sums.
    statistics = len(jax.tree.leaves(state.batch_stats))
    reduced = found[0][0].count("f32[")
    assert parameters <= reduced <= parameters + statistics + 3


@pytest.mark.middle
def test_global_statistics_would_cost_more():
    """The same reader on a step that does communicate: it can see what it must not find."""
    mesh = sharding.make_mesh()
    state, step = make_step(mesh, bn_group=0)
    assert len(collectives(step.lower(state, make_batch(mesh)).compile())) > 1


def losses(mesh, count=3):
    state, step = make_step(mesh, name="sgd")
    found = []
    for k in range(count):
        state, metrics = step(state, make_batch(mesh, seed=k))
        found.append(float(metrics["loss"]))
    return found


@pytest.fixture(scope="module")
def one_device():
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    return losses(jax.sharding.Mesh(devices, ("data", "fsdp")))


@pytest.mark.middle
@pytest.mark.parametrize("fsdp", [1, 4])
def test_eight_devices_train_as_one(fsdp, one_device):
    np.testing.assert_allclose(losses(sharding.make_mesh(fsdp=fsdp)), one_device, rtol=1e-5)


def test_fsdp_really_splits_the_state():
    mesh = sharding.make_mesh(fsdp=4)
    state, _ = make_step(mesh)
    kernel = state.params["stage2_block1"]["conv3"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    momentum = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, dict))
    assert any(
        leaf.size >= sharding.MIN_SHARDED_SIZE and not leaf.is_fully_replicated
        for leaf in jax.tree.leaves(momentum)
    )

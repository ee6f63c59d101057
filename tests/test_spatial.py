"""Images whose rows several devices share: each layer, its gradients, and what devices exchange."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from halonet import aot, checkpoint, recipe, sharding, steps, train
from halonet import config as config_lib
from halonet.models import create_model, layers, pool
from halonet.ops import IMPLEMENTATIONS, halo_attention, on_each_device, table_size, with_neighbours
from tests.small_run import rows, saved_arrays, small_config

COLLECTIVES = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def make_mesh(data, rows):
    axes = ("data", "fsdp", "rows")
    devices = jax.devices()[: data * rows]
    return jax.make_mesh((data, 1, rows), axes, (AxisType.Auto,) * 3, devices=devices)


def check(function, maps, arrays, mesh, kinds=frozenset({"collective-permute", "all-reduce"})):
    """Values and gradients as without a mesh, and no collectives but those of `kinds`."""
    part, whole = NamedSharding(mesh, P(("data", "fsdp"), "rows")), NamedSharding(mesh, P())
    inputs = (*maps, *arrays)
    layout = (part,) * len(maps) + (whole,) * len(arrays)
    shape = jax.eval_shape(function, *inputs)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=shape.shape), shape.dtype)

    def both(cotangent, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(cotangent)

    right = jax.jit(lambda *x: both(*x))(cotangent, *inputs)
    with jax.set_mesh(mesh):
        split = jax.jit(both, in_shardings=(part, *layout), out_shardings=(part, layout))
        split = split.lower(cotangent, *inputs).compile()
    assert set(COLLECTIVES.findall(split.as_text())) == kinds
    found = split(*jax.device_put((cotangent, *inputs), (part, *layout)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-4), found, right)


def attention(
    implementation, *, height=32, stride=1, block=4, halo=2, positions="exact", **options
):
    """The op and its arguments: maps of two blocks a row."""
    rng = np.random.default_rng(0)
    width, table = 2 * block, (table_size(block, halo, positions), 4)
    queries = (4, height // stride, width // stride, 2, 4)
    shapes = [queries, (4, height, width, 2, 4), (4, height, width, 2, 8), table, table]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    op = functools.partial(
        halo_attention,
        block=block,
        halo=halo,
        stride=stride,
        positions=positions,
        implementation=implementation,
        **options,
    )
    return op, tuple(arrays[:3]), tuple(arrays[3:])


EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def test_rows_of_blocks_are_shared():
    """One a device."""
    check(*attention("xla_shift", height=16, border="mask"), make_mesh(1, 4))


@EACH
@pytest.mark.middle
def test_every_form_shares_rows_of_blocks(implementation):
    check(*attention(implementation, height=8, border="mask"), make_mesh(2, 2))


@EACH
@pytest.mark.long
@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_form_shares_rows_in_every_way(implementation, border, mesh, stride):
    check(*attention(implementation, border=border, stride=stride), make_mesh(*mesh))


@pytest.mark.long
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if "xla" in name])
def test_conventions_of_others_are_shared(implementation):
    options = {"positions": "contiguous", "scale_positions": False, "stride": 2}
    check(*attention(implementation, **options), make_mesh(1, 4))


@pytest.mark.middle
def test_halos_of_more_than_a_block_come_from_the_next_device_alone():
    check(*attention("xla_shift", height=16, halo=6), make_mesh(1, 2))
    op, maps, tables = attention("xla_shift", height=16, halo=6)
    with (
        jax.set_mesh(make_mesh(1, 4)),
        pytest.raises(NotImplementedError, match="6 rows of a neighbour that has 4: .* than 4"),
    ):
        op(*maps, *tables)


@pytest.mark.parametrize("pad", [False, True])
def test_rows_that_are_no_whole_blocks_on_each_device_are_refused(pad):
    op, maps, tables = attention("xla_shift", height=24, pad_to_blocks=pad)
    message = r"4 devices \(mesh.rows\) cannot share height 24 in blocks of 4, padded .* can: 32"
    with jax.set_mesh(make_mesh(1, 4)), pytest.raises(ValueError, match=message):
        op(*maps, *tables)


@pytest.mark.middle
def test_columns_are_padded_to_blocks():
    op, maps, tables = attention("xla_shift", height=16, pad_to_blocks=True, border="mask")
    check(op, tuple(x[:, :, :7] for x in maps), tables, make_mesh(1, 4))


def test_what_lies_beyond_the_image_is_told():
    def part(x):
        return with_neighbours(x, 1, 2, outside=-1.0)

    x = jnp.arange(1.0, 9).reshape(1, 8, 1)
    with jax.set_mesh(make_mesh(1, 4)):
        found = jax.jit(lambda x: on_each_device(part, (x,), ()))(x)
    expected = [-1, 1, 2, 3, 4, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 6, 7, 8, -1, -1]
    np.testing.assert_array_equal(found[0, :, 0], expected)


def convolution(size, stride, groups=1):
    def convolve(x, kernel):
        padding = ((size // 2, size // 2),) * 2
        return layers.convolution(x, kernel, (stride,) * 2, padding, feature_group_count=groups)

    return convolve, (size, size, 4 // groups, 8)


def halving(size):
    module = layers.HalvingConv(8, size)
    return lambda x, kernel: module.apply({"params": {"kernel": kernel}}, x), (size, size, 4, 8)


def pointwise(stride):
    module = layers.Conv1x1(8, stride)
    return lambda x, kernel: module.apply({"params": {"kernel": kernel}}, x), (4, 8)


LAYERS = {
    "conv 3x3": convolution(3, 1),
    "conv 3x3 of stride 2": convolution(3, 2),
    "conv 7x7 of stride 2": convolution(7, 2),
    "grouped conv": convolution(3, 1, groups=2),
    "halving conv 3x3": halving(3),
    "halving conv 7x7": halving(7),
    "conv 1x1": pointwise(1),
    "conv 1x1 of stride 2": pointwise(2),
    "max-pool": (pool.max_pool, None),
    "max-pool with zeros": (pool.max_pool_zeros, None),
    "average pool": (functools.partial(layers.average_pool, size=2), None),
}

POINTWISE = ("conv 1x1", "conv 1x1 of stride 2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("grouped conv", "max-pool") else pytest.mark.middle)
        for name in LAYERS
    ],
)
def test_layers_share_rows(name):
    function, kernel = LAYERS[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 16, 8, 4)), jnp.float32)
    kernels = (jnp.asarray(rng.normal(size=kernel), jnp.float32),) if kernel else ()
    kinds = {"collective-permute"} if name not in ("average pool", *POINTWISE) else set()
    kinds |= {"all-reduce"} if kernel else set()
    check(function, (x,), kernels, make_mesh(1, 4), kinds)


def training(mesh, *, implementation=None, **overrides):
    """The whole step of a tiny model with four rows of blocks in its last stage, and a state."""
    settings = {"data.image_size": 64, "data.batch_size": 8, "optim.name": "sgd", **overrides}
    config = small_config(**settings)
    fields = {"depths": (1, 1), "implementation": implementation}
    model = config_lib.build_model(config, num_classes=10, **fields)
    schedule = recipe.schedule(config, 100)
    tx = recipe.optimizer(config, schedule)
    init = functools.partial(steps.init_state, init_fn=model.init, tx=tx, image_size=64, ema=True)
    step = recipe.train_step(config, model, tx, schedule, mesh)
    return step, init, recipe.abstract_batch(config, mesh)


def run_step(mesh, collectives, **overrides):
    """The state and the metrics after a step that exchanges no more than `collectives`."""
    step, init, batch = training(mesh, **overrides)
    state = jax.jit(init)(jax.random.key(0))
    # No branch switched off, as by its last norm at the start.
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype("f"), state.params)
    state = steps.start_from(state, {"params": params, "batch_stats": state.batch_stats})
    images = noise.integers(0, 256, batch["image"].shape).astype(np.uint8)
    values = {"image": images, "label": np.arange(8, dtype=np.int32)}
    inputs = (
        jax.device_put(state, sharding.replicated(mesh)),
        {name: jax.device_put(values[name], x.sharding) for name, x in batch.items()},
    )
    compiled = jax.jit(step, out_shardings=sharding.replicated(mesh)).lower(*inputs).compile()
    assert set(COLLECTIVES.findall(compiled.as_text())) == collectives
    return jax.device_get(compiled(*inputs))


@pytest.mark.middle
@pytest.mark.parametrize("mesh", [(1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        # Which examples make a part, and so what drops an example's path, is up to the devices.
        pytest.param({"train.accumulate": 2, "model.drop_path": 0.0}, marks=pytest.mark.long),
    ],
    ids=["whole", "parts"],
)
def test_a_step_is_that_of_one_device(mesh, overrides):
    """With stochastic depth, mixing, groups of batch norm, averages and clipping."""
    found = run_step(make_mesh(*mesh), {"collective-permute", "all-reduce"}, **overrides)
    # The gradient itself is what SGD's momentum holds after a step.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, found, run_step(make_mesh(1, 1), set(), **overrides))


@pytest.mark.middle
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra tpu-aot")
def test_the_step_compiles_for_a_tpu_with_the_fused_kernel():
    devices = np.array(aot.topology("v5e:2x2").devices).reshape(1, 1, 4)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "rows"), axis_types=(AxisType.Auto,) * 3)
    # Mixing draws from a distribution by a loop of as many trips as it takes, which has no cost.
    settings = {"model.dtype": "bfloat16", "augment.mixup": 0.0}
    step, init, batch = training(mesh, implementation="pallas_tpu", **settings)
    where = sharding.replicated(mesh)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(init, jax.random.key(0)),
    )
    program = aot.compile_for(step, state, batch)
    assert sum(op.kind == "kernel" for op in program.operations) == 4
    assert program.collectives.keys() == {"collective-permute", "all-reduce"}


def test_rows_that_devices_cannot_share_are_refused_before_anything_compiles():
    config = small_config(**{"data.image_size": 64, "mesh.rows": 8})
    message = (
        r"config.data.image_size=64: mesh.rows=8 does not divide the rows of blocks of stage 2, 4; "
        r"for 64 pixels mesh.rows can be 1 or 2 or 4, and with mesh.rows=8 an image can have 128 pi"
    )
    with pytest.raises(config_lib.ConfigError, match=message):
        config_lib.validate(config, num_classes=10)
    config.mesh.rows = 4
    config_lib.validate(config, num_classes=10)
    config.data.batch_size = 17
    with pytest.raises(config_lib.ConfigError, match="by 2 times 4 .config.mesh.rows. devices"):
        config_lib.validate(config, num_classes=10)


@pytest.mark.parametrize(
    ("name", "height", "message"),
    [
        # 600 px: maps of 150, 75, 38 and 19 rows, padded.
        ("halonet_h7", 600, "2 .* rows of blocks of stage 1, 15; .* can be 1, .* can have 640 pix"),
        ("lamhalobotnet50ts_256", 256, "2, but stage 2 has lambda layer, .* mesh.rows can be 1"),
        (
            "resnet50",
            224,
            "3 .* rows of the maps of stage 1, 56; .* be 1 or 7, .* have 192 or 288",
        ),
    ],
)
def test_models_say_which_rows_and_sizes_would_do(name, height, message):
    model = create_model(name)
    model.check_row_devices(height, 1)
    with pytest.raises(ValueError, match=f"mesh.rows={message}"):
        model.check_row_devices(height, int(message[0]))


@pytest.mark.middle
def test_what_was_saved_by_rows_goes_on_without(tmp_path, monkeypatch):
    config = small_config(
        **{"data.name": "fake:64:10", "data.image_size": 64, "optim.name": "sgd"},
        **{"train.steps": 4, "eval.every_steps": 2, "eval.batch_size": 8},
    )
    train.train_and_evaluate(config, tmp_path / "one")
    save = train.Checkpointer.save

    def crashing(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    by_rows = config.copy_and_resolve_references()
    by_rows.mesh.rows = 4
    with monkeypatch.context() as patch:
        patch.setattr(train.Checkpointer, "save", crashing)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(by_rows, tmp_path / "two")
    assert checkpoint.saved_steps(tmp_path / "two") == [2]
    train.train_and_evaluate(config, tmp_path / "two")

    found, right = (saved_arrays(tmp_path / name, 4) for name in ("two", "one"))
    assert found.keys() == right.keys()
    for name in right:
        ours, theirs = (np.frombuffer(x[name], np.float32) for x in (found, right))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)
    # The evaluation of the second step was by rows, and the last one was not.
    for ours, theirs in zip(
        *(rows(tmp_path / name, "eval/") for name in ("two", "one")), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-4)

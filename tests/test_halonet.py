"""HaloNet: forward passes at each model's own size, what it refuses, how it starts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models import VARIANTS, create_model, list_models
from halonet.models.block import REMATS, BlockShape, BottleneckBlock, stage_plan

SMALL = ["halonet_h0", "halonet_h1", "halonet_h2", "halonet_h3", "halonet_tiny"]


def random_variables(model, size):
    """Variables of the right shapes with random values, cheaper than initialising."""
    images = jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            values = np.abs(rng.normal(size=leaf.shape))
        else:
            # Kernels that keep the size of what they multiply, however deep the network.
            values = rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def evaluate(model, variables, images):
    """The model's output, compiled as a whole: op by op takes longer here."""
    return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)


def forward(name, height, width, **overrides):
    model = create_model(name, **overrides)
    variables = random_variables(model, VARIANTS[name].image_size)
    images = jax.random.normal(jax.random.key(0), (1, height, width, 3))
    return evaluate(model, variables, images)


# Those of timm run in tests/test_golden.py.
@pytest.mark.parametrize(
    "name",
    [
        *("halonet_h0", "halonet_tiny"),
        *(pytest.param(name, marks=pytest.mark.middle) for name in SMALL[1:4]),
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in list_models()
            if name not in SMALL and VARIANTS[name].origin in ("paper", "ours")
        ),
    ],
)
def test_forward_at_its_own_size(name):
    size = VARIANTS[name].image_size
    logits = forward(name, size, size)
    assert logits.shape == (1, 1000)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    assert np.std(logits) > 0


@pytest.mark.long
@pytest.mark.parametrize(("height", "width"), [(384, 512), (401, 333)])
@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_h4_at_other_sizes(height, width, border):
    logits = forward("halonet_h4", height, width, border=border, pad_to_blocks=True)
    assert np.isfinite(logits).all()
    assert np.std(logits) > 0


def test_padding_changes_nothing_where_blocks_fit():
    images = jax.random.normal(jax.random.key(0), (2, 32, 48, 3))
    variables = random_variables(create_model("halonet_tiny", num_classes=10), 32)
    plain, padded = (
        evaluate(create_model("halonet_tiny", num_classes=10, pad_to_blocks=pad), variables, images)
        for pad in (False, True)
    )
    np.testing.assert_array_equal(plain, padded)


def test_any_size_with_padding():
    model = create_model("halonet_tiny", num_classes=10, pad_to_blocks=True, border="mask")
    variables = random_variables(model, 32)
    images = jax.random.normal(jax.random.key(0), (2, 5, 70, 3))
    maps = evaluate(model.clone(features_only=True), variables, images)
    for found, (stride, channels) in zip(maps, model.features, strict=True):
        assert found.shape == (2, -(-5 // stride), -(-70 // stride), channels)
        assert np.isfinite(found).all()


def test_features_are_what_the_head_sees():
    model = create_model("halonet_tiny", num_classes=10)
    variables = random_variables(model, 32)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    *_, last = evaluate(model.clone(features_only=True), variables, images)
    head = variables["params"]["head"]
    logits = last.mean((1, 2)) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(evaluate(model, variables, images), logits, rtol=1e-5)
    # A detector's backbone has no head to train.
    shapes = jax.eval_shape(
        lambda: model.clone(features_only=True).init(jax.random.key(0), images, train=False)
    )
    assert "head" not in shapes["params"]


@pytest.mark.parametrize(
    ("plan", "depths", "spelled"),
    [
        ("", (2, 3), ("hh", "hhh")),
        ("c/h", (2, 3), ("cc", "hhh")),
        ("c/chc", (2, 3), ("cc", "chc")),
        ("b/l", (1, 1), ("b", "l")),
    ],
)
def test_a_plan_is_spelled_out(plan, depths, spelled):
    assert stage_plan(plan, depths) == spelled


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("c", r"plan 'c' has 1 stages; depths \(2, 3\) have 2"),
        ("c/x", r"plan 'c/x' has a block 'x'; there are c \(convolution\), h \(halo att"),
        ("c/ch", r"plan 'c/ch' has 2 blocks in stage 2; write one letter, or 3"),
        ("/h", r"plan '/h' has 0 blocks in stage 1; write one letter, or 2"),
    ],
)
def test_a_wrong_plan_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        stage_plan(plan, (2, 3))


def test_stages_are_of_the_kinds_of_the_plan():
    model = create_model("halonet_tiny", plan="c/hch", num_classes=10)
    params = random_variables(model, 32)["params"]
    kinds = {name: "conv2" in params[name] for name in params if "block" in name}
    assert kinds == {
        "stage1_block1": True,
        "stage2_block1": False,
        "stage2_block2": True,
        "stage2_block3": False,
    }
    assert "attention" in params["stage2_block1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "gelu"}, "activation 'gelu' is unknown; there are: relu, silu"),
        ({"border": "wrap"}, "border 'wrap' is unknown; there are: zeros, mask"),
        ({"channel_attention": "cbam"}, "channel_attention 'cbam' is unknown; .* none, se, eca"),
        (
            {"channel_attention": "se", "channel_attention_in": "l"},
            "channel_attention 'se' is in no block: this model has none of the kinds 'l'",
        ),
        ({"plan": "h/b"}, "b blocks need global_size"),
        ({"heads": (2, 3)}, "width 64 cannot be shared by 3 heads"),
        ({"heads": (2,)}, r"heads \(2,\) must have 2 numbers, one a stage"),
        ({"depths": (1, 0)}, r"depths \(1, 0\) must be positive whole numbers"),
        ({"out_ratio": (1.0,)}, r"out_ratio \(1.0,\) must have 2 numbers, one a stage"),
        ({"key_ratio": 0.001}, "a block of stage 1 would have no channels: .*key_width=0"),
        ({"block_size": 0}, "block_size 0 must be at least 1"),
        ({"halo_size": -1}, "halo_size -1 must be at least 0"),
        ({"block_size": 7}, "block_size 7 is odd, .* take an even one, or downsample 'pool'"),
        ({"plan": "c/h", "group_width": 5}, "group_width 5 does not divide the 32 channels"),
        ({"stem_kernel": 4}, "stem_kernel 4 must be odd"),
        ({"remat": "all"}, "remat 'all' is unknown; there are: none, attention, block"),
        ({"drop_path": 1.0}, "drop_path 1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout -0.1 must be at least 0 and below 1"),
        ({"implementation": "cuda"}, "implementation 'cuda' is unknown; there are: None, ref"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        create_model("halonet_tiny", **fields).check_fields()


def test_channels_are_whole_numbers():
    model = create_model("halonet_tiny")
    object.__setattr__(model, "widths", (32, 64.5))  # in tests alone types are checked before
    with pytest.raises(ValueError, match=r"widths \(32, 64.5\) must be positive whole numbers"):
        model.check_fields()


def loss_of(remat, size, **overrides):
    """A tiny model's variables, and (params, batch_stats, images) -> its loss, new statistics."""
    options = {"num_classes": 10, "bn_group": 2, "depths": (1, 1), "implementation": "xla_shift"}
    model = create_model("halonet_tiny", remat=remat, **{**options, **overrides})

    def loss(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return (logits**2).mean(), updates["batch_stats"]

    return random_variables(model, size), loss


@pytest.mark.middle
def test_remat_keeps_less_for_the_backward_pass():
    images = jnp.zeros((4, 16, 16, 3))
    kept = {}
    for remat in REMATS:
        variables, loss = loss_of(remat, 16)
        backward = jax.eval_shape(
            lambda *arguments, f=loss: jax.vjp(f, *arguments, has_aux=True)[1],
            *(variables["params"], variables["batch_stats"], images),
        )
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(backward))
    # With the stem's own, which all of them keep.
    assert kept["attention"] < 0.65 * kept["none"]
    assert kept["block"] < 0.5 * kept["attention"]


@pytest.mark.middle
def test_remat_changes_no_result():
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    found = {}
    for remat in REMATS:
        variables, loss = loss_of(remat, 16)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        found[remat] = step(variables["params"], variables["batch_stats"], images)
    (_, stats), gradients = found["none"]
    assert not jax.tree.all(jax.tree.map(np.array_equal, stats, variables["batch_stats"]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    for remat in REMATS:
        # One tree of parameters, and running statistics that were moved on once.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, found[remat], found["none"])


@pytest.mark.middle
def test_remat_saves_memory_on_a_tpu():
    """As compiled for one: XLA's CPU backend does not put off what is computed again."""
    pytest.importorskip("libtpu")
    from experiments import tpu_aot

    taken = {}
    images = jnp.zeros((32, 32, 32, 3))
    for remat in ("none", "block"):
        variables, loss = loss_of(remat, 32, depths=(4, 1), bn_group=0, dtype=jnp.bfloat16)
        arguments = variables["params"], variables["batch_stats"], images
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        program = tpu_aot.compile_for(jax.grad(loss, has_aux=True), *arguments)
        taken[remat] = program.memory.temp_size_in_bytes
    assert taken["block"] < taken["none"] / 3


def test_stochastic_depth_leaves_branches_of_examples_out():
    """More of them the deeper the block; what is kept is scaled up, so that its mean stays."""
    model = create_model("halonet_tiny", num_classes=4, drop_path=0.6, depths=(1, 2), bn_group=0)
    variables = random_variables(model, 16)
    images = jax.random.normal(jax.random.key(1), (256, 16, 16, 3))
    kept = {"drop_path", "bn3", "stage2_block1", "stage2_block2"}
    run = jax.jit(
        functools.partial(
            model.apply,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: module.name in kept,
        )
    )
    _, found = run(variables, images, rngs={"dropout": jax.random.key(2)})
    found = found["intermediates"]
    assert "drop_path" not in found["stage1_block1"]
    for name, rate in (("stage2_block1", 0.3), ("stage2_block2", 0.6)):
        before, after = (found[name][layer]["__call__"][0] for layer in ("bn3", "drop_path"))
        left_out = (after == 0).all((1, 2, 3))
        # Three standard deviations of a binomial share.
        assert abs(left_out.mean() - rate) < 3 * np.sqrt(rate * (1 - rate) / 256)
        right = np.where(left_out[:, None, None, None], 0, before / (1 - rate))
        np.testing.assert_allclose(after, right, rtol=1e-5, atol=1e-6)
    # Without its branch a block is its shortcut, here its input, which an activation made.
    before, after = (found[name]["__call__"][0] for name in ("stage2_block1", "stage2_block2"))
    np.testing.assert_array_equal(after[left_out], before[left_out])
    assert not np.array_equal(after[~left_out], before[~left_out])


def test_dropout_of_the_pooled_channels():
    options = {"dropout": 0.25, "bn_group": 0, "activation": "silu"}  # which has no zeros itself
    model = create_model("halonet_tiny", num_classes=4, **options)
    variables = random_variables(model, 16)
    images = jax.random.normal(jax.random.key(1), (64, 16, 16, 3))
    run = functools.partial(
        model.apply,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: module.name == "dropout_head",
    )
    _, found = jax.jit(run)(variables, images, rngs={"dropout": jax.random.key(2)})
    (pooled,) = found["intermediates"]["dropout_head"]["__call__"]
    assert abs((np.asarray(pooled) == 0).mean() - 0.25) < 0.02


def test_nothing_is_dropped_in_evaluation():
    plain = create_model("halonet_tiny", num_classes=4)
    dropping = create_model("halonet_tiny", num_classes=4, drop_path=0.5, dropout=0.5)
    variables = random_variables(plain, 16)
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    found = (evaluate(model, variables, images) for model in (plain, dropping))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_stays_near_float32(dtype):
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    # Random, for a fresh network's residual branches are switched off.
    variables = random_variables(create_model("halonet_tiny", num_classes=10), 32)

    def logits(dtype):
        model = create_model("halonet_tiny", num_classes=10, dtype=dtype)
        output = evaluate(model, variables, images)
        assert output.dtype == jnp.float32
        return np.asarray(output)

    exact = logits(jnp.float32)
    # bfloat16 keeps 8 bits; a dozen layers may lose three of them.
    bound = 0.0 if dtype == jnp.float32 else 2**-5
    assert np.abs(logits(dtype) - exact).max() <= bound * np.abs(exact).max()


def test_images_may_be_rectangular():
    model = create_model("halonet_tiny", num_classes=10)
    images = jnp.ones((2, 32, 48, 3))
    variables = random_variables(model, 32)
    assert evaluate(model, variables, images).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "height", "width", "message"),
    [
        ("halonet_h3", 600, 600, "image height 600 .* blocks of 10 .* work: 320 and 640"),
        ("halonet_h1", 256, 224, "image width 224 .* blocks of 8 .* work: 256"),
        ("halonet_tiny", 0, 32, "image height 0 is not positive"),
        ("halonet_tiny", 8, 32, "image height 8 .* work: 16; with pad_to_blocks any size does"),
        ("halonet_h7", 32, 0, "image width 0 is not positive"),
        ("halo2botnet50ts_256", 512, 256, "size 512x256 does not fit .* 8x8 .*: 256x256 does"),
    ],
)
def test_sizes_that_blocks_do_not_divide_are_refused(name, height, width, message):
    model = create_model(name)
    with pytest.raises(ValueError, match=message):
        model.check_image_size(height, width)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, height, width, 3)), train=False)
        )


@pytest.mark.parametrize("name", list_models())
def test_the_named_size_works(name):
    size = VARIANTS[name].image_size
    model = create_model(name)
    model.check_image_size(size, size)
    assert size % model.size_unit == 0


def bottleneck(shape):
    """A block of `shape` as HaloNet makes its own."""
    model = create_model("halonet_tiny", block_size=4, halo_size=2)
    names = {field.name for field in dataclasses.fields(BottleneckBlock)}
    fields = {key: value for key, value in vars(model).items() if key in names - {"parent", "name"}}
    return BottleneckBlock(shape=shape, activate_sum=True, **fields)


@pytest.mark.middle
def test_a_block_starts_as_its_shortcut():
    shape = BlockShape("h", 16, 8, 16, 8, 8, heads=2, stride=1, shortcut="identity")
    block = bottleneck(shape)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 16))
    variables = block.init(jax.random.key(1), x, train=False)
    output, _ = block.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(output, jax.nn.relu(x), atol=1e-6)


def test_value_ratio_widens_values_and_out_ratio_the_output_only():
    def kernels(**ratios):
        model = create_model("halonet_tiny", **ratios)
        images = jnp.zeros((1, 32, 32, 3))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
        block = shapes["params"]["stage2_block2"]
        attention = block["attention"]
        return {
            "query": attention["query"]["kernel"].shape[-1],
            "key": attention["key"]["kernel"].shape[-1],
            "value": attention["value"]["kernel"].shape[-1],
            "conv1": block["conv1"]["kernel"].shape[-1],
            "conv3": block["conv3"]["kernel"].shape[-1],
        }

    base = kernels(value_ratio=1.0, out_ratio=1.0)
    assert kernels(value_ratio=2.0, out_ratio=1.0) == {**base, "value": 2 * base["value"]}
    assert kernels(value_ratio=1.0, out_ratio=3.0) == {**base, "conv3": 3 * base["conv3"]}

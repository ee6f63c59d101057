"""The pure functions of a step, against answers worked out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halonet import steps
from halonet.models import create_model


class Linear:
    """A model with one kernel and one running statistic, small enough to check by hand."""

    @staticmethod
    def init(key, images, *, train):
        del key, train
        width = images[0].size
        return {
            "params": {"kernel": jnp.zeros((width, 3))},
            "batch_stats": {"mean": jnp.zeros(())},
        }

    @staticmethod
    def apply(variables, images, *, train, mutable=None, rngs=None):
        logits = images.reshape(len(images), -1) @ variables["params"]["kernel"]
        if not train:
            return logits
        assert mutable == ["batch_stats"]
        assert rngs.keys() == {"dropout"}
        return logits, {"batch_stats": {"mean": variables["batch_stats"]["mean"] + 1.0}}


SCALE = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (4, 2, 2, 3)), jnp.uint8),
        "label": jnp.array([0, 1, 2, 1], jnp.int32),
    }


def make(ema=True, learning_rate=0.1):
    tx = optax.sgd(learning_rate)
    state = steps.init_state(jax.random.key(0), init_fn=Linear.init, tx=tx, image_size=2, ema=ema)
    return state, tx


def train_step(state, batch, tx, **kwargs):
    defaults = {"apply_fn": Linear.apply, "label_smoothing": 0.0, "ema_decay": 0.9, **SCALE}
    return steps.train_step(
        state, batch, tx=tx, learning_rate=lambda step: 0.1 * (step + 1), **{**defaults, **kwargs}
    )


def test_normalize():
    images = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    output = steps.normalize(images, (0.0, 0.2, 0.5), (1.0, 0.5, 0.25))
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output.ravel(), [0.0, 0.0, 2.0], atol=1e-6)


def test_cross_entropy_with_smoothing():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    plain = steps.cross_entropy(logits, steps.smooth_targets(jnp.array([0]), 3, 0.0))
    np.testing.assert_allclose(plain, [np.log(2)], rtol=1e-6)
    targets = steps.smooth_targets(jnp.array([0]), 3, 0.3)
    np.testing.assert_allclose(targets, [[0.8, 0.1, 0.1]], rtol=1e-6)
    smooth = steps.cross_entropy(logits, targets)
    np.testing.assert_allclose(smooth, [0.8 * np.log(2) + 0.2 * np.log(4)], rtol=1e-6)


@pytest.mark.parametrize(
    ("threshold", "targets"), [(0.0, [0.7, 0.25, 0.05]), (0.2, [1.0, 1.0, 0.0])]
)
def test_binary_cross_entropy(threshold, targets):
    logits = np.array([[2.0, -1.0, 0.5]])
    yes = 1 / (1 + np.exp(-logits))
    right = -(targets * np.log(yes) + (1 - np.array(targets)) * np.log(1 - yes)).mean(-1)
    found = steps.binary_cross_entropy(
        jnp.asarray(logits, jnp.float32), jnp.array([[0.7, 0.25, 0.05]]), threshold
    )
    np.testing.assert_allclose(found, right, rtol=1e-5)


def numbered_images(n=8, side=6):
    """Each image one number, 1 to n."""
    return jnp.broadcast_to(jnp.arange(1.0, n + 1)[:, None, None, None], (n, side, side, 3))


def keys(count):
    return jax.random.split(jax.random.key(3), count)


def test_mixup_blends_with_the_mirror_in_the_group():
    mixing = steps.Mixing(mixup=0.8, cutmix=0.0, cutmix_probability=0.5, group=4)
    mixed, kept = mixing(keys(1)[0], numbered_images())
    own = np.arange(1.0, 9)
    partner = np.array([4, 3, 2, 1, 8, 7, 6, 5])
    assert 0 < kept < 1
    right = kept * own + (1 - kept) * partner
    np.testing.assert_allclose(mixed, np.broadcast_to(right[:, None, None, None], mixed.shape))
    np.testing.assert_array_equal(mixing.partners(jnp.asarray(own)), partner)


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_shares_of_mixup_are_beta_distributed(alpha):
    stats = pytest.importorskip("scipy.stats")
    mixing = steps.Mixing(mixup=alpha, cutmix=0.0, cutmix_probability=0.5, group=2)
    _, kept = jax.vmap(lambda key: mixing(key, jnp.zeros((2, 1, 1, 1))))(keys(2000))
    assert stats.kstest(np.asarray(kept), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    mixing = steps.Mixing(mixup=0.0, cutmix=1.0, cutmix_probability=0.5, group=8)
    images = numbered_images(side=12)
    areas = []
    for key in keys(40):
        mixed, kept = mixing(key, images)
        pasted = np.asarray(mixed[0, :, :, 0]) == 8
        np.testing.assert_array_equal(mixed[0, :, :, 0], np.where(pasted, 8, 1))
        for own, image in enumerate(mixed, start=1):
            np.testing.assert_array_equal(image[:, :, 2], np.where(pasted, 9 - own, own))
        # A box, and the labels know its pixels exactly.
        rows, cols = pasted.any(1), pasted.any(0)
        assert pasted.sum() == rows.sum() * cols.sum()
        for axis in (rows, cols):
            assert (np.diff(np.flatnonzero(axis)) == 1).all()
        np.testing.assert_allclose(kept, 1 - pasted.mean(), rtol=1e-6)
        areas.append(pasted.mean())
    assert min(areas) < 0.1
    assert max(areas) > 0.5


@pytest.mark.parametrize("kept", [0.0, 0.25, 0.9, 1.0])
def test_a_cutmix_box_has_its_area_where_the_image_does_not_cut_it(kept):
    boxes = jax.vmap(lambda key: steps.cutmix_box(key, jnp.float32(kept), (40, 20)))(keys(200))
    sizes = np.asarray(boxes).sum((1, 2))
    # Sides of whole pixels, an even number of them.
    sides = [int(length * np.sqrt(1 - kept)) // 2 * 2 for length in (40, 20)]
    assert sizes.max() == sides[0] * sides[1]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_either_cutmix_or_mixup(probability):
    mixing = steps.Mixing(mixup=0.5, cutmix=0.5, cutmix_probability=probability, group=2)
    images = jnp.stack([jnp.zeros((8, 8, 1)), jnp.ones((8, 8, 1))])
    mixed, kept = jax.jit(jax.vmap(lambda key: mixing(key, images)))(keys(400))
    # A pasted image has pixels of either image only.
    mixed = np.asarray(mixed)[:, 0].reshape(400, -1)
    blended = ((mixed > 0) & (mixed < 1)).all(1)
    assert (blended | np.isin(mixed, (0, 1)).all(1)).all()
    np.testing.assert_allclose(np.asarray(kept), 1 - mixed.mean(1), atol=1e-6)
    assert abs(blended.mean() - (1 - probability)) < 0.08


def test_a_step_mixes_images_and_labels(batch):
    state, tx = make()
    mixing = steps.Mixing(mixup=1.0, cutmix=0.0, cutmix_probability=0.0, group=4)
    after, metrics = train_step(state, batch, tx, mixing=mixing, seed=7, label_smoothing=0.1)
    mix_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(7), 0))
    x = (np.asarray(batch["image"], np.float32) / 255 - 0.5) / 0.25
    mixed, kept = mixing(mix_key, jnp.asarray(x))
    kept = float(kept)
    one_hot = np.eye(3)[np.asarray(batch["label"])] * 0.9 + 0.1 / 3
    targets = kept * one_hot + (1 - kept) * one_hot[::-1]
    x = np.asarray(mixed, np.float64).reshape(4, -1)
    gradient = x.T @ (np.full((4, 3), 1 / 3) - targets) / 4
    np.testing.assert_allclose(after.params["kernel"], -0.1 * gradient, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 4 * np.log(3), rtol=1e-5)


def test_draws_depend_on_the_seed_and_on_the_step(batch):
    mixing = steps.Mixing(mixup=1.0, cutmix=0.0, cutmix_probability=0.0, group=2)
    state, tx = make()
    later = dataclasses.replace(state, step=state.step + 1)
    runs = [(state, 0), (state, 0), (state, 1), (later, 0)]
    kernels = [
        np.asarray(train_step(start, batch, tx, mixing=mixing, seed=seed)[0].params["kernel"])
        for start, seed in runs
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])
    assert not np.array_equal(kernels[0], kernels[3])


@pytest.mark.parametrize(
    ("logits", "label", "k", "hit"),
    [
        ([1.0, 2.0, 3.0], 2, 1, 1.0),
        ([1.0, 2.0, 3.0], 1, 1, 0.0),
        ([1.0, 2.0, 3.0], 1, 2, 1.0),
        ([1.0, 1.0, 1.0], 0, 1, 0.0),  # a constant knows nothing
        ([1.0, 1.0, 1.0], 0, 3, 1.0),
        ([np.nan, np.nan, np.nan], 0, 2, 0.0),
    ],
)
def test_hits(logits, label, k, hit):
    assert steps.hits(jnp.array([logits]), jnp.array([label]), k) == hit


@pytest.mark.parametrize(
    ("logits", "labels", "k", "hit"),
    [
        ([1.0, 2.0, 3.0], (0, 2), 1, 1.0),
        ([1.0, 2.0, 3.0], (0, 1), 1, 0.0),
        ([1.0, 2.0, 3.0], (0, 1), 2, 1.0),
        ([3.0, 3.0, 1.0], (0, 1), 1, 1.0),  # a tie among right ones
        ([3.0, 3.0, 1.0], (0,), 1, 0.0),
        ([3.0, 2.0, 1.0], (), 3, 0.0),
        ([3.0, np.nan, 1.0], (0,), 1, 0.0),
        ([np.nan, 2.0, 1.0], (0, 1), 1, 0.0),
    ],
)
def test_hits_of_sets(logits, labels, k, hit):
    sets = jnp.isin(jnp.arange(3), jnp.array(labels, jnp.int32))[None]
    assert steps.set_hits(jnp.array([logits]), sets, k) == hit


def test_sets_of_one_are_labels():
    logits = jax.random.normal(jax.random.key(0), (50, 9)).round(1)  # with ties
    labels = jax.random.randint(jax.random.key(1), (50,), 0, 9)
    for k in (1, 3, 9):
        np.testing.assert_array_equal(
            steps.set_hits(logits, jax.nn.one_hot(labels, 9) > 0, k), steps.hits(logits, labels, k)
        )


def test_the_ends_of_bins_of_confidence():
    """A bin holds its upper end; 1 lies in the last, and what is no number in the first."""

    def apply(variables, images, train):
        return jnp.log(jnp.array([[1.0, 1e-30], [0.6, 0.4], [0.61, 0.39], [np.nan, 1.0]]))

    batch = {
        "image": jnp.zeros((4, 1, 1, 3), jnp.uint8),
        "label": jnp.array([0, 1, 0, 1]),
        "mask": jnp.ones(4, bool),
    }
    sums = steps.suite_step({}, batch, apply_fn=apply, **SCALE)
    counts = {14: 1, 8: 1, 9: 1, 0: 1}  # 0.6 is 9/15
    assert sums["bin_count"].tolist() == [counts.get(place, 0) for place in range(15)]
    assert sums["bin_top1"].tolist() == [float(place in (14, 9)) for place in range(15)]
    assert sums["class_count"].tolist() == [2, 2]
    assert sums["class_top1"].tolist() == [2, 0]


def test_train_step_is_gradient_descent(batch):
    state, tx = make()
    after, metrics = train_step(state, batch, tx)
    x = (np.asarray(batch["image"], np.float64).reshape(4, -1) / 255 - 0.5) / 0.25
    # All logits are zero, so each class has probability 1/3.
    gradient = x.T @ (np.full((4, 3), 1 / 3) - np.eye(3)[np.asarray(batch["label"])]) / 4
    np.testing.assert_allclose(after.params["kernel"], -0.1 * gradient, atol=1e-6)
    assert after.step == 1
    assert after.batch_stats["mean"] == 1.0
    np.testing.assert_allclose(metrics["loss"], 4 * np.log(3), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1)
    assert metrics["count"] == 4
    assert metrics["top1"] == 0


@pytest.mark.parametrize("ema_decay", [0.5, 0.999])
def test_the_decay_warms_up_to_its_value(batch, ema_decay):
    state, tx = make()
    kernel, mean = np.asarray(state.ema["params"]["kernel"], np.float64), 0.0
    for step in range(12):
        state, _ = train_step(state, batch, tx, ema_decay=ema_decay)
        decay = min(ema_decay, (1 + step) / (10 + step))
        kernel = decay * kernel + (1 - decay) * np.asarray(state.params["kernel"])
        mean = decay * mean + (1 - decay) * (step + 1)
    np.testing.assert_allclose(state.ema["params"]["kernel"], kernel, atol=1e-6)
    np.testing.assert_allclose(state.ema["batch_stats"]["mean"], mean, rtol=1e-5)


def test_without_averages_the_state_has_none(batch):
    state, tx = make(ema=False)
    after, _ = train_step(state, batch, tx)
    assert state.ema == after.ema == {}


def test_a_fresh_state_owns_each_buffer_once():
    state, _ = make()
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("none", [jnp.nan, jnp.inf])
def test_a_step_without_a_loss_changes_nothing_but_its_number(batch, none):
    tx = optax.adam(0.1)
    state = steps.init_state(jax.random.key(0), init_fn=Linear.init, tx=tx, image_size=2, ema=True)
    skipping = {"tx": tx, "skip_nonfinite": True}
    taken, metrics = train_step(state, batch, **skipping)
    expected, _ = train_step(state, batch, tx=tx)
    jax.tree.map(np.testing.assert_array_equal, taken, expected)
    assert np.isfinite(metrics["loss"])
    loss = {"loss": lambda logits, targets: steps.cross_entropy(logits, targets) * none}
    after, metrics = train_step(taken, batch, **skipping, **loss)
    assert not np.isfinite(metrics["loss"])
    unmoved = dataclasses.replace(taken, step=after.step, opt_state=after.opt_state)
    jax.tree.map(np.testing.assert_array_equal, after, unmoved)
    # The optimizer counts the step, so that its schedule ends with the run.
    assert (int(after.step), int(after.opt_state[0].count)) == (2, 2)
    for name in ("mu", "nu"):
        moments = getattr(after.opt_state[0], name), getattr(taken.opt_state[0], name)
        jax.tree.map(np.testing.assert_array_equal, *moments)


def test_eval_step_counts_what_the_mask_keeps(batch):
    kernel = np.zeros((12, 3), np.float32)
    kernel[:, 1] = 1.0
    variables = {"params": {"kernel": jnp.asarray(kernel)}, "batch_stats": {"mean": jnp.zeros(())}}
    batch["image"] = jnp.full((4, 2, 2, 3), 255, jnp.uint8)  # class 1 wins everywhere
    batch["mask"] = jnp.array([True, True, False, False])
    sums = steps.eval_step(variables, batch, apply_fn=Linear.apply, **SCALE)
    assert sums["count"] == 2
    assert sums["top1"] == 1  # labels 0 and 1
    assert sums["top5"] == 2
    np.testing.assert_allclose(sums["loss"], 24.0, rtol=1e-5)  # 12 * 2 above the others, once


@pytest.mark.middle
@pytest.mark.parametrize(("accumulate", "shares"), [(2, 1), (2, 2)])
def test_accumulation_equals_the_large_batch(accumulate, shares):
    """Of a real model too: groups of batch statistics lie within the parts."""
    model = create_model("halonet_tiny", num_classes=5, bn_group=2, depths=(1, 1))
    rng = np.random.default_rng(1)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (8, 32, 32, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 5, 8), jnp.int32),
    }
    tx = optax.sgd(0.1)
    init = functools.partial(steps.init_state, init_fn=model.init, tx=tx, image_size=32, ema=False)
    state = jax.jit(init)(jax.random.key(0))
    mixing = steps.Mixing(mixup=0.8, cutmix=0.0, cutmix_probability=0.0, group=2)

    def step(**kwargs):
        function = functools.partial(
            train_step, tx=tx, apply_fn=model.apply, mixing=mixing, label_smoothing=0.1, **kwargs
        )
        return jax.jit(lambda state, batch: function(state, batch))(state, batch)

    (whole, sums), (parts, sums_of_parts) = step(), step(accumulate=accumulate, shares=shares)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, parts.params, whole.params)
    jax.tree.map(close, parts.batch_stats, whole.batch_stats)
    jax.tree.map(close, sums_of_parts, sums)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole.batch_stats, state.batch_stats)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_parts_take_from_every_share():
    x = jnp.arange(12)
    np.testing.assert_array_equal(steps._parts(x, 2, 1), [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    np.testing.assert_array_equal(steps._parts(x, 2, 3), [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]])

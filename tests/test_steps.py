"""The pure functions of a step, against answers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from halonet import steps


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
    def apply(variables, images, *, train, mutable=None):
        logits = images.reshape(len(images), -1) @ variables["params"]["kernel"]
        if not train:
            return logits
        assert mutable == ["batch_stats"]
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
    return steps.train_step(
        state,
        batch,
        apply_fn=Linear.apply,
        tx=tx,
        learning_rate=lambda step: 0.1 * (step + 1),
        **{**SCALE, "label_smoothing": 0.0, "ema_decay": 0.9, **kwargs},
    )


def test_normalize():
    images = jnp.array([0, 51, 255], jnp.uint8).reshape(1, 1, 1, 3)
    output = steps.normalize(images, (0.0, 0.2, 0.5), (1.0, 0.5, 0.25))
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output.ravel(), [0.0, 0.0, 2.0], atol=1e-6)


def test_cross_entropy_with_smoothing():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    plain = steps.cross_entropy(logits, jnp.array([0]), 0.0)
    np.testing.assert_allclose(plain, [np.log(2)], rtol=1e-6)
    # Targets 0.8, 0.1, 0.1.
    smooth = steps.cross_entropy(logits, jnp.array([0]), 0.3)
    np.testing.assert_allclose(smooth, [0.8 * np.log(2) + 0.2 * np.log(4)], rtol=1e-6)


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

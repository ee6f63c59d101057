"""Schedules and optimizers, against numbers worked out by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet import optim
from halonet.models import create_model


def cosine(peak, fraction):
    return peak * 0.5 * (1 + np.cos(np.pi * fraction))


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        # Steps 0, 5, 10, 55, 100 of 100.
        (0.1, [0.0, 0.2, 0.4, cosine(0.4, 45 / 90), 0.0]),
        (0.0, [0.4, *(cosine(0.4, step / 100) for step in (5, 10, 55)), 0.0]),
        (0.55, [0.0, 0.4 * 5 / 55, 0.4 * 10 / 55, 0.4, 0.0]),
    ],
)
def test_warmup_cosine(warmup, expected):
    schedule = optim.warmup_cosine(peak=0.4, total_steps=100, warmup=warmup)
    found = [float(schedule(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_the_cosine_ends_at_its_floor():
    schedule = optim.warmup_cosine(peak=0.4, total_steps=100, warmup=0.1, floor=0.1)
    found = [float(schedule(step)) for step in (10, 55, 100, 200)]
    np.testing.assert_allclose(found, [0.4, 0.1 + cosine(0.3, 0.5), 0.1, 0.1], rtol=1e-6)


def test_the_linear_rule():
    assert optim.scaled(0.1, batch_size=1024, base_batch=256) == pytest.approx(0.4)
    assert optim.scaled(0.1, batch_size=64, base_batch=256) == pytest.approx(0.025)
    assert optim.scaled(0.1, batch_size=64, base_batch=0) == 0.1


@pytest.mark.parametrize("total_steps", [1, 2, 5])
def test_warmup_of_nearly_all_of_a_short_run(total_steps):
    schedule = optim.warmup_cosine(peak=0.4, total_steps=total_steps, warmup=0.95)
    assert float(schedule(total_steps)) == pytest.approx(0.0)


def test_decay_shrinks_kernels_only():
    model = create_model("halonet_tiny", num_classes=10)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    mask = optim.decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    kinds = {(path[-1].key, value) for path, value in jax.tree_util.tree_leaves_with_path(mask)}
    spared = {(name, False) for name in ("bias", "scale", "row_table", "col_table")}
    assert kinds == {("kernel", True), *spared}
    mask = optim.decay_mask(params, tables=True)
    kinds = {(path[-1].key, value) for path, value in jax.tree_util.tree_leaves_with_path(mask)}
    decayed = {(name, True) for name in ("kernel", "row_table", "col_table")}
    assert kinds == {*decayed, ("bias", False), ("scale", False)}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("tables", [False, True])
def test_tables_decay_where_asked(name, tables):
    params = {"row_table": jnp.ones((3, 2)), "kernel": jnp.ones((3, 2))}
    settings = {"momentum": 0.0, "clip_norm": 0.0, "learning_rate": lambda step: 0.1}
    tx = optim.make_optimizer(name, weight_decay=0.5, decay_tables=tables, **settings)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert (updates["kernel"] < 0).all()
    assert (updates["row_table"] < 0).all() == tables


PARAMS = {
    "kernel": np.array([[1.0, -2.0], [0.5, 4.0]], np.float32),
    "bias": np.array([1.0, -1.0], np.float32),
}
GRADS = [
    {"kernel": np.array([[0.1, 0.2], [-0.3, 0.4]], np.float32), "bias": np.float32([0.5, -0.25])},
    {"kernel": np.array([[-0.2, 0.1], [0.3, 0.1]], np.float32), "bias": np.float32([0.1, 0.2])},
]
RATES = (0.1, 0.05)


def steps_of(name, *, grads=GRADS, **settings):
    """The parameters after each gradient."""
    settings = {"momentum": 0.9, "weight_decay": 0.0, "clip_norm": 0.0, **settings}
    tx = optim.make_optimizer(name, learning_rate=lambda step: jnp.array(RATES)[step], **settings)
    params, found = jax.tree.map(jnp.array, PARAMS), []
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(jax.tree.map(jnp.array, grad), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        found.append(params)
    return found


def assert_close(found, expected):
    for name in PARAMS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_by_hand(weight_decay):
    params = dict(PARAMS)
    velocity = {name: np.zeros_like(value) for name, value in PARAMS.items()}
    for rate, grads, found in zip(
        RATES, GRADS, steps_of("sgd", weight_decay=weight_decay), strict=True
    ):
        for name in PARAMS:
            decay = weight_decay if name == "kernel" else 0.0
            # The decay enters the momentum; Nesterov looks one velocity ahead.
            grad = grads[name] + decay * params[name]
            velocity[name] = 0.9 * velocity[name] + grad
            params[name] = params[name] - rate * (grad + 0.9 * velocity[name])
        assert_close(found, params)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_by_hand(weight_decay):
    params = dict(PARAMS)
    mean = {name: np.zeros_like(value) for name, value in PARAMS.items()}
    square = {name: np.zeros_like(value) for name, value in PARAMS.items()}
    b1, b2 = 0.8, 0.999
    found = steps_of("adamw", momentum=b1, weight_decay=weight_decay)
    for step, (rate, grads) in enumerate(zip(RATES, GRADS, strict=True)):
        for name in PARAMS:
            decay = weight_decay if name == "kernel" else 0.0
            mean[name] = b1 * mean[name] + (1 - b1) * grads[name]
            square[name] = b2 * square[name] + (1 - b2) * grads[name] ** 2
            direction = mean[name] / (1 - b1 ** (step + 1))
            direction = direction / (np.sqrt(square[name] / (1 - b2 ** (step + 1))) + 1e-8)
            # Decoupled: the decay goes beside the direction, under the same rate.
            params[name] = params[name] - rate * (direction + decay * params[name])
        assert_close(found[step], params)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_by_hand(weight_decay):
    params = dict(PARAMS)
    mean = {name: np.zeros_like(value) for name, value in PARAMS.items()}
    square = {name: np.zeros_like(value) for name, value in PARAMS.items()}
    b1, b2 = 0.9, 0.999
    found = steps_of("lamb", weight_decay=weight_decay)
    for step, (rate, grads) in enumerate(zip(RATES, GRADS, strict=True)):
        for name in PARAMS:
            decay = weight_decay if name == "kernel" else 0.0
            mean[name] = b1 * mean[name] + (1 - b1) * grads[name]
            square[name] = b2 * square[name] + (1 - b2) * grads[name] ** 2
            direction = mean[name] / (1 - b1 ** (step + 1))
            direction = direction / (np.sqrt(square[name] / (1 - b2 ** (step + 1))) + 1e-6)
            direction = direction + decay * params[name]
            # Each array moves by its own norm times the rate, but for biases and norms: timm's.
            trust = np.linalg.norm(params[name]) / np.linalg.norm(direction)
            trust = trust if name == "kernel" else 1.0
            params[name] = params[name] - rate * trust * direction
        assert_close(found[step], params)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rmsprop_by_hand(weight_decay):
    """TensorFlow's: the rate enters the momentum, epsilon the root, and squares start at 1."""
    params = dict(PARAMS)
    square = {name: np.ones_like(value) for name, value in PARAMS.items()}
    velocity = {name: np.zeros_like(value) for name, value in PARAMS.items()}
    found = steps_of("rmsprop", weight_decay=weight_decay)
    for step, (rate, grads) in enumerate(zip(RATES, GRADS, strict=True)):
        for name in PARAMS:
            grad = grads[name] + (weight_decay if name == "kernel" else 0.0) * params[name]
            square[name] = 0.9 * square[name] + 0.1 * grad**2
            velocity[name] = 0.9 * velocity[name] + rate * grad / np.sqrt(square[name] + 1e-3)
            params[name] = params[name] - velocity[name]
        assert_close(found[step], params)


def test_clipping_is_of_the_global_norm():
    norm = np.sqrt(sum((grad**2).sum() for grad in GRADS[0].values()))
    clipped = [{name: grad * 0.25 / norm for name, grad in GRADS[0].items()}]
    (found,) = steps_of("sgd", clip_norm=0.25, grads=GRADS[:1])
    assert_close(found, steps_of("sgd", grads=clipped)[0])
    # A norm below the limit is left as it is.
    (found,) = steps_of("sgd", clip_norm=float(norm) * 1.01, grads=GRADS[:1])
    assert_close(found, steps_of("sgd", grads=GRADS[:1])[0])


def test_clipping_spares_the_decay():
    """Only the gradient is clipped: a large weight does not eat the step of a small gradient."""
    zero = [jax.tree.map(np.zeros_like, PARAMS)]
    (found,) = steps_of("sgd", weight_decay=0.1, clip_norm=1e-3, grads=zero)
    assert_close(found, steps_of("sgd", weight_decay=0.1, grads=zero)[0])
    assert abs(np.asarray(found["kernel"]) - PARAMS["kernel"]).max() > 0.01


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_name_builds(name):
    (found,) = steps_of(name, grads=GRADS[:1])
    assert not np.array_equal(found["kernel"], PARAMS["kernel"])


def test_unknown_name():
    message = "unknown optimizer 'adam'; there are: adamw, sgd, lamb, rmsprop"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        steps_of("adam")

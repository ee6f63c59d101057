"""What the benchmark times is what it says; the peers' side runs in `make bench` itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import contestants
from experiments.contestants import JaxProgram, Layer, Settings
from halonet.models import VARIANTS
from tests.random_arrays import uniform


def test_the_gather_form_computes_the_layer():
    layer = Layer(side=8, channels=4, heads=2, stride=2, block=4, halo=1)
    module = contestants._module(layer, jnp.float32, "reference")
    params = contestants._init(module, layer)
    x = jnp.asarray(uniform("map", (2, 8, 8, 4)), jnp.float32)
    both = jax.jit(
        lambda p, x: (module.apply({"params": p}, x), contestants.gather_form(p, x, layer=layer))
    )
    expected, found = both(params, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_layer_runs_forward_and_backward_and_tells_its_memory():
    layer = Layer(side=8, channels=4, heads=2, block=4, halo=1)
    program = contestants.gather_layer(layer, "forward and backward", Settings("cpu", batch=3))
    program.run()
    temporaries, memory = program.memory()
    # Three projections and two tables of 2 * (4 + 1) - 1 rows.
    assert program.parameters == 3 * 4 * 4 + 2 * 9 * 2
    # The map, and the gradients of the parameters and of the map: all of it is computed.
    assert memory - temporaries >= 4 * (2 * 3 * 8 * 8 * 4 + program.parameters)
    assert temporaries > 0


def test_a_program_hands_its_state_on():
    seen = []

    def step(state, by):
        return state + by, by

    program = JaxProgram(step, jnp.zeros(3), jnp.ones(3), parameters=[], carries=True)
    for _ in range(3):
        program.run()
        seen.append(program._arguments[0].tolist())
    assert seen == [[1.0] * 3, [2.0] * 3, [3.0] * 3]


@pytest.mark.middle
def test_a_training_step_trains(monkeypatch):
    monkeypatch.setattr(contestants, "IMAGE_SIZE", 32)
    program = contestants.our_model("halonet_tiny", "training step", Settings("cpu", batch=2))
    before = jax.tree.map(np.array, program._arguments[0])
    program.run()
    after = program._arguments[0]
    assert int(after.step) == 1
    for name in ("params", "batch_stats", "opt_state"):
        old, new = (jax.tree.leaves(getattr(state, name)) for state in (before, after))
        assert sum(not np.array_equal(a, b) for a, b in zip(old, new, strict=True)) > len(old) // 2


@pytest.mark.middle
def test_our_layer_and_our_inference_run(monkeypatch):
    monkeypatch.setattr(contestants, "IMAGE_SIZE", 32)
    settings = Settings("cpu", batch=2)
    layer = Layer(side=8, channels=4, heads=2, block=4, halo=1)
    model = contestants.our_model("halonet_tiny", "inference", settings)
    for program, results in (
        (contestants.our_layer(layer, "forward", settings), 2 * 8 * 8 * 4),
        (model, 2 * contestants.CLASSES),
    ):
        program.run()
        temporaries, memory = program.memory()
        assert memory - temporaries >= 4 * results
    # At the registered 1000 classes.
    assert model.parameters == VARIANTS["halonet_tiny"].params

"""Our models against what timm's computed: weights from their keys, logits from the file.

tests/parity holds the comparison itself, in both precisions; this is what needs no PyTorch.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models import VARIANTS, create_model
from halonet.models.convert import weights
from tests.random_arrays import random_arrays, uniform

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "timm_logits.npz")
NAMES = sorted(name for name, variant in VARIANTS.items() if variant.origin == "timm")
# Rounding of float32: up to 1.2e-6 is seen here, and timm's own is as large (docs/parity.txt).
BOUND = 5e-6


def model_and_variables(name, dtype):
    model = create_model(name, num_classes=10, dtype=dtype, param_dtype=dtype)
    entries = weights.timm_entries(model)
    arrays = random_arrays({entry.theirs: entry.shape for entry in entries})
    variables, _ = weights.to_variables(arrays, entries, model)
    return model, jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)


def image(name):
    size = VARIANTS[name].image_size
    return uniform("images", (1, size, size, 3), -2.0, 2.0)


# Each kind of attention here, the others in CI: a model takes seconds to compile.
FIRST = ("haloregnetz_b", "lamhalobotnet50ts_256")


@pytest.mark.parametrize(
    "name", [*FIRST, *(pytest.param(n, marks=pytest.mark.middle) for n in NAMES if n not in FIRST)]
)
def test_logits_are_timms(name):
    model, variables = model_and_variables(name, jnp.float32)
    # Optimised little: the time goes into the compiler.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    forward = jax.jit(lambda v, x: model.apply(v, x, train=False), compiler_options=options)
    logits = np.asarray(forward(variables, image(name)))[0]
    expected = GOLDEN[f"{name}/logits"]
    assert np.abs(logits - expected).max() < BOUND * np.abs(expected).max()


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_timms_in_float64(name):
    cotangent = uniform("cotangent", (1, 10))
    with jax.enable_x64(True):
        model, variables = model_and_variables(name, jnp.float64)

        def total(x, v):
            logits = model.apply(v, x, train=False)
            return (logits * cotangent).sum(), logits

        gradients, logits = jax.jit(jax.grad(total, has_aux=True))(
            jnp.asarray(image(name), jnp.float64), variables
        )
    for ours, expected in (
        (np.asarray(logits)[0], GOLDEN[f"{name}/logits"]),
        (np.asarray(gradients)[0].ravel()[::2003], GOLDEN[f"{name}/gradients"]),
    ):
        assert np.abs(ours - expected).max() < 1e-9 * np.abs(expected).max()


def test_every_model_of_timm_has_its_arrays():
    assert {key.split("/")[0] for key in GOLDEN} == set(NAMES)

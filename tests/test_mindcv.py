"""halonet_50t against MindCV's layers, written anew in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models import create_model
from halonet.models.convert import weights
from tests import numpy_halonet
from tests.random_arrays import random_arrays, uniform


@pytest.mark.long
@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 512)])
def test_logits_are_those_of_the_numpy_rendering(height, width):
    images = uniform("images", (1, height, width, 3), -2.0, 2.0)
    with jax.enable_x64(True):
        model = create_model("halonet_50t", dtype=jnp.float64, param_dtype=jnp.float64)
        entries = weights.mindcv_entries(model)
        arrays = random_arrays({entry.theirs: entry.shape for entry in entries})
        variables, _ = weights.to_variables(arrays, entries, model)
        variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        forward = jax.jit(lambda v, x: model.apply(v, x, train=False))
        logits = np.asarray(forward(variables, jnp.asarray(images, jnp.float64)))
    assert logits.dtype == jnp.float64
    expected = numpy_halonet.forward(arrays, images.transpose(0, 3, 1, 2))
    assert np.abs(logits - expected).max() < 1e-9 * np.abs(expected).max()

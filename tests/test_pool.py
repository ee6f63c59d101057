"""The max-pool against XLA's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models.pool import max_pool


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 2)])
def test_max_pool_is_xlas_own_also_where_pixels_are_equal(size, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 3, (2, *size, 3)), dtype)

    def plain(x):
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    (ours, back), (right, back_right) = jax.vjp(max_pool, x), jax.vjp(plain, x)
    np.testing.assert_array_equal(ours, right)
    # Small integers, whose sums bfloat16 holds in any order.
    d_out = jnp.asarray(rng.integers(1, 5, right.shape), dtype)
    np.testing.assert_array_equal(back(d_out)[0], back_right(d_out)[0])


def test_max_pool_scatters_nothing_on_a_cpu():
    def gradient(x):
        return jax.grad(lambda x: max_pool(x).sum())(x)

    lowered = jax.jit(gradient).trace(jnp.zeros((1, 8, 8, 2)))
    assert "select_and_scatter" not in lowered.lower(lowering_platforms=("cpu",)).as_text()
    assert "select_and_scatter" in lowered.lower(lowering_platforms=("tpu",)).as_text()

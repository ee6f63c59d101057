"""halonet.HaloAttention against lucidrains' halonet-pytorch 0.0.5.

That release has the mask the right way round, as its pull request 6 put it; the repository's own
source still gives all weight to the padding.
"""

import functools

import halonet_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import halonet
from tests.parity import peers
from tests.random_arrays import uniform

# The configuration of its README.
BLOCK, HALO, HEADS, HEAD_DIM, CHANNELS, SIDE = 8, 4, 4, 64, 512, 32


def theirs(x, cotangent):
    """Its output, its gradients by name, and its parameters by name; maps are (N, H, W, C)."""
    layer = halonet_pytorch.HaloAttention(
        dim=CHANNELS, block_size=BLOCK, halo_size=HALO, dim_head=HEAD_DIM, heads=HEADS
    ).double()
    arrays = {
        name: uniform(name, parameter.shape, -0.1, 0.1)
        for name, parameter in layer.named_parameters()
    }
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    x = torch.from_numpy(x).double().requires_grad_()
    output = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    (output * torch.from_numpy(cotangent)).sum().backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in layer.named_parameters()}
    return output.detach().numpy(), {"x": x.grad.numpy(), **gradients}, arrays


def as_ours(arrays):
    """Parameters, or gradients, of theirs in our tree."""
    key, value = np.split(arrays["to_kv.weight"].T, 2, axis=1)
    # Theirs has a row for each difference of two places in the window, of which the first 2 * HALO
    # belong to no query.
    rows = np.s_[2 * HALO :]
    return {
        "query": {"kernel": arrays["to_q.weight"].T},
        "key": {"kernel": key},
        "value": {"kernel": value},
        "row_table": arrays["rel_pos_emb.rel_height"][rows],
        "col_table": arrays["rel_pos_emb.rel_width"][rows],
        "out": {"kernel": arrays["to_out.weight"].T, "bias": arrays["to_out.bias"]},
    }


def test_values_and_gradients_of_its_readme():
    x = uniform("map", (1, SIDE, SIDE, CHANNELS), -2.0, 2.0)
    cotangent = uniform("cotangent", x.shape)
    expected, expected_gradients, arrays = theirs(x, cotangent)
    with jax.enable_x64(True):
        layer = halonet.HaloAttention(
            block_size=BLOCK,
            halo_size=HALO,
            heads=HEADS,
            head_dim=HEAD_DIM,
            border="mask",
            dtype=jnp.float64,
            param_dtype=jnp.float64,
        )

        def total(x, params):
            output = layer.apply({"params": params}, x)
            return (output * cotangent).sum(), output

        to_float64 = functools.partial(jnp.asarray, dtype=jnp.float64)
        (of_x, of_params), output = jax.jit(jax.grad(total, (0, 1), has_aux=True))(
            to_float64(x), jax.tree.map(to_float64, as_ours(arrays))
        )
    assert peers.difference(output, expected) < 1e-12
    assert peers.difference(of_x, expected_gradients["x"]) < 1e-12
    right = as_ours(expected_gradients)
    assert jax.tree.structure(of_params) == jax.tree.structure(right)
    for ours, gradient in zip(jax.tree.leaves(of_params), jax.tree.leaves(right), strict=True):
        assert peers.difference(ours, gradient) < 1e-12


@pytest.mark.parametrize("name", ["rel_height", "rel_width"])
def test_the_rows_left_out_are_dead(name):
    x = uniform("map", (1, SIDE, SIDE, CHANNELS))
    gradient = theirs(x, x)[1][f"rel_pos_emb.{name}"]
    assert len(gradient) == 2 * (BLOCK + 2 * HALO) - 1
    assert not gradient[: 2 * HALO].any()
    assert gradient[2 * HALO :].any(axis=1).all()

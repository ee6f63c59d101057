"""Our models against timm's own, with random weights and random batch statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from halonet.models import VARIANTS, create_model
from halonet.models.convert import __main__ as command
from halonet.models.convert import weights
from tests.parity import golden, peers

pytestmark = pytest.mark.timeout(1800)
timm = peers.timm  # which takes care of what its import needs

CASES = [(name, *size) for name in peers.NAMES for size in peers.image_sizes(name)]
FLOAT64_BOUND = 1e-9
FLOAT32_BOUND = 1e-5


@functools.lru_cache(maxsize=1)
def peer(name):
    return peers.timm_model(name)


def our_model_and_variables(name, dtype):
    model = create_model(name, dtype=dtype, param_dtype=dtype)
    variables, _ = weights.to_variables(peer(name)[1], weights.timm_entries(model), model)
    return model, jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)


def our_logits(name, images):
    """In float32."""
    model, variables = our_model_and_variables(name, jnp.float32)
    return jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)


def our_logits_and_gradients(name, images):
    """In float64."""
    with jax.enable_x64(True):
        model, variables = our_model_and_variables(name, jnp.float64)

        def total(x, v):
            logits = model.apply(v, x, train=False)
            return (logits * peers.cotangent(1000)).sum(), logits

        function = jax.jit(jax.grad(total, has_aux=True))
        gradients, logits = function(jnp.asarray(images, jnp.float64), variables)
    assert logits.dtype == gradients.dtype == jnp.float64
    return logits, gradients


@pytest.mark.parametrize(("name", "height", "width"), CASES)
def test_logits_and_input_gradients(name, height, width, table):
    model, _ = peer(name)
    images = peers.images(height, width)
    single = peers.timm_logits(model.float(), images)
    exact = peers.timm_logits(model.double(), images)
    exact_gradients = peers.timm_gradients(model, images)

    logits, gradients = our_logits_and_gradients(name, images)
    errors = (
        peers.difference(logits, exact),
        peers.difference(gradients, exact_gradients),
        peers.difference(our_logits(name, images), exact),
        peers.difference(single, exact),
    )
    table.append((name, height, width, VARIANTS[name].params, *errors))
    assert max(errors[:2]) < FLOAT64_BOUND
    assert errors[2] < FLOAT32_BOUND


@pytest.mark.parametrize("name", peers.NAMES)
def test_every_parameter_counts(name):
    """Their number is ours, and each array has its share in the logits that are compared."""
    model, _ = peer(name)
    model.double().zero_grad()
    peers.timm_gradients(model, peers.images(*peers.image_sizes(name)[0]))
    assert sum(x.numel() for x in model.parameters() if x.requires_grad) == VARIANTS[name].params
    shares = {key: (x * x.grad).abs().max().item() for key, x in model.named_parameters()}
    # Of logits of about one; what is off by its own size is then far above the bound.
    assert min(shares.values()) > 1000 * FLOAT64_BOUND, shares


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_file_of_timms_comes_back_bit_for_bit(name, tmp_path):
    """timm's file -> a run of ours -> a file that timm loads, with the counters of batches."""
    model, arrays = peer(name)
    state = model.float().state_dict()
    file, back = str(tmp_path / "theirs.safetensors"), str(tmp_path / "back.safetensors")
    safetensors.torch.save_file(state, file)
    command.convert("timm", file, model=name, out=str(tmp_path / "run"))
    command.convert_back(str(tmp_path / "run"), back)
    fresh = timm.create_model(name.removeprefix("timm_"))
    timm.models.load_checkpoint(fresh, back, strict=True)
    found = fresh.state_dict()
    assert list(found) == list(arrays)
    for key, array in arrays.items():
        ours = found[key].numpy()
        assert (ours.dtype, ours.shape) == (array.dtype, array.shape)
        assert ours.tobytes() == array.tobytes(), key


def test_a_pth_file_is_read_as_well(tmp_path):
    model, _ = peer("eca_halonext26ts")
    torch.save(model.float().state_dict(), tmp_path / "theirs.pth")
    said = command.convert(
        "timm", str(tmp_path / "theirs.pth"), model="eca_halonext26ts", out=str(tmp_path / "run")
    )
    assert "10,756,885 parameters" in said


def test_the_golden_arrays_are_what_timm_computes():
    kept = np.load(golden.FILE)
    found = golden.arrays()
    assert sorted(kept) == sorted(found)
    for key, array in found.items():
        assert peers.difference(kept[key], array) < 1e-12, key


def test_all_halonets_of_timm_are_compared():
    theirs = {name for name in timm.list_models() if "halo" in name}
    assert theirs == {name.removeprefix("timm_") for name in peers.NAMES}

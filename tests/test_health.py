"""Numbers that are none, and memory that is not enough."""

import jax
import jax.numpy as jnp
import pytest

from configs import mnist
from halonet import health
from halonet.config import flatten
from halonet.sharding import make_mesh


def check(limit=0, before=0):
    return health.FiniteCheck(limit=limit, workdir="/runs/a", mesh=make_mesh(), before=before)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_step_that_is_none_ends_the_run(name, value):
    values = {"loss": 1.0, "grad_norm": 2.0}
    finite = check()
    finite.step(4, values)
    assert finite.skipped == 0
    message = rf"^the {name} of step 5 is {value}; the checkpoints in /runs/a are from before; "
    with pytest.raises(health.NonFinite, match=message) as info:
        finite.step(5, values | {name: value})
    assert info.value.exit_code == 5


def test_so_many_are_passed_over_and_no_more():
    finite, none = check(limit=2, before=1), {"loss": float("nan"), "grad_norm": 1.0}
    finite.step(8, none)
    assert finite.skipped == 2
    with pytest.raises(health.NonFinite, match=r"of step 9 is nan \(3 of the run; .*=2\);"):
        finite.step(9, none)


def test_the_arrays_of_a_state_that_is_none_are_named():
    state = {"params": {"a": jnp.ones(3), "b": jnp.zeros(())}, "step": jnp.int32(4)}
    finite = check()
    finite.state(4, state)
    bad = jnp.array([1.0, jnp.inf, 2.0])
    with pytest.raises(health.NonFinite, match=r"^the state of step 4 is .* further: params/a$"):
        finite.state(4, state | {"params": {"a": bad, "b": jnp.zeros(())}})
    with pytest.raises(health.NonFinite, match=r"further: x/0, x/1, x/2 and 2 more arrays$"):
        finite.state(4, {"x": [bad] * 5})


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
    ],
)
def test_want_of_memory_is_told_with_what_needs_it(error):
    settings, params = flatten(mnist.get_config()), {"kernel": jnp.zeros((30, 50))}
    with (
        pytest.raises(health.OutOfMemory) as info,
        health.explained(settings, 8, params),
    ):
        raise error
    batch = settings["data.batch_size"]
    size = settings["data.image_size"]
    first = str(error).splitlines()[0] if str(error) else "MemoryError"
    assert str(info.value) == (
        f"not enough memory for config.data.batch_size={batch}, {batch // 8} on each of 8 devices, "
        f"with data.image_size={size}, train.accumulate=1, model.remat=none, model.dtype=float32, "
        "mesh.fsdp=1, mesh.rows=1 and 1,500 parameters; a smaller batch needs less, or "
        "train.accumulate=2 and up, model.remat=block, model.dtype=bfloat16, more devices; "
        f"mesh.fsdp splits the parameters, mesh.rows the images ({first})"
    )
    assert info.value.exit_code == 7
    with (
        pytest.raises(health.OutOfMemory, match=rf"{batch // 2} on each of 2 times 4 devices"),
        health.explained(settings | {"mesh.rows": 4}, 8, params),
    ):
        raise error


def test_evaluation_is_told_what_it_can_change():
    settings = flatten(mnist.get_config())
    with (
        pytest.raises(health.OutOfMemory) as info,
        health.explained(settings, 2, {}, "eval.batch_size"),
    ):
        raise MemoryError
    assert str(info.value) == (
        f"not enough memory for config.eval.batch_size={settings['eval.batch_size']}, "
        f"{settings['eval.batch_size'] // 2} on each of 2 devices, with data.image_size="
        f"{settings['data.image_size']}, model.dtype=float32 and 0 parameters; a smaller batch "
        "needs less, or model.dtype=bfloat16, or more devices (MemoryError)"
    )


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: no"), ValueError("no")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error), match="no"), health.explained({}, 1, {}):
        raise error

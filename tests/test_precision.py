"""docs/precision.md against the traced step: each row says what is there, and none is missing."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from halonet import halo_attention, optim, steps
from halonet.models import attention, create_model

ROOT = pathlib.Path(__file__).parent.parent
ROW = re.compile(r"^\| (.+) \| (float32|bfloat16) \| `(\S+)` `(.+)` \|$", re.MULTILINE)
ROWS = {what: rest for what, *rest in ROW.findall((ROOT / "docs/precision.md").read_text())}
SHAPE = jax.ShapeDtypeStruct


def dtypes(tree):
    """The dtypes of floating arrays in a tree."""
    found = (jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
    return {dtype.name for dtype in found if jnp.issubdtype(dtype, jnp.floating)}


def equations(jaxpr, scope=""):
    """(path of names, equation) of all that a program computes, calls inside it included."""
    for equation in jaxpr.eqns:
        path = f"{scope}/{equation.source_info.name_stack}"
        yield path, equation
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, path)


PRODUCTS = ("dot_general", "conv_general_dilated")
SOFTMAX = ("exp", "log", "reduce_max")


def used(program, primitives, where, *, ins=True, outs=True):
    """The dtypes of the operands and results of some primitives at paths that match."""
    found = set()
    for path, equation in program:
        if equation.primitive.name in primitives and re.search(where, path):
            variables = (equation.invars if ins else []) + (equation.outvars if outs else [])
            found |= dtypes([variable.aval for variable in variables])
    return found


def trace(dtype):
    """{what: the dtypes found}, of a step of a small hybrid whose attention is told apart."""
    options = {"num_classes": 10, "depths": (1, 1), "plan": "c/h", "bn_group": 2}
    model = create_model("halonet_tiny", dtype=dtype, **options)
    schedule = optim.warmup_cosine(peak=0.1, total_steps=10, warmup=0.1)
    tx = optim.make_optimizer(
        "adamw", learning_rate=schedule, momentum=0.9, weight_decay=0.1, clip_norm=1.0
    )
    calls, gradients = [], []

    def attend(*arrays, **settings):
        del settings["implementation"]
        calls.append((arrays, settings))
        return arrays[2][:, :: settings["stride"], :: settings["stride"]] + arrays[0]

    def update(grads, *rest):
        gradients.append(grads)
        return tx.update(grads, *rest)

    init = functools.partial(steps.init_state, init_fn=model.init, tx=tx, image_size=32, ema=True)
    state = jax.eval_shape(init, jax.random.key(0))
    batch = {"image": SHAPE((4, 32, 32, 3), jnp.uint8), "label": SHAPE((4,), jnp.int32)}
    step = functools.partial(
        steps.train_step,
        apply_fn=model.apply,
        tx=optax.GradientTransformation(tx.init, update),
        learning_rate=schedule,
        mean=(0.1,) * 3,
        std=(0.3,) * 3,
        label_smoothing=0.1,
        ema_decay=0.9,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "halo_attention", attend)
        jaxpr, (after, metrics) = jax.make_jaxpr(step, return_shape=True)(state, batch)
    whole = list(equations(jaxpr.jaxpr))
    arrays, settings = calls[-1]
    abstract = [SHAPE(array.shape, array.dtype) for array in arrays]
    op = functools.partial(halo_attention, implementation="xla_shift", **settings)
    jaxpr, result = jax.make_jaxpr(op, return_shape=True)(*abstract)
    inside = list(equations(jaxpr.jaxpr))
    forward, backward = r"/jvp\(HaloNet\)/(?!head)", r"/transpose\(jvp\(HaloNet\)\)/(?!head)"
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params) if len(leaf.shape) == 2}

    def is_kernel(variable):
        shape = getattr(variable.aval, "shape", ())
        return shape in shapes or shape[::-1] in shapes

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    maps = functools.partial(model.clone(features_only=True).apply, train=False)
    return {
        "parameters": dtypes((state.params, after.params)),
        "images, normalised": dtypes(
            jax.eval_shape(lambda x: steps.normalize(x, (0.1,) * 3, (0.3,) * 3), batch["image"])
        ),
        "convolutions and dense products": used(whole, PRODUCTS, forward),
        "gradients of 1x1 kernels, before devices add theirs up": used(
            [(path, equation) for path, equation in whole if is_kernel(equation.outvars[0])],
            *(("dot_general",), backward),
            ins=False,
        ),
        "gradients of larger kernels, likewise": used(
            whole, ("conv_general_dilated",), backward, ins=False
        ),
        "batch norm: means, variances and what is made of them": used(
            whole, ("reduce_sum", "rsqrt", "square", "integer_pow"), r"bn\d?$"
        ),
        "maps between blocks": dtypes(
            jax.eval_shape(maps, variables, SHAPE((1, 32, 32, 3), jnp.float32))
        ),
        "attention: queries, keys, values and relative tables": dtypes(arrays),
        "attention: what its products multiply": used(inside, PRODUCTS, "", outs=False),
        "attention: logits, and sums of weighted values": used(inside, PRODUCTS, "", ins=False),
        "attention: softmax": used(inside, SOFTMAX, ""),
        "attention: result": dtypes(result),
        "mean over the last map": used(whole, ("reduce_sum",), r"/jvp\(HaloNet\)$"),
        "head and logits": used(whole, PRODUCTS, r"jvp\(HaloNet\)\)?/head"),
        "loss": used(whole, SOFTMAX, r"/jvp\(\)"),
        "metrics": dtypes(metrics),
        "gradients as the optimizer gets them, clipping": dtypes(gradients),
        "optimizer state": dtypes((state.opt_state, after.opt_state)),
        "averaged weights": dtypes((state.ema, after.ema)),
        "running statistics": dtypes((state.batch_stats, after.batch_stats)),
    }


@pytest.fixture(scope="module")
def found():
    return trace(jnp.bfloat16)


def test_every_row_is_looked_at(found):
    assert list(ROWS) == list(found)


@pytest.mark.parametrize("what", ROWS)
def test_row(what, found):
    dtype, path, name = ROWS[what]
    assert found[what] == {dtype}
    assert name in (ROOT / path).read_text()


def test_float32_is_float32_throughout():
    """And so the bfloat16 above was seen, not assumed."""
    assert trace(jnp.float32) == {what: {"float32"} for what in ROWS}

"""Initial weights by scheme, against the distributions that the sources name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halonet.models import create_model, init_function
from halonet.models.initial import SCHEMES

MODEL = create_model("halonet_tiny", num_classes=500, plan="c/h", depths=(1, 2))
IMAGES = jnp.zeros((1, 32, 32, 3))


@functools.cache
def compiled(scheme):
    return jax.jit(lambda key: init_function(MODEL, scheme)(key, IMAGES, train=False))


def initialised(scheme, seed=0):
    return compiled(scheme)(jax.random.key(seed))


def test_mindcvs_distributions():
    variables = initialised("mindcv")
    kinds = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name, leaf = path[-1].key, np.asarray(leaf)
        kinds.add(name)
        if name == "kernel":
            # HeUniform: within sqrt(6 / fan_in), and of variance 2 / fan_in.
            fan_in = np.prod(leaf.shape[:-1])
            assert abs(leaf).max() <= np.sqrt(6 / fan_in)
            assert leaf.std() == pytest.approx(np.sqrt(2 / fan_in), rel=0.08)
            assert abs(leaf).max() > 0.97 * np.sqrt(6 / fan_in)
        elif name in ("row_table", "col_table"):
            # Of a normal distribution cut off at two deviations, 0.88 of the deviation is left.
            assert abs(leaf).max() <= 0.04
            assert leaf.std() == pytest.approx(0.88 * 0.02, rel=0.15)
        else:
            assert (leaf == (name == "scale")).all()
    assert kinds == {"kernel", "row_table", "col_table", "scale", "bias"}


def test_no_two_arrays_are_drawn_alike():
    params = initialised("mindcv")["params"]
    drawn = [
        leaf.ravel()[:16].tobytes()
        for leaf in map(np.asarray, jax.tree.leaves(params))
        if leaf.any()
    ]
    kernels = [bits for bits in drawn if bits != np.ones(16, np.float32).tobytes()]
    assert len(set(kernels)) == len(kernels) > 10
    other = initialised("mindcv", seed=1)["params"]
    assert not np.array_equal(params["head"]["kernel"], other["head"]["kernel"])


def test_a_models_own_switch_their_branches_off():
    own, mindcv = (initialised(scheme) for scheme in ("own", "mindcv"))
    assert jax.tree.structure(own) == jax.tree.structure(mindcv)
    assert init_function(MODEL, "own") == MODEL.init
    assert not own["params"]["stage2_block2"]["bn3"]["scale"].any()
    assert mindcv["params"]["stage2_block2"]["bn3"]["scale"].all()
    jax.tree.map(np.testing.assert_array_equal, own["batch_stats"], mindcv["batch_stats"])


def test_unknown_scheme():
    with pytest.raises(ValueError, match="^unknown scheme 'timm'; there are: own, mindcv$"):
        init_function(MODEL, "timm")
    assert SCHEMES == ("own", "mindcv")

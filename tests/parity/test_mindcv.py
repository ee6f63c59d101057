"""Our halonet_50t against MindCV's, from the files that dump_mindcv.py makes MindSpore write."""

import json
import pathlib

import jax
import numpy as np

from halonet.models import VARIANTS, create_model
from halonet.models.convert import readers, weights
from tests.parity import peers
from tests.random_arrays import random_arrays, uniform

ROOT = pathlib.Path(__file__).parent.parent.parent
FOLDER = ROOT / ".cache" / "parity"


def test_a_checkpoint_that_mindspore_wrote():
    listed = json.loads((ROOT / "tests" / "golden" / "mindcv_halonet_50t.json").read_text())
    trainable = sum(int(np.prod(shape)) for shape, trained in listed.values() if trained)
    assert trainable == VARIANTS["halonet_50t"].params

    arrays = readers.read_weights(FOLDER / "halonet_50t.ckpt")
    expected = random_arrays({name: tuple(shape) for name, (shape, _) in listed.items()})
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)

    model = create_model("halonet_50t")
    entries = weights.mindcv_entries(model)
    variables, _ = weights.to_variables(arrays, entries, model)
    for name, array in weights.from_variables(variables, entries).items():
        assert array.tobytes() == expected[name].tobytes()

    # MindSpore computes it in float32 only; tests/test_mindcv.py has the comparison in float64.
    images = uniform("images", (1, 256, 256, 3), -2.0, 2.0)
    logits = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    assert peers.difference(logits, np.load(FOLDER / "halonet_50t_logits.npy")) < 1e-5

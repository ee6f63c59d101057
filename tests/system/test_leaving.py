"""A program that ends in the midst of everything ends at once."""

import time

import pytest

from halonet import checkpoint
from tests.system.launch import launch

PROGRAM = """
import functools, sys
import jax, numpy as np
from halonet import checkpoint, sharding
from halonet.data import device, pipeline, sources

source = sources.open_source("fake:1000:10", "train", image_size=32)
spread = functools.partial(sharding.batch_sharding, sharding.make_mesh())
batches = [
    device.Prefetcher(pipeline.train_batches(source, batch_size=16, seed=0, **how), spread)
    for how in ({"threads": 2, "prefetch": 8}, {"workers": 2})
]
checkpointer = checkpoint.Checkpointer(sys.argv[1], keep_latest=2, best_steps=list)
print(*(next(it)["image"].shape for it in batches), flush=True)
checkpointer.save(1, {"array": np.random.default_rng(0).random((4096, 4096), np.float32)}, {})
print("saving", flush=True)
"""


@pytest.mark.middle
@pytest.mark.parametrize(
    ("ending", "code"), [("pass", 0), ("sys.exit(3)", 3), ("1 / 0", 1), ("del batches", 0)]
)
def test_threads_workers_and_a_save_in_flight_do_not_hold_it_up(tmp_path, ending, code):
    process = launch("-c", PROGRAM + ending, tmp_path)
    try:
        assert process.stdout.readline() == "(16, 32, 32, 3) (16, 32, 32, 3)\n"
        assert "saving\n" in process.stdout
        began = time.monotonic()
        output, _ = process.communicate(timeout=60)
        assert time.monotonic() - began < 10, output
    finally:
        process.kill()
    assert process.returncode == code, output
    # The save was whole or is none.
    for step in checkpoint.saved_steps(tmp_path):
        checkpoint.verify(checkpoint.step_folder(tmp_path, step))

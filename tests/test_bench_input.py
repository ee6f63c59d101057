"""The benchmark of the input: the files, what is timed, and the recipe that it says it times."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from configs import mindcv_halonet_50t
from experiments import bench_input
from halonet.config import random_view
from halonet.data.folder import FolderImages


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_input, "FILES", 6)
        patch.setattr(bench_input, "NAMES", 3)
        bench_input.write_files(folder)
    return folder


def test_files_are_photographs_of_the_promised_size(root):
    source = FolderImages(root, "train")
    assert len(source) == 18
    distinct = {source[index]["image"] for index in range(18)}
    assert len(distinct) == 6
    for data in distinct:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == ("JPEG", (500, 375))
        assert 30_000 < len(data) < 100_000


def test_the_recipe_is_that_of_the_config(root):
    """Pixel for pixel."""
    view = random_view(mindcv_halonet_50t.get_config())
    data = next((root / "train" / "0").iterdir()).read_bytes()
    seen = set()
    for seed in range(20):
        square = bench_input.RECIPE(data, np.random.default_rng(seed))
        np.testing.assert_array_equal(square, view(data, np.random.default_rng(seed)))
        seen.add(square.tobytes())
    assert len(seen) == 20
    assert dataclasses.replace(bench_input.RECIPE, rand_augment=None, erasing=None) == (
        bench_input.CROP
    )


def test_a_turn_times_the_work(root):
    files = sorted(root.rglob("*.jpg"))
    core, wall = bench_input.decode_turn(lambda path: sum(range(10_000)), files)
    assert 1e-6 < core < 1e-2
    assert wall > 1e-6


def test_processor_time_is_that_of_the_workers_too(root):
    before = bench_input.processor_seconds()
    loader = bench_input.our_loader(root, bench_input.CROP, 1)
    batch = next(loader)
    assert (batch.shape, batch.dtype) == ((bench_input.BATCH, 256, 256, 3), np.uint8)
    assert bench_input.processor_seconds() - before > 0.05
    loader.close()

"""Exports for timm, opened by timm: its configuration, its weights and the model's logits."""

import functools
import json
import os

import jax
import numpy as np
import pytest
import timm.data
import timm.models

from halonet import load_export, load_run
from halonet.export import export_checkpoint
from halonet.models import VARIANTS, create_model
from halonet.models.convert import weights
from tests.parity import peers
from tests.random_arrays import random_arrays
from tests.small_run import small_config
from tests.test_convert import make_run

# What peers.import_timm does here, for the process that the export is run by.
SITE = """\
import torch
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
# A name that is not timm's own, a stem that is one convolution, and global attention.
NAMES = ("timm_halonet_h1", "haloregnetz_b", "lamhalobotnet50ts_256")


@pytest.mark.parametrize("name", NAMES)
def test_timm_opens_what_is_exported_for_it(name, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    size, model = VARIANTS[name].image_size, create_model(name, num_classes=3)
    entries = weights.timm_entries(model)
    arrays = random_arrays({entry.theirs: entry.shape for entry in entries})
    variables, _ = weights.to_variables(arrays, entries, model)
    make_run(tmp_path / "run", name, size=size, **variables)
    config = small_config(**{"data.name": "imagenet2012", "data.data_dir": "/nowhere"})
    path = tmp_path / "out"
    metadata = export_checkpoint(config, tmp_path / "run", format="timm", out=str(path))
    assert metadata["compared"]["largest_difference"] < 5e-6
    assert metadata["compared"]["same_top1"] == metadata["compared"]["images"]

    theirs = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    original = timm.get_pretrained_cfg(name.removeprefix("timm_")).to_dict()
    for key in ("first_conv", "classifier", "input_size", "fixed_input_size"):
        assert np.array_equal(theirs.pretrained_cfg[key], original[key])
    settings = json.loads((path / "config.json").read_text())
    assert settings["num_features"] == theirs.num_features
    assert timm.data.resolve_model_data_config(theirs) == {
        "input_size": [3, size, size],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    # The other ways that the page names.
    images = peers.images(size, size)
    expected = load_export(path).logits(images)
    overlay = {"file": str(path / "model.safetensors"), "num_classes": 3}
    by_name = timm.create_model(
        name.removeprefix("timm_"), pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay
    )
    fresh = timm.create_model(name.removeprefix("timm_"), num_classes=3)
    timm.models.load_checkpoint(fresh, str(path / "model.safetensors"))
    for other in (by_name, fresh):
        np.testing.assert_array_equal(peers.timm_logits(other.eval(), images), expected)
    run = load_run(tmp_path / "run")
    apply = jax.jit(functools.partial(run.model.apply, train=False))
    ours = np.asarray(apply(run.variables, images))
    assert peers.difference(ours, expected) < 5e-6

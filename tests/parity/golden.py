"""Writes tests/golden/timm_logits.npz, what tests/test_golden.py compares with. Run by hand:

PYTHONPATH=. .venv-parity/bin/python tests/parity/golden.py
"""

import pathlib

import numpy as np

from halonet.models import VARIANTS
from tests.parity import peers

FILE = pathlib.Path(__file__).parent.parent / "golden" / "timm_logits.npz"
CLASSES = 10


def arrays():
    """Of every model, for the first of two images: the logits, and every 2003rd gradient."""
    golden = {}
    for name in peers.NAMES:
        model, _ = peers.timm_model(name, CLASSES)
        images = peers.images(VARIANTS[name].image_size, VARIANTS[name].image_size)
        golden[f"{name}/logits"] = peers.timm_logits(model.double(), images)[0]
        golden[f"{name}/gradients"] = peers.timm_gradients(model, images)[0].ravel()[::2003]
    return golden


if __name__ == "__main__":
    np.savez(FILE, **arrays())

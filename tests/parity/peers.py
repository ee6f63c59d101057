"""timm's models with weights made from their keys, for the comparisons and the golden arrays."""

import numpy as np
import torch

from experiments.contestants import import_timm
from halonet.models import VARIANTS
from tests.random_arrays import random_arrays, uniform

timm = import_timm()
NAMES = sorted(name for name, variant in VARIANTS.items() if variant.origin == "timm")


def timm_model(name, num_classes=1000):
    """timm's model of our name for it, in evaluation mode, and its state as numpy arrays."""
    model = timm.create_model(name.removeprefix("timm_"), num_classes=num_classes).eval()
    arrays = random_arrays({key: tuple(x.shape) for key, x in model.state_dict().items()})
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    model.load_state_dict(tensors, strict=True)
    return model, arrays


def image_sizes(name):
    """The sizes at which timm runs a model: two, but one where attention is over a whole map."""
    size = VARIANTS[name].image_size
    return (
        [(size, size)]
        if VARIANTS[name].fields.get("global_size")
        else [
            (size, size),
            (size, 2 * size),
        ]
    )


def images(height, width):
    """Two images (2, height, width, 3) of random pixels, float32.

    Two, because PyTorch 2.13 takes a wrong gradient through batch normalisation when the batch is
    one and the cotangent transposed, as behind a lambda layer (finite differences show it).
    """
    return uniform("images", (2, height, width, 3), -2.0, 2.0)


def cotangent(num_classes):
    """What the gradients are taken with: (2, num_classes), float32."""
    return uniform("cotangent", (2, num_classes))


def timm_logits(model, x):
    """Logits (N, num_classes) of images (N, H, W, 3), in the precision of the model."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(torch.from_numpy(x).to(dtype).permute(0, 3, 1, 2)).numpy()


def timm_gradients(model, x):
    """Gradients (N, H, W, 3) in the images of sum(logits * cotangent), of a model in float64."""
    x = torch.from_numpy(x).double().requires_grad_()
    logits = model(x.permute(0, 3, 1, 2))
    (logits * torch.from_numpy(cotangent(logits.shape[1]))).sum().backward()
    return x.grad.numpy()


def difference(ours, theirs):
    """The largest difference, as a fraction of their largest value."""
    theirs = np.asarray(theirs, np.float64)
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())

"""The distinct attention layers of H0 to H7 and of the tiny network: what benchmarks go through."""

from halonet.models import VARIANTS, create_model, list_models
from halonet.tpu_kernels import Shape, attention_layers


def gigabytes(shape: Shape, n: int, itemsize: int) -> float:
    """What training needs at least when every logit exists twice: logits and windows."""
    queries = (shape.side // shape.stride) ** 2
    window = (shape.block + 2 * shape.halo) ** 2
    keys = (shape.side // shape.block) ** 2 * window
    logits = queries * window * shape.heads * 8
    return n * (logits + 2 * keys * shape.heads * (shape.d_k + shape.d_v) * itemsize) / 1e9


def layer_shapes() -> dict[Shape, str]:
    """Returns {shape: name}, each shape once, under the name of the first layer that has it."""
    names = {}
    for variant in list_models():
        if VARIANTS[variant].origin != "paper" and variant != "halonet_tiny":
            continue
        model, image_size = create_model(variant), VARIANTS[variant].image_size
        for stage, _, shape in attention_layers(model, image_size):
            name = f"{variant.removeprefix('halonet_').upper()} stage {stage} {shape}"
            names.setdefault(shape, name)
    return names

"""The distinct attention layers of H0 to H7 and of the tiny network: what benchmarks go through."""

import dataclasses

from halonet.models import VARIANTS, create_model, list_models


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer; `side` is that of its keys in pixels."""

    side: int
    block: int
    halo: int
    heads: int
    d_k: int
    d_v: int
    stride: int = 1

    def __str__(self):
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return (
            f"({self.side}x{self.side}{stride}, b{self.block} h{self.halo}, "
            f"{self.heads} x {self.d_k}, d_v {self.d_v})"
        )

    def gigabytes(self, n, itemsize):
        """What training needs at least when every logit exists twice: logits and windows."""
        queries = (self.side // self.stride) ** 2
        keys = (self.side // self.block) ** 2 * (self.block + 2 * self.halo) ** 2
        logits = queries * (self.block + 2 * self.halo) ** 2 * self.heads * 8
        return n * (logits + 2 * keys * self.heads * (self.d_k + self.d_v) * itemsize) / 1e9


def attention_layers(model, image_size):
    """Yields (stage, block, `Shape`) of each halo block, counted from 1 as in parameter names."""
    side = image_size // model.stem_stride
    for stage, blocks in enumerate(model.stages(), start=1):
        for number, block in enumerate(blocks, start=1):
            if block.kind == "h":
                yield (
                    stage,
                    number,
                    Shape(
                        -(-side // model.block_size) * model.block_size,
                        model.block_size,
                        model.halo_size,
                        block.heads,
                        block.key_width // block.heads,
                        block.value_width // block.heads,
                        block.stride,
                    ),
                )
            side = -(-side // block.stride)


def layer_shapes():
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

"""What the fused TPU kernel costs on a layer: XLA has no estimate for kernels, so a table has it.

`tpu_kernels.json` holds the cycles of one image, counted in the kernel's instructions by `python -m
experiments.tpu_kernels` for every layer of H0 to H7. A layer that is not in it is given those of
the one that is most like it, in proportion to their products.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator

from halonet import hlo
from halonet.aot import Chip
from halonet.models import HaloNet

RECORD = pathlib.Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer of halo attention; `side` is that of its keys in pixels."""

    side: int
    block: int
    halo: int
    heads: int
    d_k: int
    d_v: int
    stride: int = 1

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return (
            f"({self.side}x{self.side}{stride}, b{self.block} h{self.halo}, "
            f"{self.heads} x {self.d_k}, d_v {self.d_v})"
        )

    @classmethod
    def parse(cls, text: str) -> Shape:
        """What `str` has made, perhaps behind a name."""
        found = re.search(
            r"\((\d+)x\1(?: stride (\d+))?, b(\d+) h(\d+), (\d+) x (\d+), d_v (\d+)\)$", text
        )
        side, stride, *rest = (int(number or 1) for number in found.groups())
        return cls(side, *rest, stride)

    @property
    def products(self) -> int:
        """Multiply-adds of content, positions and values for one image; whole windows, each once.

        The kernel makes position logits as products with both tables beside the window.
        """
        queries, window = (self.side // self.stride) ** 2, (self.block + 2 * self.halo) ** 2
        tables = 2 * (2 * (self.block + self.halo) - 1)
        return queries * self.heads * ((window + tables) * self.d_k + window * self.d_v)

    def unlike(self, other: Shape) -> float:
        """How far two layers are apart: 0 for the same, and more for each unlike size."""
        # Of the side, cycles are nearly a multiple; of the others they are not.
        weights = {"side": 0.25, "heads": 1, "d_k": 1, "d_v": 1, "block": 2, "halo": 2, "stride": 3}
        return sum(
            weight * abs(math.log2((getattr(self, name) or 0.5) / (getattr(other, name) or 0.5)))
            for name, weight in weights.items()
        )


def attention_layers(model: HaloNet, image_size: int) -> Iterator[tuple[int, int, Shape]]:
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


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles of one image.

    Attributes:
      forward, backward: of a device, whose cores share out the groups of heads.
      like: the layer of the table that they were estimated from; "" where they are its own.
    """

    forward: float
    backward: float
    like: str = ""


@functools.cache
def table(generation: str) -> dict[Shape, Cost]:
    """The layers whose cycles are known on a generation of TPU such as "v5e"; {} for others."""
    layers = json.loads(RECORD.read_text())["layers"]
    return {
        Shape.parse(name): Cost(it[generation]["forward_cycles"], it[generation]["backward_cycles"])
        for name, it in layers.items()
        if generation in it
    }


def cost(shape: Shape, generation: str) -> Cost:
    """The cycles of a layer, from the table or from the layer in it that is most like this one.

    Raises:
      ValueError: for a generation that the table has nothing of.
    """
    known = table(generation)
    if not known:
        raise ValueError(f"no cycles of the fused kernel are known on {generation}")
    return known.get(shape) or _estimated(shape, known)


def _estimated(shape: Shape, known: dict[Shape, Cost]) -> Cost:
    near = min(known, key=shape.unlike)
    times = shape.products / near.products
    return Cost(known[near].forward * times, known[near].backward * times, str(near))


@functools.cache
def uncertainty(generation: str) -> float:
    """How far such an estimate is off, as a factor: of nine in ten layers no further.

    Found by estimating each layer of the table from the others.
    """
    known, factors = table(generation), []
    for shape, own in known.items():
        guess = _estimated(shape, {it: cost for it, cost in known.items() if it != shape})
        ratio = (guess.forward + guess.backward) / (own.forward + own.backward)
        factors.append(max(ratio, 1 / ratio))
    return sorted(factors)[math.ceil(0.9 * len(factors)) - 1]


def with_kernel_cycles(
    op: hlo.Operation,
    *,
    layers: dict[tuple[int, int], Shape],
    images: int,
    generation: str,
    chip: Chip,
    rows: int = 1,
) -> tuple[hlo.Operation, str]:
    """Fills in the cycles of a fused kernel.

    Args:
      op: any operation; only kernels are changed.
      layers: (stage, block) -> shape of the layer for a whole image.
      images: that a device computes at a time.
      generation: of the TPU, such as "v5e".
      chip: whose cores share the work.
      rows: devices that share the rows of an image.

    Returns:
      The operation, and the layer of the table that it was estimated from, or "".

    Raises:
      ValueError: for a generation that the table has nothing of.
    """
    if op.kind != "kernel":
        return op, ""
    stage, block = re.search(r"stage(\d+)_block(\d+)", op.op_name).groups()
    found = cost(layers[int(stage), int(block)], generation)
    of_one = found.backward if "halo_attention_backward" in op.name else found.forward
    # Of the grid, which has one for each group of heads.
    grid = int(re.search(r"\[(\d+)", op.shape)[1])
    groups = max(1, grid // images)
    # The table of v4 is of one of its cores.
    turns_of_one = groups if generation == "v4" else -(-groups // chip.cores)
    turns = -(-grid // chip.cores)
    return dataclasses.replace(op, cycles=int(of_one * turns / turns_of_one / rows)), found.like

"""The named variants, each with the numbers that define it.

Block size b, halo h, r_v, r_b, depths, d_f, heads and image size of H0 to H7 are transcribed alike
by independent re-implementers; r_v, r_b, depths and d_f are confirmed by the published parameter
counts, which each variant meets to the paper's digit. H7 stands at 640 px: the published 600 is not
a multiple of its blocks.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from halonet.models.halonet import HaloNet


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named architecture.

    Attributes:
      image_size: pixels of the square images it was designed for.
      params: trainable parameters at 1000 classes.
      fields: what it sets of `HaloNet`.
    """

    image_size: int
    params: int
    fields: dict[str, Any]


def _h(b: int, h: int, rv: float, rb: float, l3: int, df: int = 0) -> dict[str, Any]:
    return {
        "block_size": b,
        "halo_size": h,
        "value_ratio": rv,
        "out_ratio": rb,
        "depths": (3, 3, l3, 3),
        "final_width": df,
    }


VARIANTS: dict[str, Variant] = {
    "halonet_h0": Variant(256, 5_496_104, _h(8, 3, 1.0, 0.5, 7)),
    "halonet_h1": Variant(256, 8_098_280, _h(8, 3, 1.0, 1.0, 10)),
    "halonet_h2": Variant(256, 9_397_928, _h(8, 3, 1.0, 1.25, 11)),
    "halonet_h3": Variant(320, 11_834_728, _h(10, 3, 1.0, 1.5, 12, 1024)),
    "halonet_h4": Variant(384, 19_098_088, _h(12, 2, 1.0, 3.0, 12, 1280)),
    "halonet_h5": Variant(448, 30_710_760, _h(14, 2, 2.5, 2.0, 23, 1536)),
    "halonet_h6": Variant(512, 43_441_384, _h(8, 4, 3.0, 2.75, 24, 1536)),
    "halonet_h7": Variant(640, 67_421_288, _h(10, 3, 4.0, 3.5, 26, 2048)),
    # Ours, for images of about 32 px on a laptop: 16x16 and 8x8 maps in blocks of 4.
    "halonet_tiny": Variant(
        32,
        231_560,
        {
            "block_size": 4,
            "halo_size": 1,
            "value_ratio": 1.0,
            "out_ratio": 2.0,
            "depths": (1, 3),
            "widths": (32, 64),
            "heads": (2, 4),
            "stem_width": 32,
            "stem_kernel": 3,
            "stem_pool": False,
        },
    ),
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(VARIANTS)


def create_model(name: str, *, num_classes: int = 1000, **overrides: Any) -> HaloNet:
    """Builds a registered variant as a Flax linen module.

    Args:
      name: one of `list_models()`.
      num_classes: width of the logits.
      **overrides: any field of `HaloNet`, such as dtype, bn_group, block_size or border.

    Raises:
      ValueError: for an unknown name or field, naming the nearest known one.
    """
    variant = VARIANTS.get(name)
    if variant is None:
        raise ValueError(_unknown("model", name, list_models()))
    fields = [field.name for field in dataclasses.fields(HaloNet)]
    for key in overrides:
        if key not in fields or key in ("parent", "name"):
            raise ValueError(_unknown(f"option of {name}", key, fields))
    return HaloNet(num_classes=num_classes, **{**variant.fields, **overrides})


def _unknown(what: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(known)}"
    return f"unknown {what} '{name}'; {hint}"

"""The named variants, each with the numbers that define it.

Block size b, halo h, r_v, r_b, depths, d_f, heads and image size of H0 to H7 are transcribed alike
by independent re-implementers; r_v, r_b, depths and d_f are confirmed by the published parameter
counts, which each variant meets to the paper's digit. The models of timm and MindCV are those that
have published weights, with the conventions of their own code.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from halonet.models.halonet import HaloNet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named architecture.

    Attributes:
      image_size: pixels of the square images it was designed for.
      params: trainable parameters at 1000 classes.
      fields: what it sets of `HaloNet`, the conventions of its origin included.
      origin: whose definition it is: "paper", "timm", "mindcv" or "ours".
      published: its origin's figure for the parameters, in millions; 0 where there is none.
      mean, std: of the images that its published weights were trained on, per channel, white is 1.
      crop_pct, interpolation: of the evaluation that its published accuracy is of.
    """

    image_size: int
    params: int
    fields: dict[str, Any]
    origin: str
    published: float = 0.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 1.0
    interpolation: str = "bilinear"


def _h(b: int, h: int, rv: float, rb: float, l3: int, df: int = 0) -> dict[str, Any]:
    return {
        "block_size": b,
        "halo_size": h,
        "value_ratio": rv,
        "out_ratio": rb,
        "depths": (3, 3, l3, 3),
        "final_width": df,
    }


# The published size of H7 is not a multiple of its blocks; that it was padded is ours.
_H7 = {**_h(10, 3, 4.0, 3.5, 26, 2048), "pad_to_blocks": True}
# Base width 128, r_b and d_f as the published counts, 85 and 87 million, suggest them.
_H4_WIDE = {
    **_h(12, 2, 1.0, 4.0, 12, 1024),
    "widths": (128, 256, 512, 1024),
    "stem_widths": (128,),
}

# timm and MindCV index relative positions by neighbours also where queries are subsampled.
_CONVENTIONS = {"positions": "contiguous", "scale_positions": False}
_RESNET = {"depths": (3, 4, 6, 3), "out_ratio": 4.0}
_TIERED = {"stem_widths": (24, 32, 64), "stem_kernel": 3}
_26T = {
    **_CONVENTIONS,
    **_TIERED,
    "depths": (2, 2, 2, 2),
    "out_ratio": 4.0,
    "plan": "c/c/ch/h",
    "halo_size": 2,
    "heads": (8, 8, 8, 8),
}
_50TS = {
    **_CONVENTIONS,
    **_RESNET,
    **_TIERED,
    "activation": "silu",
    "plan": "c/ccch/chchch/chc",
    "heads": (4, 4, 8, 8),
}
_BOT = {**_50TS, "stem_pool": "none", "global_size": 8}
_CROP94 = {"crop_pct": 0.94, "interpolation": "bicubic"}
_CROP95 = {"crop_pct": 0.95, "interpolation": "bicubic"}

VARIANTS: dict[str, Variant] = {
    "halonet_h0": Variant(256, 5_496_104, _h(8, 3, 1.0, 0.5, 7), "paper", 5.5),
    "halonet_h1": Variant(256, 8_098_280, _h(8, 3, 1.0, 1.0, 10), "paper", 8.1),
    "halonet_h2": Variant(256, 9_397_928, _h(8, 3, 1.0, 1.25, 11), "paper", 9.4),
    "halonet_h3": Variant(320, 11_834_728, _h(10, 3, 1.0, 1.5, 12, 1024), "paper", 11.8),
    "halonet_h4": Variant(384, 19_098_088, _h(12, 2, 1.0, 3.0, 12, 1280), "paper", 19.1),
    "halonet_h5": Variant(448, 30_710_760, _h(14, 2, 2.5, 2.0, 23, 1536), "paper", 30.7),
    "halonet_h6": Variant(512, 43_441_384, _h(8, 4, 3.0, 2.75, 24, 1536), "paper", 43.4),
    "halonet_h7": Variant(600, 67_421_288, _H7, "paper", 67.4),
    # The paper's hybrids of H7 and wide H4s; how their convolutions widen is ours.
    "halonet_h7_conv1": Variant(600, 67_787_528, {**_H7, "plan": "c/h/h/h"}, "ours"),
    "halonet_h7_conv12": Variant(600, 69_259_688, {**_H7, "plan": "c/c/h/h"}, "ours"),
    "halonet_h7_conv123": Variant(600, 120_336_168, {**_H7, "plan": "c/c/c/h"}, "ours"),
    "halonet_h4_wide": Variant(384, 85_636_072, _H4_WIDE, "ours", 85.0),
    "halonet_h4_wide_conv12": Variant(
        384, 87_100_264, {**_H4_WIDE, "plan": "c/c/h/h"}, "ours", 87.0
    ),
    "timm_halonet_h1": Variant(
        256,
        8_100_056,
        {
            **_h(8, 3, 1.0, 1.0, 10),
            **_CONVENTIONS,
            "heads": (8, 8, 8, 8),
            "shortcut": "matching",
        },
        "timm",
        8.10,
        **_CROP95,
    ),
    "halonet26t": Variant(256, 12_480_288, _26T, "timm", 12.48, **_CROP95),
    "halonet50ts": Variant(256, 22_733_280, _50TS, "timm", 22.73, **_CROP94),
    "sehalonet33ts": Variant(
        256,
        13_691_712,
        {
            **_CONVENTIONS,
            **_TIERED,
            "depths": (2, 3, 3, 2),
            "plan": "c/cch/cch/h",
            "out_ratio": (4.0, 4.0, 4.0, 3.0),
            "heads": (8, 8, 8, 8),
            "stem_pool": "none",
            "final_width": 1280,
            "activation": "silu",
            "channel_attention": "se",
            "channel_attention_in": "c",
        },
        "timm",
        13.69,
        **_CROP94,
    ),
    "eca_halonext26ts": Variant(
        256,
        10_756_885,
        {
            **_26T,
            "key_ratio": (1.0, 1.0, 0.5, 0.25),
            "group_width": 16,
            "activation": "silu",
            "channel_attention": "eca",
            "channel_attention_in": "c",
        },
        "timm",
        10.76,
        **_CROP94,
    ),
    "haloregnetz_b": Variant(
        224,
        11_680_072,
        {
            **_CONVENTIONS,
            "block_size": 7,
            "halo_size": 2,
            "depths": (2, 6, 12, 2),
            "plan": "c/c/ccchccchccch/h",
            "widths": (48, 96, 192, 288),
            "heads": (8, 8, 8, 8),
            "key_ratio": 1 / 3,
            "expand_ratio": 3.0,
            "final_width": 1536,
            "stem_widths": (32,),
            "stem_kernel": 3,
            "stem_pool": "none",
            "first_stride": 2,
            "group_width": 16,
            "channel_attention": "se",
            "channel_attention_in": "c",
            "squeeze_ratio": 0.25,
            "activation": "silu",
            "shortcut": "matching",
            "downsample": "pool",
        },
        "timm",
        11.68,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        **_CROP94,
    ),
    "halo2botnet50ts_256": Variant(
        256,
        22_635_360,
        {**_BOT, "plan": "c/chch/chchch/cbc", "heads": (8, 8, 8, 4)},
        "timm",
        22.64,
        **_CROP95,
    ),
    "lamhalobotnet50ts_256": Variant(
        256,
        22_569_824,
        {**_BOT, "plan": "c/clcl/chchch/cbc", "heads": (4, 4, 8, 4)},
        "timm",
        22.57,
        **_CROP95,
    ),
    "halonet_50t": Variant(
        256, 22_733_280, {**_50TS, "stem_pool": "max_zeros"}, "mindcv", 22.79, crop_pct=0.95
    ),
    # The yardstick: a ResNet-50 of the same blocks (its stride in the 3x3 convolutions).
    "resnet50": Variant(224, 25_557_032, {**_RESNET, "plan": "c/c/c/c"}, "ours"),
    # Ours, for images of about 32 px on a laptop: 16x16 and 8x8 maps in blocks of 4.
    "halonet_tiny": Variant(
        32,
        231_560,
        {
            "block_size": 4,
            "halo_size": 1,
            "out_ratio": 2.0,
            "depths": (1, 3),
            "widths": (32, 64),
            "heads": (2, 4),
            "stem_widths": (32,),
            "stem_kernel": 3,
            "stem_pool": "none",
        },
        "ours",
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

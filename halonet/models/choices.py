"""What is uncertain about each model, and what its origin published: data for the model card."""

from __future__ import annotations

import dataclasses

from halonet.models.halonet import HaloNet
from halonet.models.registry import VARIANTS

# How sure a statement is.
TAGS = {
    "[V]": "verified in a source",
    "[V×n]": "transcribed alike by n re-implementers",
    "[C]": "computed",
    "[M-high], [M-med]": "recollection only",
    "ours": "no source settles it",
}

# (tag, what it is about, the statement), in groups; `choices` says which model has which.
CHOICES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "paper": (
        ("[V]", "figures", "image size, parameters and accuracy of the paper by kecam's README"),
        ("[C]", "widths", "r_v, r_b, depths and d_f: no others near them give the published count"),
    ),
    "b and h": (
        ("[V×3]", "b and h", "{block_size} and {halo_size}; the counts hardly constrain them"),
    ),
    "attention": (
        ("ours", "heads", "{heads}: three re-implementers [V×3]; timm's H1 has 8 everywhere"),
        ("ours", "tables", "2b+2h-1 rows an axis, one for each offset in pixels that can occur"),
        ("[C]", "tables", "one of rows and one of columns a layer, shared by the heads"),
        ("ours", "scale", "d_k^-1/2 on content and position, as BoTNet's code; timm: content only"),
        ("ours", "border", "outside the image keys and values are zero, as in timm, kecam, MindCV"),
        ("ours", "shortcut", "1x1 convolution and batch norm in the first block of every stage"),
        ("ours", "activation", "ReLU: the paper has SiLU as an add-on [M-med]; kecam takes SiLU"),
        ("[C]", "projections", "none of the attention's output; no biases of q, k and v [V×3]"),
    ),
    "downsampling": (
        ("[V]", "downsampling", "inside the attention: of its queries every second one, all keys"),
        ("[V]", "kept pixels", "(0, 0), (0, 2), ... as in timm and kecam; the paper's are unknown"),
    ),
    "block": (
        ("[V]", "batch norm", "after both 1x1 convolutions and what is between, as timm and kecam"),
        ("[V]", "batch norm", "momentum 0.9, epsilon 1e-5, a block's last scale 0: BoTNet's code"),
        (
            "[V]",
            "start",
            "He's; q, k, v normal of 0.01, tables of d_k^-1/2: meant by BoTNet's code",
        ),
        (
            "[M-med]",
            "dropout",
            "none here; the paper has some before the classifier, rates unknown",
        ),
    ),
    "final width": (
        ("ours", "last 1x1", "batch norm and activation follow it, as in timm and kecam"),
    ),
    "padding": (
        ("ours", "padding", "each attention pads its map to whole blocks; the paper's way unknown"),
    ),
    "h7 with convolutions": (
        ("[V]", "plan", "which stages are convolutional: kecam's table of the paper's results"),
        (
            "ours",
            "convolutions",
            "3x3, d to d*r_v channels; the paper's all have about 67 M [M-med]",
        ),
    ),
    "wide h4": (
        ("ours", "r_b", "raised to 4 [M-med]; with H4's 3 there are 68 M [C], published are 85 M"),
        ("ours", "widths", "stem and base 128, d_f 1024: the count that comes nearest [C]"),
    ),
    "conv-12": (
        ("[M-high]", "plan", "stages 1 and 2 convolutional; the 2 M more [V] fit this [C]"),
        ("ours", "convolutions", "3x3, d to d*r_v channels"),
    ),
    "tiny": (("ours", "everything", "sized for images of about 32 px on a laptop"),),
    "resnet50": (
        ("ours", "yardstick", "ResNet-50 of these blocks, strides in the 3x3; torchvision's count"),
    ),
    "timm": (
        ("[V]", "everything", "as in timm's own code; `make parity` compares logits and gradients"),
        ("ours", "start", "initialised from scratch as our other models, not as timm's"),
        ("[C]", "products", "timm counts two more for each value that batch norm touches"),
    ),
    "mindcv": (
        ("[V]", "everything", "layer by layer as in MindCV's own code, zeros in the max-pool too"),
        ("ours", "start", "from scratch as our other models; as MindCV's by init_function"),
        ("[C]", "parameters", "published with the 0.05 M running statistics of batch norm"),
        ("[V]", "windows", "(channel, row, column), as that code reads what nn.Unfold returns"),
        ("[V]", "windows", "MindSpore's own nn.Unfold orders them (row, column, channel)"),
        (
            "ours",
            "top-1",
            "so probably of weights trained with pixels and channels mixed; not imitated",
        ),
    ),
    "their evaluation": (
        (
            "[V]",
            "top-1",
            "of crops of 94 or 95 %, timm's bicubic; so converted weights are scored",
        ),
    ),
    "their attention": (
        ("[V]", "tables", "2(b+2h)-1 rows an axis; 2h of them or more are never used"),
        ("[V]", "scale", "d_k^-1/2 on content only"),
        ("[V]", "border", "outside the image keys and values are zero"),
    ),
    "their downsampling": (
        ("[V]", "downsampling", "inside the attention: of its queries every second one, all keys"),
        ("[V]", "positions", "such queries are indexed as if they were neighbours"),
    ),
    "pooling": (("[V]", "downsampling", "all queries attend, then 2x2 outputs are averaged"),),
    "global": (
        (
            "[V]",
            "b blocks",
            "attend to the whole map; the tables fit {global_size}x{global_size} only",
        ),
    ),
    "lambda": (("[V]", "l blocks", "lambda layers of 13x13 pixels, 16 key channels, depth 1"),),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """What a model's origin says of it, as text with a tag; "" where it says nothing."""

    layers: str = ""
    multiply_adds: str = ""
    top1: str = ""


def _paper(layers: int, top1: float) -> Published:
    return Published(layers=f"{layers} [M-high]", top1=f"{top1} % [V]")


def _timm(giga: float, top1: str = "") -> Published:
    return Published(multiply_adds=f"{giga:.2f} G [V]", top1=top1 and f"{top1} % [V]")


# Accuracies of the paper by keras_cv_attention_models' tables, of the wide H4 by CoAtNet; of timm
# by its results and benchmarks, of MindCV by its README.
PUBLISHED: dict[str, Published] = {
    "halonet_h0": _paper(50, 77.9),
    "halonet_h1": _paper(59, 79.9),
    "halonet_h2": _paper(62, 80.4),
    "halonet_h3": _paper(65, 81.9),
    "halonet_h4": _paper(65, 83.3),
    "halonet_h5": _paper(98, 84.0),
    "halonet_h6": _paper(101, 84.4),
    "halonet_h7": _paper(107, 84.9),
    "halonet_h7_conv1": Published(top1="84.6 % [V]"),
    "halonet_h7_conv12": Published(top1="84.7 % [V]"),
    "halonet_h7_conv123": Published(top1="83.8 % [V]"),
    "halonet_h4_wide": Published(top1="85.6 % after ImageNet-21k [V]"),
    "halonet_h4_wide_conv12": Published(top1="85.5 % after ImageNet-21k [V]"),
    "timm_halonet_h1": _timm(3.00),
    "halonet26t": _timm(3.19, "79.134"),
    "halonet50ts": _timm(5.30, "81.640"),
    "sehalonet33ts": _timm(3.55, "80.976"),
    "eca_halonext26ts": _timm(2.44, "79.518"),
    "haloregnetz_b": _timm(1.97, "81.058"),
    "halo2botnet50ts_256": _timm(5.02, "82.084"),
    "lamhalobotnet50ts_256": _timm(5.02, "81.552"),
    "halonet_50t": Published(top1="79.53 % [V]"),
}


def choices(name: str, model: HaloNet) -> list[tuple[str, str, str]]:
    """Returns (tag, subject, statement) for all that is uncertain about a registered variant.

    Args:
      model: that variant, perhaps with `pad_to_blocks`; the statements fit no other override.
    """
    origin = VARIANTS[name].origin
    blocks = [block for stage in model.stages() for block in stage]
    kinds = {block.kind for block in blocks}
    strided = any(block.kind == "h" and block.stride > 1 for block in blocks)
    theirs = origin in ("timm", "mindcv")
    groups = {
        "tiny": name == "halonet_tiny",
        "resnet50": name == "resnet50",
        "paper": origin == "paper",
        "b and h": name.startswith("halonet_h"),
        "wide h4": name.startswith("halonet_h4_wide"),
        "conv-12": name == "halonet_h4_wide_conv12",
        "h7 with convolutions": name.startswith("halonet_h7_conv"),
        "timm": origin == "timm",
        "mindcv": origin == "mindcv",
        "attention": "h" in kinds and not theirs,
        "their evaluation": theirs and PUBLISHED[name].top1 != "",
        "their attention": theirs,
        "downsampling": strided and not theirs,
        "their downsampling": strided and theirs and model.downsample == "queries",
        "pooling": strided and model.downsample == "pool",
        "global": "b" in kinds,
        "lambda": "l" in kinds,
        "padding": model.pad_to_blocks,
        "block": not theirs,
        "final width": model.final_width and not theirs,
    }
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    fields["heads"] = ", ".join(map(str, model.heads))
    return [
        (tag, subject, text.format(**fields))
        for group, holds in groups.items()
        if holds
        for tag, subject, text in CHOICES[group]
    ]

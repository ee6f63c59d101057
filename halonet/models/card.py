"""Models as text: the table of all of them, and the card of one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from halonet.models.block import KINDS
from halonet.models.choices import PUBLISHED, TAGS, Published, choices
from halonet.models.cost import MultiplyAdds, Part, cost, parameters
from halonet.models.halonet import HaloNet
from halonet.models.registry import VARIANTS, create_model

TABLE = (
    "model|image|block|halo|plan|blocks per stage|parameters|published, M|multiply-adds, G|origin"
)
PARTS = "|blocks|map|block|halo|heads|channels|parameters|projections|content|position|value|total"


def model_table() -> str:
    """All registered models as a Markdown table, with what one image of their size costs."""
    rows = [TABLE.split("|")]
    for name, variant in VARIANTS.items():
        model, size = create_model(name), variant.image_size
        parts = cost(model, size, size)
        windows = [(part.block, part.halo) for part in parts if "h" in part.kinds]
        rows.append(
            [
                f"`{name}`",
                f"{size} px",
                *(windows[0] if windows else ("-", "-")),
                f"`{model.plan or 'h'}`",
                ", ".join(map(str, model.depths)),
                f"{variant.params:,}",
                f"{variant.published:g}" if variant.published else "-",
                f"{sum(part.cost.total for part in parts) / 1e9:.2f}",
                variant.origin,
            ]
        )
    return markdown_table(rows, left=(0, 4, 5, 9))


def markdown_table(rows: Sequence[Sequence[object]], left: Sequence[int]) -> str:
    """Rows, the head first, as a table of Markdown; the columns of `left` are text."""
    head, *body = _aligned(rows, left)
    # Numbers stand at the right of their columns also where the Markdown is rendered.
    ends = ["-" if column in left else ":" for column in range(len(head))]
    rule = ["-" * (len(cell) - 1) + end for cell, end in zip(head, ends, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def model_card(name: str, model: HaloNet, height: int, width: int) -> str:
    """The card of a registered variant: its parts, totals, and how sure each choice is.

    Args:
      model: that variant, perhaps with `pad_to_blocks`; nothing else is said of overrides.
      height, width: of an image, in pixels.

    Raises:
      ValueError: for sizes that the model refuses.
    """
    parts = cost(model, height, width)
    counts = parameters(model, height, width)
    statements = _aligned(choices(name, model), left=(0, 1, 2))
    legend = "; ".join(f"{tag} {meaning}" for tag, meaning in TAGS.items())
    return "\n".join(
        [
            f"{name} ({VARIANTS[name].origin}), one image of {height} x {width} px",
            "",
            *_parts(parts, counts),
            "",
            *_totals(name, model, parts, counts),
            "",
            "Choices, and how sure they are:",
            *("  ".join(row).rstrip() for row in statements),
            textwrap.fill(legend, 100),
        ]
    )


def halo_stages(model: HaloNet, height: int, width: int) -> dict[int, list[tuple[int, int, int]]]:
    """The maps that halo attention takes keys from: {stage: [(height, width, stride), ...]}.

    The first block of a stage may subsample its queries; it sees the map of the stage before.

    Args:
      height, width: of the image, in pixels.

    Raises:
      ValueError: for sizes that the model refuses.
    """
    parts, found = cost(model, height, width), {}
    for stage, blocks in enumerate(model.stages(), start=1):
        before, after, maps = parts[stage - 1], parts[stage], []
        if any(block.kind == "h" and block.stride == 1 for block in blocks):
            maps.append((after.height, after.width, 1))
        if blocks[0].kind == "h" and blocks[0].stride > 1 and model.downsample == "queries":
            maps.append((before.height, before.width, blocks[0].stride))
        if maps:
            found[stage] = maps
    return found


def _parts(parts: Sequence[Part], counts: dict[str, int]) -> list[str]:
    def spent(cost: MultiplyAdds) -> list[str]:
        split = (cost.projections, cost.content, cost.position, cost.value, cost.total)
        return [f"{number / 1e6:,.1f}" if number else "-" for number in split]

    def row(part: Part) -> list[object]:
        window = (part.block, part.halo) if part.block else ("-", "-")
        heads, count = part.heads or "-", f"{counts[part.name]:,}"
        size = f"{part.height} x {part.width}"
        names = [part.name, _blocks(part.kinds), size]
        return [*names, *window, heads, part.channels, count, *spent(part.cost)]

    rows = [PARTS.split("|"), *map(row, parts)]
    total = sum((part.cost for part in parts), MultiplyAdds())
    rows.append(["total", *[""] * 6, f"{sum(counts.values()):,}", *spent(total)])
    lines = ["  ".join(row) for row in _aligned(rows, left=(0, 1))]
    kinds = sorted({kind for part in parts for kind in part.kinds})
    return [
        "multiply-adds, millions".rjust(len(lines[0])),
        *lines,
        "blocks: " + ", ".join(f"{kind} {KINDS[kind]}" for kind in kinds),
    ]


def _blocks(kinds: str) -> str:
    """hhh -> 3 h, but chc as it is."""
    return f"{len(kinds)} {kinds[0]}" if len(set(kinds)) == 1 else kinds


def _totals(name: str, model: HaloNet, parts: Sequence[Part], counts: dict[str, int]) -> list[str]:
    variant, published = VARIANTS[name], PUBLISHED.get(name, Published())
    spent = sum(part.cost.total for part in parts)
    size = f"{variant.published:g} M [V]" if variant.published else "-"
    rows = [
        ["", "here", f"published, at {variant.image_size} px"],
        ["parameters", f"{sum(counts.values()):,}", size],
        ["multiply-adds", f"{spent / 1e9:.2f} G", published.multiply_adds or "-"],
    ]
    if published.layers:
        # As the paper counts: the stem, three layers a block, the classifier.
        rows.append(["layers", str(3 * sum(model.depths) + 2), published.layers])
    if published.top1:
        rows.append(["top-1", "-", published.top1])
    return ["  ".join(row).rstrip() for row in _aligned(rows, left=(0, 2))]


def _aligned(rows: Sequence[Sequence[object]], left: Sequence[int]) -> list[list[str]]:
    """Cells padded to the width of their column; `left` are the columns that start at its left."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]

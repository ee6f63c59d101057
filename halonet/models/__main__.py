"""The registered models: all of them as a table, or the card of one.

python -m halonet.models list
python -m halonet.models show halonet_h4 --image_size=384 --picture=halonet_h4.png
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from halonet import plots
from halonet.models import VARIANTS, HaloNet, create_model
from halonet.models.card import halo_stages, model_card, model_table
from halonet.models.cost import strided


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str]) -> int:
    """Prints what was asked for and returns the exit code: 2 for what no model answers to."""
    parser = _Parser(prog="python -m halonet.models", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,show}")
    commands.add_parser("list", help="all models, as a Markdown table")
    show = commands.add_parser("show", help="the card of one model", allow_abbrev=False)
    show.add_argument("name", help="as `list` prints it")
    show.add_argument("--image_size", type=_size, help="pixels: 384, or 384x512 for height x width")
    show.add_argument("--pad_to_blocks", action="store_true", help="take any size")
    show.add_argument(
        "--picture", type=_png, metavar="PNG", help="draws blocks and halos into this file"
    )
    show.add_argument("--stage", type=int, help="what the picture shows; the first with halos")
    show.add_argument("--query", type=_query, metavar="ROW,COL", help="in the map of that stage")
    if not arguments:
        parser.print_usage(sys.stderr)
        return 2
    flags = parser.parse_args(arguments)
    if flags.command == "list":
        print(model_table())
        return 0
    try:
        padding = {"pad_to_blocks": True} if flags.pad_to_blocks else {}
        model = create_model(flags.name, **padding)
        size = flags.image_size or (VARIANTS[flags.name].image_size,) * 2
        # Drawn first: what cannot be drawn is said without a card above it.
        line = _draw(flags, model, *size)
        card = model_card(flags.name, model, *size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(card, line, sep="\n")
    return 0


def _draw(flags: argparse.Namespace, model: HaloNet, height: int, width: int) -> str:
    """Draws the picture if it was asked for; returns the last line of the card."""
    stages = halo_stages(model, height, width)
    if flags.picture is None:
        if flags.stage is not None or flags.query is not None:
            raise ValueError("--stage and --query are of the picture; name it with --picture=PNG")
        how = f"--picture={flags.name}.png, with --stage and --query"
        return f"picture of blocks and halos: {how if stages else 'this model has none'}"
    if not stages:
        raise ValueError(f"{flags.name} has no halo attention to draw")
    stage = min(stages) if flags.stage is None else flags.stage
    if stage not in stages:
        known = ", ".join(map(str, stages))
        raise ValueError(f"stage {stage} of {flags.name} has no halo attention; these do: {known}")

    rows, columns = strided(*stages[stage][0])
    query = flags.query or (rows // 3, columns // 3)
    if not (0 <= query[0] < rows and 0 <= query[1] < columns):
        raise ValueError(
            f"query {query[0]},{query[1]} is not in the map of stage {stage}, {rows} x {columns}"
        )
    plots.halo_picture(
        [(plots.photograph(h, w), stride, query) for h, w, stride in stages[stage]],
        flags.picture,
        block=model.block_size,
        halo=model.halo_size,
        border=model.border,
        title=f"{flags.name} at {height} × {width} px, stage {stage}",
    )
    return f"picture of stage {stage}, query {query[0]},{query[1]}: {flags.picture}"


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; write 384, or 384x512")
    return int(found[1]), int(found[2] or found[1])


def _png(text: str) -> str:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"'{text}' does not end in .png")
    return text


def _query(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not a pixel; write ROW,COL such as 10,20")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What did the sweeps find? Writes docs/results.md from the tables in docs/results/.

    python -m experiments.results [runs/scale_smoke ...]

Each folder is that of a collected sweep, whose CSV is taken into docs/results/ first. All that the
page says is counted from the tables, but for the questions: they are the first paragraphs of the
sweeps' own files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from etils import epath

from experiments.aggregate import Group, groups
from experiments.report import SHOWN
from experiments.table import CollectError, Row, question, read_table
from halonet import files

ROOT = epath.Path(__file__).parent.parent
TABLES, PAGE = ROOT / "docs" / "results", ROOT / "docs" / "results.md"
# Columns of the page: the table's, title.
COLUMNS = (
    ("loss", "loss"),
    ("parameters", "parameters"),
    ("multiply_adds", "multiply-adds"),
    ("images_per_second", "images/s"),
)
_SHORT = re.compile(r"(?<=\b[0-9a-f]{12})[0-9a-f]+")  # what a short hash leaves out
HEAD = """\
# Results of the sweeps

What the sweeps of `experiments/` gave, whatever it was: `python -m experiments.results` writes this
page from the tables in `docs/results/`, which `python -m experiments collect NAME` made of
the runs. Top-1 is of held-out images at the end of training, the mean over seeds, and its range is
from the least to the most of them; loss, in nats, multiply-adds, of one image, and images a second
in training, on all devices, are means.

A `_smoke` sweep trains tiny models on digits for a minute each. It shows that the question can be
asked, and how much chance alone makes; what it answers need not hold on ImageNet, where maps are
large and pixels far apart have to meet.
"""


def render(tables: dict[str, list[Row]]) -> str:
    """The page as Markdown, of tables by the name of their sweep."""
    return "\n".join([HEAD, *(_section(name, rows) for name, rows in tables.items())])


def _section(name: str, rows: list[Row]) -> str:
    asked, _ = question(rows[0]["config"])
    its_groups = groups(rows)
    shown = sorted(its_groups, key=lambda it: -(it.mean("top1") or 0))
    settings = list(its_groups[0].settings)
    titles = ["", *(f"`{key}`" for key in settings), "top-1, %", "range", "seeds"]
    titles += [title for _, title in COLUMNS]
    rule = ["---", *("---" for _ in settings), "---:", "---:", "---:", *("---:" for _ in COLUMNS)]
    lines = [titles, rule, *(_cells(group, settings) for group in shown)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    made = f"`{rows[0]['command']}`, in [{name}.csv](results/{name}.csv)."
    said = "\n\n".join(filter(None, (asked, made, table, _said(shown))))
    return f"## {name}\n\n{said}\n"


def _cells(group: Group, settings: Sequence[str]) -> list[str]:
    def cell(column: str) -> str:
        value = group.mean(column)
        return "-" if value is None else SHOWN[column][1](value)

    top1 = group.values("top1")
    between = f"{100 * min(top1):.2f} to {100 * max(top1):.2f}" if len(top1) > 1 else "-"
    return [
        _text(group.name),
        *(_text(group.settings[key] or "-") for key in settings),
        cell("top1"),
        between,
        str(len(group.finished)),
        *(cell(column) for column, _ in COLUMNS),
    ]


def _text(value: str) -> str:
    """A value that no table and no HTML takes for its own."""
    return value.replace("|", "\\|").replace("<", "&lt;")


def _said(shown: list[Group]) -> str:
    """What the table says in a sentence or two, and under which conditions."""
    rows = [row for group in shown for row in group.finished]
    best, *others = [group for group in shown if group.values("top1")]
    least = min(best.values("top1"))
    near = [group.name for group in others if max(group.values("top1")) >= least]
    found = []
    if all(len(group.finished) > 1 for group in (best, *others)):
        told = "no other's range reaches that of"
        if near:
            ranges = "range" if len(near) == 1 else "ranges"
            reach = "reaches" if len(near) == 1 else "reach"
            told = f"the {ranges} of {', '.join(map(_text, near))} {reach} that of"
        found.append(f"Over these seeds {told} {_text(best.name)}.")
    if left := sum(row["state"] != "done" for group in shown for row in group.members):
        found.append(f"{left} of its members have not finished and are left out.")
    examples = sorted({row["examples"] for row in rows})
    sizes = " or ".join(f"{count:,.0f}" for count in examples)
    found.append(f"{sizes} held-out images: one is {100 / examples[0]:.2g} points of top-1.")
    names = ("step", "devices", "commit", "jax")
    made = {name: dict.fromkeys(str(row[name]) for row in rows if row.get(name)) for name in names}
    made["step"] = dict.fromkeys(f"{int(it):,} steps" for it in made["step"])
    made["jax"] = dict.fromkeys(f"jax {it}" for it in made["jax"])
    made["commit"] = dict.fromkeys(f"commit {_SHORT.sub('', it)}" for it in made["commit"])
    found.append(f"Made with {', '.join(' or '.join(it) for it in made.values() if it)}.")
    return " ".join(found)


def main(arguments: Sequence[str]) -> int:
    """Takes over the tables of these folders, writes the page, and returns the exit code."""
    try:
        for folder in map(epath.Path, arguments):
            path = folder / f"{folder.name}.csv"
            if not path.exists():
                raise CollectError(
                    f"there is no {path}; python -m experiments collect {folder.name} makes it"
                )
            read_table(path)
            TABLES.mkdir(parents=True, exist_ok=True)
            files.write_whole(TABLES / path.name, path.read_text())
        tables = {path.stem: read_table(path) for path in sorted(TABLES.glob("*.csv"))}
        if not tables:
            raise CollectError(f"there is no table in {TABLES}; give the folder of a sweep")
    except CollectError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    files.write_whole(PAGE, render(tables))
    print(f"wrote {PAGE.relative_to(ROOT)}: {', '.join(tables)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

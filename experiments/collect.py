"""Joins the members of a sweep: one CSV, one report in HTML, and a short table here.

python -m experiments collect scale_smoke
"""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

from experiments import report
from experiments.table import CollectError, Row, read_sweep, table, versions, write_table
from halonet import files

# Of the printed table, as the report shows them.
PRINTED = ("top1", "best_top1", "parameters", "multiply_adds", "images_per_second", "seconds")


def collect(
    folder: epath.PathLike, *, out: epath.PathLike = "", allow_mixed: bool = False
) -> tuple[epath.Path, epath.Path]:
    """Writes NAME.csv and NAME.html of the sweep in `folder`, prints a short table, and returns the
    two paths.

    Args:
      folder: ROOT/NAME, where the sweep was run; unfinished members are rows, too.
      out: folder of the two files, made where it does not exist; "": the sweep's own.
      allow_mixed: joins members that different versions of the code have trained, and says so in
        the report.

    Raises:
      CollectError: where there is no sweep, no finished member, or several versions of the code.
    """
    sweep = read_sweep(folder)
    made_by = versions(sweep)
    if len(made_by) > 1 and not allow_mixed:
        each = "".join(f"\n  {version}: {', '.join(it)}" for version, it in made_by.items())
        raise CollectError(
            f"{len(made_by)} versions of the code trained the members in {folder}; train them "
            f"with one, or join them all the same with --allow_mixed{each}"
        )
    rows = table(sweep)
    out = epath.Path(out or folder)
    paths = out / f"{sweep.name}.csv", out / f"{sweep.name}.html"
    page = report.render(sweep, rows, out, made_by)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_table(rows, paths[0])
        files.write_whole(paths[1], page)
    except OSError as error:
        raise CollectError(f"{out} cannot be written: {error.strerror}") from error
    print(_printed(rows))
    for note in report.notes(rows, made_by):
        print(note)
    print(f"written to {paths[0]} and {paths[1]}")
    return paths


def _printed(rows: Sequence[Row]) -> str:
    """The members, the best first, those without a result last."""
    best = sorted(rows, key=lambda row: -1 if row["top1"] is None else row["top1"], reverse=True)
    lines = [("member", "state", *(report.SHOWN[column][0] for column in PRINTED))]
    lines += [
        (
            row["name"],
            row["state"],
            *("" if row[it] is None else report.SHOWN[it][1](row[it]) for it in PRINTED),
        )
        for row in best
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )

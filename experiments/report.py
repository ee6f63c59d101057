"""The report of a sweep: one HTML file that needs nothing but itself.

Python counts, and writes the tables; the script in the page draws, sorts and shows. The page's own
policy allows that script and nothing else, so that what comes from files stays text.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import json
import math
import os
import pathlib
import re
import textwrap
import urllib.parse
from collections.abc import Sequence
from typing import Any

from etils import epath

from experiments.aggregate import Group, front, groups, power_law, varying
from experiments.table import MEASURED, Member, Row, Sweep, question

PARTS = pathlib.Path(__file__).parent
# A curve is drawn with so many points at most.
MOST_POINTS = 400
# Of rows of metrics, with the axis's title.
CURVES = {
    "train/loss": "training loss, nats",
    "eval/loss": "held-out loss, nats",
    "eval/top1": "held-out top-1, %",
}
# What a model costs: column, title, whether more of it is better.
COSTS = (
    ("parameters", "parameters", False),
    ("multiply_adds", "multiply-adds of an image", False),
    ("training_flops", "FLOPs of the training", False),
    ("images_per_second", "images per second in training", True),
)
# Columns of the page's table: the table's, the title, how to show it.
SHOWN = {
    "step": ("steps", lambda x: f"{x:,}"),
    "top1": ("top-1, %", lambda x: f"{100 * x:.2f}"),
    "best_top1": ("best top-1, %", lambda x: f"{100 * x:.2f}"),
    "loss": ("loss", lambda x: f"{x:.4f}"),
    "parameters": ("parameters", lambda x: short(x)),
    "multiply_adds": ("multiply-adds", lambda x: short(x)),
    "training_flops": ("training FLOPs", lambda x: short(x)),
    "images_per_second": ("images/s", lambda x: f"{x:,.0f}"),
    "mfu": ("MFU", lambda x: f"{x:.1%}"),
    "goodput": ("goodput", lambda x: f"{x:.0%}"),
    "seconds": ("minutes", lambda x: f"{x / 60:.1f}"),
    "starts": ("starts", lambda x: f"{x:.0f}"),
}
_CLASSES = {"done": "good", "failed": "bad"}


def short(number: float) -> str:
    """1.23M of 1234567: three digits or more, k, M, G, T, P or E."""
    power = min(max(0, int(math.log10(abs(number)) // 3)), 6) if number else 0
    digits = number / 1000**power
    return (
        f"{digits:.{max(0, 2 - int(math.log10(max(1, abs(digits)))))}f}{' kMGTPE'[power]}".strip()
    )


def render(
    sweep: Sweep, rows: Sequence[Row], out: epath.Path, versions: dict[str, list[str]]
) -> str:
    """The page as text.

    Args:
      rows: of `table`.
      out: the folder that it will lie in: links to configurations start there.
      versions: what `experiments.table.versions` says; more than one is told at the top.
    """
    asked, rest = question(sweep.config)
    its_groups = groups(rows)
    style, script = ((PARTS / f"report.{kind}").read_text() for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "style": style,
        "script": script,
        "data": _embedded(_drawn(sweep, its_groups)),
        "title": html.escape(sweep.name),
        "question": html.escape(asked or sweep.name),
        "about": "".join(_paragraph(it) for it in rest.split("\n\n") if it),
        "command": html.escape(sweep.command),
        "counts": html.escape(_counts(sweep)),
        "notes": "".join(f"<li>{html.escape(it)}</li>" for it in notes(rows, versions)),
        "members": _members(rows, its_groups),
        "groups": _groups(its_groups),
        "same": _same(rows),
        "configs": "".join(_config(member, out) for member in sweep.members),
    }
    # In one pass: what comes from files may look like a place, too.
    template = (PARTS / "report.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _paragraph(text: str) -> str:
    """Of a docstring; what is indented is code, and what stands in backticks."""
    if text.startswith("    "):
        return f"<pre>{html.escape(textwrap.dedent(text))}</pre>"
    marked = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return f"<p>{marked}</p>"


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _embedded(data: Any) -> str:
    """JSON that no HTML parser takes for the end of its element."""
    text = json.dumps(_finite(data), allow_nan=False, separators=(",", ":"))
    return re.sub(r"[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _finite(data: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _drawn(sweep: Sweep, its_groups: list[Group]) -> dict[str, Any]:
    """What the page's script draws."""
    of = {row["id"]: index for index, group in enumerate(its_groups) for row in group.members}
    shown = [
        {
            "name": group.name,
            "finished": len(group.finished),
            "settings": group.settings,
            "top1": [group.mean("top1"), *_range(group.values("top1"))],
            "costs": {column: group.mean(column) for column, _, _ in COSTS},
        }
        for group in its_groups
    ]
    members = [
        {
            "name": member.name,
            "group": of[member.id],
            "curves": {name: thinned(_points(member, name)) for name in CURVES},
        }
        for member in sweep.members
    ]
    return {
        "groups": shown,
        "members": members,
        "curves": CURVES,
        "costs": [
            {
                "name": column,
                "title": title,
                "front": _front(its_groups, column, more_is_better),
                "fit": None if more_is_better else _fit(its_groups, column),
            }
            for column, title, more_is_better in COSTS
        ],
    }


def _range(values: list[float]) -> tuple[float | None, float | None]:
    return (min(values), max(values)) if values else (None, None)


def _points(member: Member, name: str) -> list[tuple[int, float]]:
    scale = 100 if name == "eval/top1" else 1
    return [(row["step"], scale * row[name]) for row in member.history if name in row]


def thinned(points: list[Any], most: int = MOST_POINTS) -> list[Any]:
    """Every so manieth point, the last one among them, such that `most` are left."""
    every = -(-len(points) // most) if points else 1
    return points[::-1][::every][::-1]


def _compared(its_groups: list[Group], column: str) -> list[int]:
    """The groups that have a cost and an accuracy."""
    return [i for i, it in enumerate(its_groups) if it.values(column) and it.values("top1")]


def _front(its_groups: list[Group], column: str, more_is_better: bool) -> list[int]:
    known = _compared(its_groups, column)
    points = [(its_groups[i].mean(column), its_groups[i].mean("top1")) for i in known]
    return [known[i] for i in front(points, more_is_better=more_is_better)]


def _fit(its_groups: list[Group], column: str) -> dict[str, Any] | None:
    # A model without a mistake has no logarithm of its error.
    known = [i for i in _compared(its_groups, column) if its_groups[i].mean("top1") < 1]
    if not known:
        return None
    costs = [its_groups[i].mean(column) for i in known]
    errors = [1 - its_groups[i].mean("top1") for i in known]
    found = power_law(costs, errors)
    return found and {"groups": known, "errors": errors, **dataclasses.asdict(found)}


def _counts(sweep: Sweep) -> str:
    states = [member.state for member in sweep.members]
    said = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(states)} members: {said}"


def notes(rows: Sequence[Row], versions: dict[str, list[str]]) -> list[str]:
    """What a reader has to know before comparing the members."""
    found = []
    if len(versions) > 1:
        each = "; ".join(f"{version}: {', '.join(names)}" for version, names in versions.items())
        found.append(f"Mixed: {len(versions)} versions of the code trained these members. {each}.")
    finished = [row for row in rows if row["state"] == "done"]
    if any("-dirty" in (row.get("commit") or "") for row in finished):
        found.append(
            "Trained with changes that were not committed: the commit does not tell the code."
        )
    left = [row["name"] for row in rows if row["state"] != "done"]
    if left:
        found.append(
            f"Not finished, and in curves and the table of members alone: {', '.join(left)}."
        )
    if len({row["devices"] for row in finished}) > 1:
        found.append("Trained on different devices: images per second do not compare.")
    if examples := {row["examples"] for row in finished if row["examples"]}:
        sizes = " or ".join(f"{count:,.0f}" for count in sorted(examples))
        each = 100 / min(examples)
        found.append(f"{sizes} held-out examples; one of them is {each:.2g} points of top-1.")
    return found


def _header(columns: Sequence[tuple[str, str, str]]) -> str:
    """A row of headings that sort: (key, title, meaning) each."""
    numbers = {"seeds", "low", "high", *SHOWN}
    cells = (
        f'<th scope="col" class="{"number" if key in numbers else ""}" aria-sort="none" '
        f'data-key="{html.escape(key)}">'
        f'<button type="button" title="{html.escape(meaning)}">{html.escape(title)}</button></th>'
        for key, title, meaning in columns
    )
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _cell(value: Any, text: str, kind: str = "") -> str:
    """A cell that sorts by its value."""
    number = isinstance(value, int | float)
    kind = kind or ("number" if number else "")
    value = "" if value is None else value
    return f'<td class="{kind}" data-value="{html.escape(str(value))}">{html.escape(text)}</td>'


def _shown(column: str, value: Any) -> str:
    return _cell(value, "" if value is None else SHOWN[column][1](value))


def _members(rows: Sequence[Row], its_groups: list[Group]) -> str:
    settings = varying(rows)
    columns = [column for column in SHOWN if any(row[column] is not None for row in rows)]
    head = [("name", "member", "to its configuration"), ("state", "state", "of its run")]
    head += [(key, key.removeprefix("config."), "as configured") for key in settings]
    head += [(column, SHOWN[column][0], MEASURED[column][1]) for column in columns]
    body = []
    for row in rows:
        link = urllib.parse.quote(f"config-{row['id']}")
        name = html.escape(row["name"])
        cells = [f'<th scope="row" data-value="{name}"><a href="#{link}">{name}</a></th>']
        cells.append(_cell(row["state"], row["state"], _CLASSES.get(row["state"], "dim")))
        cells += [_setting(row[key]) for key in settings]
        cells += [_shown(column, row[column]) for column in columns]
        group = next(i for i, it in enumerate(its_groups) if row in it.members)
        body.append(f'<tr data-group="{group}">{"".join(cells)}</tr>')
    return f"{_header(head)}<tbody>{''.join(body)}</tbody>"


def _setting(value: str | None) -> str:
    try:
        return _cell(float(value or ""), value or "")
    except ValueError:
        return _cell(value, "" if value is None else value)


def _groups(its_groups: list[Group]) -> str:
    """Means over seeds; "" where no two members differ in seed alone."""
    if not any(len(group.members) > 1 for group in its_groups):
        return ""
    settings = list(its_groups[0].settings)
    columns = ["loss", "parameters", "multiply_adds", "training_flops", "images_per_second"]
    head = [("name", "group", "what its members share"), ("seeds", "seeds", "that have finished")]
    head += [(key, key, "as configured") for key in settings]
    head += [
        ("top1", "top-1, %", "mean over the seeds"),
        ("low", "least", "of the seeds, %"),
        ("high", "most", "of the seeds, %"),
    ]
    head += [(column, SHOWN[column][0], "mean over the seeds") for column in columns]
    body = []
    for index, group in enumerate(its_groups):
        low, high = _range(group.values("top1"))
        name = html.escape(group.name)
        cells = [f'<th scope="row" data-value="{name}">{name}</th>']
        cells.append(_cell(len(group.finished), f"{len(group.finished)} of {len(group.members)}"))
        cells += [_setting(group.settings[key]) for key in settings]
        cells += [_shown("top1", value) for value in (group.mean("top1"), low, high)]
        cells += [_shown(column, group.mean(column)) for column in columns]
        body.append(f'<tr data-group="{index}">{"".join(cells)}</tr>')
    table = f"{_header(head)}<tbody>{''.join(body)}</tbody>"
    return (
        "<h2>Seeds together</h2><p>Members that differ in seed alone: mean, least and most.</p>"
        f'<div class="wide"><table id="groups">{table}</table></div>'
    )


def _same(rows: Sequence[Row]) -> str:
    """What the finished members were made with: overrides of all of them, versions, devices."""
    finished = [row for row in rows if row["state"] == "done"]
    apart = {"name", "id", "state", "command", *MEASURED} - {"devices"}
    names = [name for name in rows[0] if name not in apart]
    found = []
    for name in names:
        values = dict.fromkeys(row[name] for row in finished if row[name] is not None)
        if len(values) == 1 or (values and not name.startswith("config.")):
            said = " or ".join(str(value) for value in values)
            title = "configuration" if name == "config" else name.removeprefix("config.")
            found.append(f"<dt>{html.escape(title)}</dt><dd>{html.escape(said)}</dd>")
    return "".join(found)


def _config(member: Member, out: epath.Path) -> str:
    """A member's configuration, to be read where the file itself is not at hand."""
    name, path = html.escape(member.name), member.workdir / "config.json"
    # Of a bucket's file a page on a disk knows no relative way, nor the other way round.
    apart = ("://" in str(path)) != ("://" in str(out))
    href = str(path) if apart else urllib.parse.quote(os.path.relpath(path, out))
    link = f'<p><a class="file" href="{html.escape(href)}">{html.escape(str(path))}</a></p>'
    text = html.escape(json.dumps(member.config, indent=2))
    inside = f"{link}<pre>{text}</pre>" if member.config else "<p>It has not been started.</p>"
    place = html.escape(f"config-{member.id}")
    return f'<details id="{place}"><summary>{name}</summary>{inside}</details>'

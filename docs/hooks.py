"""What MkDocs calls when it builds the site: the pages that come from elsewhere, and their links.

The front page is README.md; configuration.md and configs.md are made of main.py and configs/ as
they are, by reading and not by running them. Links between README.md and docs/ are those of the
repository, and are turned into those of the site here.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
# What stands beside docs/ in the repository, and where it is in the site.
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
    "configs/default.py": "configuration.md",
}
# Commands that nobody could try here: a comment to readers of the source, a title in the site.
UNTRIED = (
    "<!-- needs hardware -->\n```\n",
    '``` { .text title="needs hardware: not tried by us" }\n',
)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


# --- called by MkDocs


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are not in docs/."""
    from mkdocs.structure.files import File

    made = {"configuration.md": configuration_page(), "configs.md": configs_page()}
    made |= {BESIDE[name]: (ROOT / name).read_text() for name in BESIDE if name.endswith(".md")}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the links of the repository into those of the site, and marks into titles."""
    folder = "" if page.file.src_uri in BESIDE.values() else "docs/"
    return site_links(markdown, folder).replace(*UNTRIED)


# --- links


def site_links(markdown: str, folder: str) -> str:
    """Links as they are in the site; `folder` of the repository is where the page stands."""
    code = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
    parts, end = [], 0
    for it in code.finditer(markdown):  # what is code has no links
        parts += [_linked(markdown[end : it.start()], folder), it[0]]
        end = it.end()
    return "".join([*parts, _linked(markdown[end:], folder)])


def _linked(text: str, folder: str) -> str:
    return LINK.sub(lambda it: it[1] + _target(it[2], folder) + it[3], text)


def _target(link: str, folder: str) -> str:
    path, mark, anchor = link.partition("#")
    if not path or re.match(r"\w+:", path):
        return link
    path = path.removeprefix("../") if path.startswith("../") else folder + path
    if path in BESIDE:
        return BESIDE[path] + mark + anchor
    if config := re.fullmatch(r"configs/(\w+)\.py", path):
        return f"configs.md#{config[1]}"
    return path.removeprefix("docs/") + mark + anchor


# --- configs/default.py and main.py


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
      name: with dots, as in `--config.model.name`.
      value: the default, as it is written.
      comment: behind it, and before it on lines of its own.
    """

    name: str
    value: str
    comment: str
    before: str = ""

    @property
    def type(self) -> str:
        value = ast.parse(self.value, mode="eval").body
        if isinstance(value, ast.Tuple):
            return f"{len(value.elts)} floats" if value.elts else "ints"
        return type(ast.literal_eval(value)).__name__


def configuration_keys(source: str) -> list[Key]:
    """The keys that get_config() of a source sets, in its order."""
    tree = ast.parse(source)
    (function,) = (it for it in tree.body if isinstance(it, ast.FunctionDef))
    behind, alone = _comments(source)
    found, line = [], function.lineno
    for statement in function.body:
        name = _dotted(statement.targets[0]) if isinstance(statement, ast.Assign) else ""
        if name.startswith("config.") and not isinstance(statement.value, ast.Call):
            before = [alone[it] for it in range(line + 1, statement.lineno) if it in alone]
            value = ast.get_source_segment(source, statement.value)
            comment = behind.get(statement.end_lineno, "")
            found.append(Key(name.removeprefix("config."), value, comment, " ".join(before)))
        line = statement.end_lineno
    return found


def _dotted(node: ast.expr) -> str:
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else node.id


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: behind a statement, and on lines of their own."""
    behind, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            (behind if token.line[: token.start[1]].strip() else alone)[token.start[0]] = text
    return behind, alone


def flag_table(source: str) -> list[tuple[str, str, str, str]]:
    """(name, kind, default, help) of each flag that a source defines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        kind = node.func.attr.removeprefix("DEFINE_")
        if kind == node.func.attr:
            continue
        name, default, *rest = [ast.literal_eval(it) for it in node.args]
        if kind == "enum":
            kind, *rest = " or ".join(filter(None, rest[0])), *rest[1:]
        kind = {"config_file": "file", "bool": "switch"}.get(kind, kind)
        found.append((name, kind, "" if default in (None, "", []) else str(default), rest[0]))
    return found


def configuration_page() -> str:
    """The page of main.py's flags and of every key."""
    default = (ROOT / "configs" / "default.py").read_text()
    note = ast.get_docstring(ast.parse(default)).partition("\n\n")[2]
    lines = [
        "# Flags and configuration keys",
        "",
        "Made of `main.py` and `configs/default.py` when this site is built.",
        "",
        "## Flags of main.py",
        "",
        "| flag | kind | default | what |",
        "|---|---|---|---|",
    ]
    for name, kind, value, what in flag_table((ROOT / "main.py").read_text()):
        lines.append(f"| `--{name}` | {kind} | {_code(value)} | {what} |")
    lines += ["", "## Keys", "", note, "", _may_change()]
    group = None
    for key in configuration_keys(default):
        its = key.name.rpartition(".")[0]
        if its != group:
            lines += ["", f"### {its or 'seed'}"]
        if key.before:
            lines += ["", f"{key.before}"]
        if its != group or key.before:
            lines += ["", "| key | type | default | what |", "|---|---|---|---|"]
        lines.append(f"| `{key.name}` | {key.type} | {_code(key.value)} | {key.comment} |")
        group = its
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _may_change() -> str:
    """Which keys may change between two starts of a run, as halonet/config.py has it."""
    tree = ast.parse((ROOT / "halonet" / "config.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and _dotted(node.targets[0]) == "MAY_CHANGE"
    )
    names = [it.value for it in ast.walk(value) if isinstance(it, ast.Constant)]
    listed = ", ".join(f"`{name}*`" if name.endswith(".") else f"`{name}`" for name in names)
    return f"A run may go on with another value of {listed}: none of them changes what is computed."


# --- configs/


def configs_page() -> str:
    """The page of all configurations: what each says of itself, and its source."""
    lines = [
        "# Configurations and their sources",
        "",
        "What the files of `configs/` say of themselves: the command, what was published, and",
        "where each number comes from. Any key of the [reference](../configs/default.py) can be",
        "overridden by `--config.key=value`.",
    ]
    for path in config_files():
        source = path.read_text()
        title, _, text = ast.get_docstring(ast.parse(source)).partition("\n\n")
        code = source.split('"""', 2)[2].strip()
        lines += ["", f"## {path.name} {{: #{path.stem} }}", "", f"**{title}**", "", text]
        lines += ["", f'??? quote "configs/{path.name}"', "", "    ```python"]
        lines += [f"    {line}".rstrip() for line in code.splitlines()]
        lines += ["    ```"]
    return "\n".join(lines) + "\n"


def config_files() -> Iterator[pathlib.Path]:
    """The configurations but for the defaults, which have a page of their own."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem not in ("__init__", "default"):
            yield path

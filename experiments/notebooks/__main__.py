"""Executes the notebooks beside this file and writes them, with what they show, as pages.

python -m experiments.notebooks                       # all of them into docs/notebooks: minutes
python -m experiments.notebooks first_steps --out=DIR # one of them, elsewhere

Each is a Python file in jupytext's percent format; `jupytext --to ipynb FILE` makes a notebook of
it, and Jupyter with jupytext opens it as it is. They run in a kernel of their own, in the folder
`--root`, where they keep their runs: what one has trained the next one finds. Needs
requirements-docs.txt.
"""

import argparse
import base64
import os
import pathlib
import re
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
# In the order in which they are read.
NAMES = ("first_steps", "restore_and_evaluate", "compare_runs", "fine_tune", "look_inside")


def execute(name: str, folder: pathlib.Path):
    """The notebook with its outputs, run in `folder`; an error of a cell is raised."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(HERE / f"{name}.py")
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return client.execute(env=environment)


def page(notebook, name: str, out: pathlib.Path) -> str:
    """The notebook as Markdown; its pictures are written beside it, into the folder `name`."""
    parts, pictures, about = [], 0, name
    for earlier in (out / name).glob("*.png"):
        earlier.unlink()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = re.search(r"^#+ (.*)$", cell.source, re.M)
            about = heading[1] if heading else about
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        said = ""
        for output in cell.outputs:
            data = output.get("data", {})
            said += output.get("text", "")
            if "image/png" in data:
                pictures += 1
                (out / name).mkdir(exist_ok=True)
                picture = base64.b64decode(data["image/png"])
                (out / name / f"{pictures}.png").write_bytes(picture)
                parts.append(f"![{about}]({name}/{pictures}.png)")
            elif "text/plain" in data:
                said += data["text/plain"]
        if said:
            place = -1 if parts[-1].startswith("![") else len(parts)
            parts.insert(place, f"```text\n{said.rstrip()}\n```")
    command = f"python -m experiments.notebooks {name}"
    parts.append(f"This page is `experiments/notebooks/{name}.py`, executed: `{command}` wrote it.")
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    """Renders what is asked for, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.notebooks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; or all")
    parser.add_argument("--out", default=ROOT / "docs" / "notebooks", type=pathlib.Path)
    parser.add_argument("--root", type=pathlib.Path, help="where they run; a new, empty folder")
    flags = parser.parse_args(arguments)
    if unknown := [name for name in flags.names if name not in NAMES]:
        parser.error(f"there is no notebook {unknown[0]!r}; there are: {', '.join(NAMES)}")
    flags.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as empty:
        folder = (flags.root or pathlib.Path(empty)).resolve()
        for name in flags.names or NAMES:
            began = time.monotonic()
            text = page(execute(name, folder), name, flags.out)
            # Nothing of this machine: what was printed may name the folder that it ran in.
            text = text.replace(f"{folder}{os.sep}", "")
            (flags.out / f"{name}.md").write_text(text)
            print(f"{flags.out / name}.md: {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

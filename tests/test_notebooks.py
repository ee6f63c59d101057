"""The notebooks run in a kernel, from nothing, and their pages in docs/ are what they say now."""

import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.numpy import save_file

from experiments.notebooks.__main__ import HERE, NAMES, ROOT, main
from experiments.photographs import write_tiles

PAGES = ROOT / "docs" / "notebooks"


def cells(text):
    """(source, whether it is code) of the cells of a notebook in the percent format."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.M)[1:]
    for kind, source in zip(parts[::2], parts[1::2], strict=True):
        code, source = "markdown" not in kind, source.strip()
        yield source if code else re.sub(r"^# ?", "", source, flags=re.M), code


def test_all_notebooks_are_named():
    assert set(NAMES) == {path.stem for path in HERE.glob("[a-z]*.py")}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_of_the_notebook_as_it_is(name):
    page = (PAGES / f"{name}.md").read_text()
    place, pictures = 0, 0
    for source, code in cells((HERE / f"{name}.py").read_text()):
        source = f"```python\n{source}\n```" if code else source
        assert source in page[place:], f"run python -m experiments.notebooks {name}"
        place = page.index(source, place) + len(source)
    for link in re.findall(r"!\[[^\]]+\]\((.*?)\)", page):
        with Image.open(PAGES / link) as picture:
            assert picture.format == "PNG"
        pictures += 1
    assert pictures == len(list((PAGES / name).iterdir())) > 0
    # Of no machine in particular, and without an error.
    assert str(ROOT) not in page
    assert "Traceback" not in page


def test_the_pages_are_small():
    files = [path for path in PAGES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_an_unknown_notebook_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["first_step"])
    assert ended.value.code == 2
    assert "there is no notebook 'first_step'; there are: first_steps, " in capsys.readouterr().err


def test_photographs_are_cut_into_tiles(tmp_path):
    assert write_tiles(tmp_path) == write_tiles(tmp_path) == 328  # over those that are there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["china", "flower", "portrait"]
    with Image.open(tmp_path / "flower" / "48_96.jpg") as tile:
        assert (tile.size, tile.mode) == ((48, 48), "RGB")
    assert len(list(tmp_path.rglob("*.jpg"))) == 328


def python(*arguments, **options):
    """Runs Python as a user does, on the devices that there are: what it printed."""
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the notebooks run: what one has trained the next one finds."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.middle
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_a_kernel(name, root, tmp_path):
    for package in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason="make docs-env installs it")
    python("-m", "experiments.notebooks", name, f"--root={root}", f"--out={tmp_path}", cwd=ROOT)
    page = (tmp_path / f"{name}.md").read_text()
    # As many cells and pictures as the page in docs/ has.
    committed = (PAGES / f"{name}.md").read_text()
    for part in ("```python\n", "!["):
        assert page.count(part) == committed.count(part)
    assert str(root) not in page
    for picture in (tmp_path / name).iterdir():
        with Image.open(picture) as image:
            assert min(image.size) > 100
            low, high = image.convert("L").getextrema()
            assert low < 100 < 200 < high


@pytest.mark.middle
def test_what_they_trained_has_learned(root):
    """Those above, if they ran in this process."""
    runs = {path.parent.name: path for path in root.glob("runs/notebooks/*/summary.json")}
    if not runs:
        pytest.skip("no notebook has run")
    for name, least in (("digits", 0.7), ("photographs", 0.7), ("three_photographs", 0.7)):
        summary = json.loads(runs[name].read_text())
        assert summary["best/top1"] > least, name


@pytest.mark.middle
@pytest.mark.timeout(600)
def test_a_converted_run_is_looked_into_by_the_same_cells(tmp_path):
    """halonet26t, in timm's conventions, of random numbers."""
    from halonet.models import create_model
    from halonet.models.convert import weights
    from tests.random_arrays import random_arrays

    entries = weights.ENTRIES["timm"](create_model("halonet26t", num_classes=3))
    arrays = random_arrays({entry.theirs: entry.shape for entry in entries})
    save_file(arrays, tmp_path / "model.safetensors")
    python(
        *("-m", "halonet.models.convert", "timm", tmp_path / "model.safetensors"),
        *("--model=halonet26t", f"--out={tmp_path / 'converted'}"),
        cwd=ROOT,
    )
    code = "\n".join(
        source for source, code in cells((HERE / "look_inside.py").read_text()) if code
    )
    code, changed = re.subn(r'(?m)^WORKDIR = ".*"$', 'WORKDIR = "converted"', code)
    assert changed == 1
    (tmp_path / "runs" / "notebooks").mkdir(parents=True)
    said = python("-c", code, cwd=tmp_path, env={"MPLBACKEND": "agg"})
    assert "256 px, pixel (115, 97); layers: stage3_block2, stage4_block1, stage4_block2" in said
    drawn = {path.stem for path in (tmp_path / "runs" / "notebooks").iterdir()}
    assert {"stage3_block2", "stage4_block2", "fields", "logits", "pyramid"} <= drawn

"""The site: built without a warning, readable without a network, and strict for a reason."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = [
    pytest.mark.middle,
    pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs `make docs-env`"),
]


def build(folder, cwd=ROOT):
    """Builds the site of this repository, or of a copy, into a folder: exit code, what was said."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"],
        cwd=cwd,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    code, said = build(folder)
    assert (code, re.findall("WARNING|ERROR", said)) == (0, []), said
    return folder


def test_the_site_is_built_without_a_warning(site):
    names = {path.name for path in site.glob("*.html")}
    assert names >= {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert names >= {"index.html", "configuration.html", "configs.html", "CONTRIBUTING.html"}


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert re.findall(r"<(?:script|img|iframe)[^>]*src=\"?(?:https?:)?//", text) == []
        for link in re.findall(r"<link[^>]*>", text):
            assert "http" not in link, f"{page.name}: {link}"
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", styles) == []


def test_references_are_of_the_sources(site):
    assert "data.damaged_limit" in (site / "configuration.html").read_text()
    assert "halonet_h4" in (site / "index.html").read_text()
    api = (site / "api.html").read_text()
    for name in ("halo_attention", "HaloAttention", "create_model", "load_run", "list_models"):
        assert re.search(rf'id="halonet\.[\w.]*\b{name}"', api), name
    # Tables between marks are tables, not text.
    assert (site / "cost.html").read_text().count("<table>") == 4
    marks = (ROOT / "docs" / "pods.md").read_text().count("<!-- needs hardware -->")
    assert (site / "pods.html").read_text().count("needs hardware: not tried by us") == marks > 5


def test_what_leads_nowhere_is_refused(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "main.py", "mkdocs.yml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("configs", "halonet", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)

    def add(name, text):
        with open(tmp_path / "docs" / name, "a") as page:
            page.write(text)

    add("cost.md", "\n[a](gone.md) [b](faults.md#gone) [c](../README.md#gone)\n")
    add("alone.md", "# In no menu\n")
    code, said = build(tmp_path / "site", cwd=tmp_path)
    assert code == 1
    for part in (
        "contains a link 'gone.md', but the target is not found",
        "contains a link 'faults.md#gone', but the doc 'faults.md' does not contain an anchor",
        "contains a link 'index.md#gone', but the doc 'index.md' does not contain an anchor",
        'not included in the "nav" configuration:\n  - alone.md',
    ):
        assert part in said
    add("api.md", "\n::: halonet.gone\n")
    code, said = build(tmp_path / "site", cwd=tmp_path)
    assert code == 1
    assert "Could not collect 'halonet.gone'" in said

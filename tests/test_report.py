"""The report of a sweep, as text: complete, self-contained, and safe from what is in its files.

`tests/system/test_report_page.py` opens it in a browser.
"""

import html.parser
import itertools
import json
import re
import urllib.parse

import pytest
from etils import epath

from experiments import report, results
from experiments.aggregate import groups
from experiments.collect import collect
from experiments.table import read_table
from halonet.runtime import versions
from tests.small_sweep import CODE, scaling_sweep, write_member, write_sweep

EVIL = "<script>alert(1)</script>&{{command}}"


class Parsed(html.parser.HTMLParser):
    """What a page has: its elements with their attributes, and the text of each kind."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self._inside = [], {}, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "br"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag  # nothing is left open

    def handle_data(self, text):
        for tag in self._inside[-1:]:
            self.texts.setdefault(tag, []).append(text)

    def attributes(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def data(self):
        return json.loads(self.texts["script"][0])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "scale_smoke"
    scaling_sweep(folder, config="experiments/overhead.py:smoke")
    return Parsed(collect(folder)[1])


def test_the_headline_is_what_the_sweep_asks(page):
    asked = "What does it cost a run that nothing goes wrong with to survive what might?"
    assert page.texts["h1"] == [asked]
    assert page.texts["title"] == ["scale_smoke"]
    assert "scale_smoke · 8 members: 6 done, 1 failed, 1 queued" in page.texts["p"]
    assert page.texts["code"] == ["python -m experiments run scale_smoke"]
    assert report._paragraph("a `b < c` d") == "<p>a <code>b &lt; c</code> d</p>"
    # What is indented in the docstring stays so.
    assert page.texts["pre"][0].startswith("python -m experiments.overhead [--steps=1500]")


def test_nothing_is_asked_of_the_outside(page):
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    style, (_, script) = page.texts["style"], page.texts["script"]
    assert not re.findall(r"@import|url\(", "".join(style))
    # The name of SVG is one, and no address.
    assert re.findall(r"https?://[^\"]*", script) == ["http://www.w3.org/2000/svg"]


def test_the_policy_allows_this_script_and_style_alone(page):
    (policy,) = [it["content"] for it in page.attributes("meta") if "http-equiv" in it]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'{report._digest(page.texts['script'][1])}'"
    assert rules["style-src"] == f"'{report._digest(page.texts['style'][0])}'"
    assert "unsafe" not in policy


def test_members_lead_to_their_configurations(page):
    places = {it["id"] for it in page.attributes("details")}
    links = [it["href"] for it in page.attributes("a") if it["href"].startswith("#")]
    assert [urllib.parse.unquote(link[1:]) for link in links] == [
        f"config-h{n}_seed{seed}-{2 * n + seed:08x}" for n in range(4) for seed in (0, 1)
    ]
    assert places == {urllib.parse.unquote(link[1:]) for link in links}
    # The file beside the page, and its content for where the page is taken elsewhere.
    files = [it["href"] for it in page.attributes("a") if it.get("class") == "file"]
    assert files[0] == "h0_seed0-00000000/config.json"
    assert len(files) == 7  # one has not been started
    assert json.loads(page.texts["pre"][1])["data"]["batch_size"] == 64
    assert "It has not been started." in page.texts["p"]


def test_tables_sort_by_value_and_not_by_text(page):
    heads = [it["data-key"] for it in page.attributes("th") if "data-key" in it]
    members = heads[: heads.index("name", 1)]
    assert members[:4] == ["name", "state", "config.model.name", "config.seed"]
    assert "mfu" not in heads  # no member has one
    cells = [it["data-value"] for it in page.attributes("td")][: len(members) - 1]
    first = dict(zip(members[1:], cells, strict=True))
    assert float(first["top1"]) == pytest.approx(0.61)
    assert (first["parameters"], first["training_flops"]) == ("1000", str(6 * 50_000 * 64 * 4))
    assert {"61.00", "1.00k", "76.8M", "1.5", "75%"} <= set(page.texts["td"])


def test_it_says_what_the_members_were_made_with(page):
    pairs = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert pairs == {
        "devices": "8 cpu",
        "commit": CODE["code"],
        **versions(),
        "configuration": "experiments/overhead.py:smoke",
    }


def test_the_plots_have_what_the_members_measured(page):
    data = page.data()
    assert len(data["members"]) == 8
    first = data["members"][0]
    assert (first["name"], first["group"]) == ("h0_seed0", 0)
    assert first["curves"]["train/loss"] == [[step, 2 / step] for step in (1, 2, 3, 4)]
    scores = [0.61 - 0.3, 0.61 - 0.2, 0.62, 0.61]
    assert [y for _, y in first["curves"]["eval/top1"]] == pytest.approx(
        [100 * it for it in scores]
    )
    assert data["members"][7]["curves"] == {name: [] for name in report.CURVES}
    assert [group["finished"] for group in data["groups"]] == [2, 2, 2, 0]
    assert data["groups"][1]["top1"] == pytest.approx([0.8, 0.79, 0.81])
    assert data["groups"][3]["top1"] == [None, None, None]


def test_the_front_and_the_fit_are_those_of_the_means(page):
    costs = {it["name"]: it for it in page.data()["costs"]}
    assert [costs[name]["front"] for name in ("parameters", "multiply_adds")] == [[0, 1, 2]] * 2
    assert costs["images_per_second"]["front"] == [2, 1, 0]
    assert costs["images_per_second"]["fit"] is None
    for name in ("parameters", "multiply_adds", "training_flops"):
        fit = costs[name]["fit"]
        assert fit["groups"] == [0, 1, 2]
        assert fit["exponent"] == pytest.approx(-0.5)
        assert fit["residuals"] == pytest.approx([0, 0, 0], abs=1e-9)


def test_a_sweep_that_is_none_of_scale_has_no_fit(tmp_path):
    members = write_sweep(tmp_path / "it", [(f"b{n}", {"model.block_size": n}) for n in (2, 4, 8)])
    for number, member in enumerate(members):
        cost = {"parameters": 1000 + number, "multiply_adds": 50_000 * (2 + number)}
        write_member(tmp_path / "it", member, top1=0.9 + number / 100, **cost)
    page = Parsed(collect(tmp_path / "it")[1])
    assert [it["fit"] for it in page.data()["costs"]] == [None] * 4
    assert [it["front"] for it in page.data()["costs"]] == [[0, 1, 2]] * 3 + [[2]]
    assert "Seeds together" not in page.texts["h2"]


def test_a_model_without_a_mistake_is_no_point_of_the_fit(tmp_path):
    folder = tmp_path / "it"
    members = write_sweep(folder, [(f"h{n}", {"model.name": f"halonet_h{n}"}) for n in range(4)])
    for number, member in enumerate(members):
        top1 = 1.0 if number == 3 else 1 - 0.4 * 0.5**number
        write_member(folder, member, top1=top1, parameters=1000 * 4**number)
    costs = {it["name"]: it for it in Parsed(collect(folder)[1]).data()["costs"]}
    assert costs["parameters"]["fit"]["groups"] == [0, 1, 2]
    assert costs["parameters"]["front"] == [0, 1, 2, 3]


def test_what_comes_from_files_stays_text(tmp_path):
    members = write_sweep(
        tmp_path / "it", [(EVIL, {"model.name": EVIL}), ("b", {})], overrides={"data.name": EVIL}
    )
    members[0]["id"] = EVIL.replace("/", "_")
    saved = json.loads((tmp_path / "it" / "sweep.json").read_text())
    (tmp_path / "it" / "sweep.json").write_text(json.dumps({**saved, "members": members}))
    write_member(
        tmp_path / "it", members[0], top1=0.5, devices=EVIL, made_by=[{**CODE, "code": EVIL}]
    )
    write_member(tmp_path / "it", members[1], top1=0.25)
    page = Parsed(collect(tmp_path / "it", allow_mixed=True)[1])
    # Two scripts, the data and ours; the data is read, and what was meant is what is shown.
    assert len(page.attributes("script")) == 2
    assert page.data()["members"][0]["name"] == EVIL
    assert page.texts["summary"][0] == EVIL
    assert [text for text in page.texts["a"] if text == EVIL]
    assert [text for text in page.texts["td"] if text == EVIL]
    assert [text for text in page.texts["code"] if EVIL in text]
    assert [text for text in page.texts["li"] if text.startswith("Mixed: ") and EVIL in text]


def test_numbers_that_are_none_are_left_out_of_the_plots(tmp_path):
    members = write_sweep(tmp_path / "it", [("a", {})])
    workdir = write_member(tmp_path / "it", members[0], top1=0.5)
    rows = workdir / "metrics" / "000.jsonl"
    rows.write_text(rows.read_text() + '{"step": 3, "eval/loss": NaN}\n')
    page = Parsed(collect(tmp_path / "it")[1])
    assert page.data()["members"][0]["curves"]["eval/loss"][-1] == [3, None]


def test_long_curves_are_thinned_to_their_end():
    points = list(range(1, 1000))
    kept = report.thinned(points, most=100)
    assert len(kept) <= 100
    assert kept[-1] == 999
    assert {b - a for a, b in itertools.pairwise(kept)} == {10}
    assert report.thinned(points[:100], most=100) == points[:100]
    assert report.thinned([]) == []


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0.00"), (7, "7.00"), (999, "999"), (1234, "1.23k"), (103_850, "104k")),
        *((12_345_678, "12.3M"), (4.5e9, "4.50G"), (6e20, "600E"), (6e23, "600000E")),
    ],
)
def test_large_numbers_are_short(number, text):
    assert report.short(number) == text


def test_links_start_where_the_page_lies(tmp_path):
    members = write_sweep(tmp_path / "runs" / "it", [("a", {})])
    write_member(tmp_path / "runs" / "it", members[0], top1=0.5)
    page = Parsed(collect(tmp_path / "runs" / "it", out=tmp_path / "far")[1])
    (link,) = [it["href"] for it in page.attributes("a") if it.get("class") == "file"]
    assert link == "../runs/it/a-00000000/config.json"


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"devices": "1 gpu"}, "Trained on different devices"),
        ({"made_by": [{**CODE, "code": "a-dirty"}]}, "changes that were not committed"),
    ],
)
def test_what_spoils_a_comparison_is_told(tmp_path, capsys, values, note):
    members = write_sweep(tmp_path / "it", [("a", {}), ("b", {})])
    write_member(tmp_path / "it", members[0], top1=0.5)
    write_member(tmp_path / "it", members[1], top1=0.5, **values)
    page = Parsed(collect(tmp_path / "it", allow_mixed=True)[1])
    assert any(note in text for text in page.texts["li"])
    assert note in capsys.readouterr().out


# ---- docs/results.md


def test_the_results_in_the_docs_are_what_the_tables_give():
    tables = {path.stem: read_table(path) for path in sorted(results.TABLES.glob("*.csv"))}
    assert bool(tables) == results.PAGE.exists()
    if tables:
        assert results.PAGE.read_text() == results.render(tables)


@pytest.fixture
def into(monkeypatch, tmp_path):
    """The folder that stands for docs/."""
    root = epath.Path(tmp_path)
    for name, path in {"ROOT": root, "TABLES": root / "results", "PAGE": root / "x.md"}.items():
        monkeypatch.setattr(results, name, path)
    return tmp_path


def test_results_are_counted_over_the_seeds(into, capsys):
    folder = into / "scale_smoke"
    scaling_sweep(folder, config="experiments/overhead.py:smoke")
    assert results.main([str(folder)]) == 2
    assert "python -m experiments collect scale_smoke makes it" in capsys.readouterr().err
    collect(folder)
    assert results.main([str(folder)]) == 0
    text = (into / "x.md").read_text()
    assert "## scale_smoke\n\nWhat does it cost a run" in text
    assert "`python -m experiments run scale_smoke`" in text
    rows = [line for line in text.splitlines() if line.startswith("| h")]
    assert rows == [
        "| h2 | halonet_h2 | 90.00 | 89.00 to 91.00 | 2 | 0.2500 | 16.0k | 800k | 100 |",
        "| h1 | halonet_h1 | 80.00 | 79.00 to 81.00 | 2 | 0.2500 | 4.00k | 200k | 200 |",
        "| h0 | halonet_h0 | 60.00 | 59.00 to 61.00 | 2 | 0.2500 | 1.00k | 50.0k | 400 |",
        "| h3 | halonet_h3 | - | - | 0 | - | - | - | - |",
    ]
    assert (
        "Over these seeds no other's range reaches that of h2. 2 of its members have not finished "
        "and are left out. 1,000 held-out images: one is 0.1 points of top-1. Made with 4 steps, "
        f"8 cpu, commit {'a' * 12}, jax {CODE['jax']}." in text
    )
    # From the tables alone, which have all that it says.
    before = text
    assert results.main([]) == 0
    assert (into / "x.md").read_text() == before


@pytest.mark.parametrize(
    ("most", "told"), [(0.81, "ranges of b, \\| reach"), (0.79, "range of b reaches")]
)
def test_ranges_that_overlap_are_told(into, most, told):
    own = [
        (f"{name}-s{seed}", {"model.border": name, "seed": seed})
        for name in "abc|"
        for seed in (0, 1)
    ]
    members = write_sweep(into / "it", own)
    for member, top1 in zip(members, (0.8, 0.9, 0.79, 0.85, 0.7, 0.75, 0.6, most), strict=True):
        write_member(into / "it", member, top1=top1)
    collect(into / "it")
    assert results.main([str(into / "it")]) == 0
    text = (into / "x.md").read_text()
    assert f"Over these seeds the {told} that of a." in text
    # A bar in a value is none of the table's.
    (row,) = [line for line in text.splitlines() if line.startswith("| \\|")]
    assert len(re.split(r"(?<!\\)\|", row)) == 11


def test_single_seeds_are_given_no_range(into):
    members = write_sweep(into / "it", [("a", {}), ("b", {"seed": 1, "model.plan": "c/h"})])
    for member in members:
        write_member(into / "it", member, top1=0.5)
    rows = read_table(collect(into / "it")[0])
    text = results.render({"it": rows})
    assert "| b | c/h | 50.00 | - | 1 |" in text
    assert "Over these seeds" not in text
    assert len(groups(rows)) == 2


def test_without_tables_there_are_no_results(into, capsys):
    assert results.main([]) == 2
    assert capsys.readouterr().err.startswith("error: there is no table in ")

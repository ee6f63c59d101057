"""The report of a sweep in a browser: its plots, its sorting and its links, from the file alone."""

import urllib.parse

import pytest

from experiments import browser
from experiments.browser import BrowserError, Page
from experiments.collect import collect
from tests.small_sweep import scaling_sweep, write_member, write_sweep

pytestmark = [
    pytest.mark.middle,
    pytest.mark.skipif(not browser.find(), reason="no Chromium here"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The path of a report."""
    folder = tmp_path_factory.mktemp("runs") / "scale_smoke"
    scaling_sweep(folder)
    return collect(folder)[1]


@pytest.fixture(scope="module")
def opened(report):
    with Page(report) as page:
        yield page
        # Of all that the tests below did with it.
        assert page.complaints == []
        assert {it for it in page.requests if not it.startswith(report.as_uri())} <= {
            (report.parent / "h0_seed0-00000000" / "config.json").as_uri()
        }


@pytest.fixture
def page(opened):
    """The report, opened anew."""
    opened.point(1, 1)  # no chart is under the pointer
    opened.load()
    return opened


def count(page, selector):
    return page.evaluate(f"document.querySelectorAll({selector!r}).length")


def texts(page, selector):
    return page.evaluate(f"[...document.querySelectorAll({selector!r})].map(it => it.textContent)")


def column(page, number, table="members"):
    return texts(page, f"#{table} tbody tr > :nth-child({number})")


NAMES = [f"h{n}_seed{seed}" for n in range(4) for seed in (0, 1)]


def test_every_member_has_its_curves(page):
    assert texts(page, "#curves svg text.title") == [
        *("step", "training loss, nats"),
        *("step", "held-out loss, nats"),
        *("step", "held-out top-1, %"),
    ]
    lines = "[...document.querySelectorAll('#curves figure:nth-child(3) path.curve')]"
    # The last one was never started.
    assert page.evaluate(f"{lines}.map(it => it.ariaLabel)") == NAMES[:7]
    assert count(page, "#curves .charts path.curve") == 21
    # Each inside its drawing, from left to right, in the colour of its group.
    for number, (left, right, width) in enumerate(
        page.evaluate(
            f"{lines}.map(it => [it.getBBox().x, it.getBBox().x + it.getBBox().width, 460])"
        )
    ):
        assert 52 <= left < right <= width - 14
        assert page.evaluate(f"{lines}[{number}].classList.contains('c{number // 2}')")
    heights = page.evaluate(f"{lines}.map(it => it.getPointAtLength(it.getTotalLength()).y)")
    # A higher top-1 is higher up.
    assert heights[4] < heights[5] < heights[2] < heights[3] < heights[6] < heights[1]


def test_the_ticks_of_an_axis_differ(tmp_path):
    members = write_sweep(tmp_path / "it", [("a", {})])
    workdir = write_member(tmp_path / "it", members[0], top1=0.5)
    rows = workdir / "metrics" / "000.jsonl"
    lines = [f'{{"step": {step}, "eval/loss": {2.2920 + step / 1e5}}}' for step in range(1, 9)]
    rows.write_text('{"step": 0, "perf/started": 1.0}\n' + "\n".join(lines))
    with Page(collect(tmp_path / "it")[1]) as page:
        found = texts(page, "#curves figure:nth-child(1) text.y")
        assert len(set(found)) == len(found) >= 3


def test_a_name_hides_its_members(page):
    lines = "[...document.querySelectorAll('#curves .charts path.curve')]"
    shown = f"{lines}.filter(it => it.checkVisibility())"
    assert page.evaluate(f"{shown}.length") == 21
    page.click("#curves .legend button:nth-child(2)")
    assert page.evaluate(f"{shown}.length") == 15
    assert page.evaluate(f"{shown}.every(it => it.dataset.group != 1)")
    assert count(page, "#curves .legend [aria-pressed=false]") == 1
    page.click("#log-loss")  # drawn anew, and still hidden
    assert page.evaluate(f"{shown}.length") == 15
    page.click("#curves .legend button:nth-child(2)")
    assert page.evaluate(f"{shown}.length") == 21


def test_the_loss_can_be_logarithmic_and_the_end_looked_at(page):
    def ends():
        svg = "#curves figure:nth-child(1) "
        return texts(page, f"{svg}text.y"), texts(page, f"{svg}text.x")

    linear = ends()
    page.click("#log-loss")
    assert ends()[0] != linear[0]
    assert "1" in ends()[0]
    page.click("#late")
    assert float(ends()[1][0]) >= 1.5 > float(linear[1][0])


def test_the_pointer_is_told_whose_line_it_is(page):
    assert page.evaluate("document.getElementById('tip').hidden")
    x, y = page.middle("#curves figure:nth-child(3) circle[data-group='2']")
    page.point(x, y)
    assert page.evaluate("document.getElementById('tip').checkVisibility()")
    # Both seeds are near; the nearer one is named, with its step and value.
    assert page.evaluate("document.getElementById('tip').innerText").split("\n")[0] in NAMES[4:6]
    assert count(page, "#curves path.near") == 1
    page.point(5, 5)
    assert page.evaluate("document.getElementById('tip').hidden")
    assert count(page, "#curves .near") == 0


@pytest.mark.parametrize(
    ("cost", "front"), [("parameters", "0,1,2"), ("images_per_second", "2,1,0")]
)
def test_accuracy_is_drawn_against_the_cost_that_is_chosen(page, cost, front):
    page.click(f"#cost input[value={cost}]")
    assert page.evaluate("document.querySelector('#cost .front').dataset.front") == front
    titles = texts(page, "#cost text.title")
    assert titles[0].startswith(cost.split("_")[0])
    at = page.evaluate(
        "[...document.querySelectorAll('#cost circle')].map(it => [it.cx.baseVal.value, "
        "it.cy.baseVal.value])"
    )
    assert len(at) == 3
    (x0, y0), (x1, y1), (x2, y2) = at
    assert y0 > y1 > y2  # the larger is the better one
    assert (x0 < x1 < x2) == (cost == "parameters")
    assert texts(page, "#cost text.name") == ["h0", "h1", "h2"]
    labels = page.evaluate("[...document.querySelectorAll('#cost circle')].map(it => it.ariaLabel)")
    assert labels[0].startswith("h0, top-1 60.00 % (59.00 to 61.00, 2 seeds), ")
    assert labels[0].endswith(", on the Pareto front")


def test_the_fit_and_its_residuals_are_drawn_where_they_make_sense(page):
    (said,) = texts(page, "#fit .result")
    assert said.startswith("error ≈ 12.6 × (parameters)^(-0.500), the exponent ± 0.000")
    assert "from 3 points" in said
    assert texts(page, "#fit text.title")[1::2] == ["top-1 error, %", "error above the fit, %"]
    assert count(page, "#fit figure:nth-child(1) circle") == 3
    assert count(page, "#fit figure:nth-child(2) circle") == 3
    # The line goes through points that are on it.
    off = page.evaluate(
        "(() => { const path = document.querySelector('#fit .law'); const [a, b] = [0, "
        "path.getTotalLength()].map(it => path.getPointAtLength(it)); return "
        "[...document.querySelectorAll('#fit figure:nth-child(1) circle')].map(it => { const x = "
        "it.cx.baseVal.value; return Math.abs(a.y + (x - a.x) / (b.x - a.x) * (b.y - a.y) - "
        "it.cy.baseVal.value); }); })()"
    )
    assert max(off) < 0.5
    page.click("#cost input[value=images_per_second]")
    assert page.evaluate("document.getElementById('fit').hidden")


def test_tables_are_sorted_by_their_headings(page):
    assert column(page, 1) == NAMES
    page.click("#members th[data-key=top1] button")
    order = [NAMES[i] for i in (4, 5, 2, 3, 0, 6, 1)]
    assert column(page, 1) == [*order, "h3_seed1"]
    assert page.evaluate("document.querySelector('[data-key=top1]').ariaSort") == "descending"
    page.click("#members th[data-key=top1] button")
    assert column(page, 1) == [*order[::-1], "h3_seed1"]  # it has none, and stays the last
    assert column(page, 6)[0] == "59.00"
    page.click("#members th[data-key=parameters] button")
    # As text, 4.00k would come first.
    assert column(page, 9) == ["16.0k", "16.0k", "4.00k", "4.00k", "1.00k", "1.00k", "", ""]
    page.click("#groups th[data-key=name] button")
    page.click("#groups th[data-key=name] button")
    assert column(page, 1, "groups") == ["h3", "h2", "h1", "h0"]
    # The other table keeps its own order.
    assert column(page, 1)[0].startswith("h2")


def test_the_address_keeps_the_order(page):
    page.click("#members th[data-key=top1] button")
    kept = page.evaluate("location.hash")
    assert kept == "#sort=members,top1,descending"
    before = column(page, 1)
    assert before != NAMES
    page.load(kept)
    assert column(page, 1) == before
    assert count(page, "[aria-sort=descending]") == 1


def test_a_member_leads_to_its_configuration(page, report):
    assert count(page, "details[open]") == 0
    page.click("#members tbody tr:nth-child(4) a")
    page.until("document.querySelector('details[open]')")
    assert texts(page, "details[open] summary") == ["h1_seed1"]
    assert '"batch_size": 64' in texts(page, "details[open] pre")[0]
    page.load("#config-h0_seed0-00000000")
    assert texts(page, "details[open] summary") == ["h0_seed0"]
    page.click("details[open] a.file")
    there = (report.parent / "h0_seed0-00000000" / "config.json").as_uri()
    page.until(f"location.href == {there!r} && document.body.innerText.includes('seed')")
    assert '"seed": 0' in page.evaluate("document.body.innerText")


def test_names_that_are_markup_are_text(tmp_path):
    evil = "<img src=x onerror=document.title=1><script>document.title=2</script>"
    members = write_sweep(tmp_path / "it", [(evil, {"seed": 0}), (f"{evil}2", {"seed": 1})])
    for member in members:
        member["id"] = urllib.parse.quote(member["id"], safe="")
    write_member(tmp_path / "it", members[0], top1=0.5)
    write_member(tmp_path / "it", members[1], top1=0.75)
    (tmp_path / "it" / "sweep.json").write_text(
        browser.json.dumps({"sweep": "it", "config": "", "overrides": {}, "members": members})
    )
    with Page(collect(tmp_path / "it")[1]) as page:
        page.point(*page.middle("#cost circle"))
        assert evil in page.evaluate("document.getElementById('tip').textContent")
        assert page.evaluate("document.title") == "it"
        assert count(page, "img") == 0
        page.click("#members tbody tr:nth-child(2) a")
        page.until("document.querySelector('details[open]')")
        assert count(page, "details[open]") == 1
        assert page.complaints == []
        assert len(page.requests) == 1


@pytest.mark.parametrize("dark", [False, True])
def test_its_colours_are_those_that_the_reader_prefers(report, dark):
    with Page(report, dark=dark, width=400, height=600) as page:
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red = int(color.removeprefix("rgb(").split(",")[0])
        assert (red < 60) == dark
        # On a small screen nothing but tables is wider than the window.
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.picture().startswith(b"\x89PNG")


def test_what_a_page_should_not_do_is_noticed(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text('<img src="x.png"><script>console.error("no"); missing()</script>')
    with Page(path) as page:
        assert page.requests == [path.as_uri(), (tmp_path / "x.png").as_uri()]
        said = " ".join(page.complaints)
        assert "'no'" in said
        assert "missing is not defined" in said
        assert "ERR_FILE_NOT_FOUND" in said
        with pytest.raises(BrowserError, match="has no #none"):
            page.click("#none")
        with pytest.raises(BrowserError, match="ReferenceError"):
            page.evaluate("none()")


def test_the_command_takes_a_picture(report, tmp_path, capsys):
    assert browser.main([str(report), str(tmp_path / "it.png"), "--width=300", "--height=200"]) == 0
    png = (tmp_path / "it.png").read_bytes()
    assert [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)] == [300, 200]
    with pytest.raises(SystemExit, match="2"):
        browser.main([str(report)])
    assert browser.main([str(tmp_path / "none.html"), "it.png"]) == 2
    assert "there is no " in capsys.readouterr().err

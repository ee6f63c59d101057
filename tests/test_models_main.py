"""`python -m halonet.models`: the table, the card and its picture, and what it refuses."""

import io
import runpy
import sys

import pytest
from PIL import Image

from halonet import plots
from halonet.models import VARIANTS, card, create_model, list_models
from halonet.models.__main__ import main
from halonet.models.choices import CHOICES, PUBLISHED, TAGS, choices


def printed(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *arguments):
    """The line that an unanswerable command gets."""
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def test_list_is_a_table(capsys, monkeypatch):
    # Of two models: the README's test makes the whole table.
    two = {name: VARIANTS[name] for name in ("halonet50ts", "resnet50")}
    monkeypatch.setattr(card, "VARIANTS", two)
    assert printed(capsys, "list") == [
        "| model         |  image | block | halo | plan                | blocks per stage | "
        "parameters | published, M | multiply-adds, G | origin |",
        "| ------------- | -----: | ----: | ---: | ------------------- | ---------------- | "
        "---------: | -----------: | ---------------: | ------ |",
        "| `halonet50ts` | 256 px |     8 |    3 | `c/ccch/chchch/chc` | 3, 4, 6, 3       | "
        "22,733,280 |        22.73 |             5.27 | timm   |",
        "| `resnet50`    | 224 px |     - |    - | `c/c/c/c`           | 3, 4, 6, 3       | "
        "25,557,032 |            - |             4.09 | ours   |",
    ]


def test_the_card(capsys):
    lines = printed(capsys, "show", "halonet_tiny")
    assert lines[0] == "halonet_tiny (ours), one image of 32 x 32 px"
    rows = [line.split() for line in lines[3:9]]
    assert rows[0][:7] == ["blocks", "map", "block", "halo", "heads", "channels", "parameters"]
    assert rows[0][7:] == ["projections", "content", "position", "value", "total"]
    assert rows[1] == ["stem", "16", "x", "16", *"---", "32", "928", "0.2", *"---", "0.2"]
    assert rows[2][:10] == ["stage1", "1", "h", "16", "x", "16", "4", "1", "2", "64"]
    assert rows[3][:10] == ["stage2", "3", "h", "8", "x", "8", "4", "1", "4", "128"]
    assert rows[5][:2] == ["total", "231,560"]
    assert sum(float(row[-1]) for row in rows[1:5]) == pytest.approx(12.5, abs=0.11)
    assert any(line.startswith("ours     everything    sized for images") for line in lines)
    assert lines[-1].startswith("picture of blocks and halos: --picture=halonet_tiny.png")


def test_the_card_of_another_size(capsys):
    lines = printed(capsys, "show", "halonet_tiny", "--image_size=30x20", "--pad_to_blocks")
    assert lines[0] == "halonet_tiny (ours), one image of 30 x 20 px"
    assert any(line.startswith("stage2") and "8 x 5" in line for line in lines)
    assert any("each attention pads its map to whole blocks" in line for line in lines)


def test_totals_stand_beside_the_published_ones(capsys):
    lines = printed(capsys, "show", "halonet26t")
    start = lines.index("                     here  published, at 256 px")
    assert lines[start + 1 : start + 4] == [
        "parameters     12,480,288  12.48 M [V]",
        "multiply-adds      3.17 G  3.19 G [V]",
        "top-1                   -  79.134 % [V]",
    ]


def test_published_layers_are_those_of_the_depths():
    for name, published in PUBLISHED.items():
        if published.layers:
            layers = 3 * sum(create_model(name).depths) + 2
            assert published.layers == f"{layers} [M-high]"


@pytest.mark.parametrize("name", list_models())
def test_choices_are_lines_with_a_known_tag(name):
    rows = choices(name, create_model(name))
    assert len(rows) > 2
    for tag, subject, text in rows:
        known = tag in TAGS or tag in ("[V×3]", "[M-high]", "[M-med]")
        assert known, tag
        assert "{" not in text
        assert len(f"[M-med]  {subject:12}  {text}") <= 100


def test_what_the_notes_call_ours_is_called_ours():
    ours = {
        name: {subject for tag, subject, _ in choices(name, create_model(name)) if tag == "ours"}
        for name in VARIANTS
    }
    common = {"heads", "tables", "scale", "border", "shortcut", "activation"}
    assert ours["halonet_h0"] == common
    assert ours["halonet_h4"] == common | {"last 1x1"}
    assert ours["halonet_h7"] == common | {"last 1x1", "padding"}
    assert ours["halonet_h7_conv12"] == common | {"last 1x1", "padding", "convolutions"}
    assert ours["halonet_h4_wide"] == common | {"last 1x1", "r_b", "widths"}
    assert ours["halonet50ts"] == {"start"}
    assert ours["halonet_50t"] == {"start", "top-1"}


def test_blocks_and_halos_of_the_papers_models_have_a_line():
    models = [name for name in VARIANTS if name.startswith("halonet_h")]
    assert len(models) == 13
    for name in models:
        model = create_model(name)
        (text,) = [row[2] for row in choices(name, model) if row[:2] == ("[V×3]", "b and h")]
        assert text.startswith(f"{model.block_size} and {model.halo_size};")


def test_every_group_of_choices_belongs_to_a_model():
    said = {text for name in VARIANTS for _, _, text in choices(name, create_model(name))}
    for group, rows in CHOICES.items():
        # Up to the first field that is filled in.
        assert all(any(text.split("{")[0] in line for line in said) for _, _, text in rows), group


def test_the_picture_is_written(capsys, tmp_path):
    path = str(tmp_path / "card.png")
    lines = printed(capsys, "show", "halonet_tiny", f"--picture={path}")
    assert lines[-1] == f"picture of stage 1, query 5,5: {path}"
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "maps", "options"),
    [
        # The first block subsamples its queries from the map before.
        (
            ("halonet_tiny", "--stage=2", "--query=7,0"),
            [((8, 8), 1, (7, 0)), ((16, 16), 2, (7, 0))],
            {"block": 4, "halo": 1},
        ),
        (
            ("halonet_h7", "--stage=4", "--query=18,18"),
            [((19, 19), 1, (18, 18)), ((38, 38), 2, (18, 18))],
            {"block": 10, "halo": 3},
        ),
        # The first stage with halos, whose first block is a convolution.
        (("halonet26t",), [((16, 16), 1, (5, 5))], {"block": 8, "halo": 2}),
        # All queries of the first block attend, on the map before, and are pooled.
        (("haloregnetz_b", "--stage=4"), [((7, 7), 1, (2, 2))], {"block": 7, "halo": 2}),
    ],
    ids=["subsampled", "padded", "convolution first", "pooled"],
)
def test_the_picture_shows_the_maps_of_a_stage(arguments, maps, options, monkeypatch):
    drawn = {}

    def halo_picture(layers, path, **kwargs):
        drawn.update(layers=layers, path=path, **kwargs)

    monkeypatch.setattr(plots, "halo_picture", halo_picture)
    monkeypatch.setattr("halonet.models.__main__.model_card", lambda *_: "")
    assert main(("show", *arguments, "--picture=x.png")) == 0
    assert [(pixels.shape[:2], *rest) for pixels, *rest in drawn["layers"]] == maps
    assert {key: drawn[key] for key in options} == options
    assert (drawn["path"], drawn["border"]) == ("x.png", "zeros")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: python -m halonet.models [-h] {list,show} ..."),
        (("lst",), "error: argument {list,show}: invalid choice: 'lst'"),
        (("show",), "error: the following arguments are required: name"),
        (("show", "halonet_h9"), "error: unknown model 'halonet_h9'; did you mean 'halonet_h"),
        (("show", "halonet_h4", "--image_size=big"), "error: argument --image_size: 'big' is not"),
        (("show", "halonet_h4", "--image=384"), "error: unrecognized arguments: --image=384"),
        (
            ("show", "halonet_h4", "--image_size=400"),
            "error: image height 400 cannot be cut into blocks of 12",
        ),
        (
            ("show", "halo2botnet50ts_256", "--image_size=512"),
            "error: image size 512x512 does not fit the tables of global attention",
        ),
        (("show", "halonet_h4", "--stage=2"), "error: --stage and --query are of the picture"),
        (
            ("show", "halonet50ts", "--stage=1", "--picture=x.png"),
            "error: stage 1 of halonet50ts has no halo attention; these do: 2, 3, 4",
        ),
        (
            ("show", "halonet_h4", "--stage=0", "--picture=x.png"),
            "error: stage 0 of halonet_h4 has no halo attention; these do: 1, 2, 3, 4",
        ),
        (
            ("show", "halonet_h4", "--picture=x.xyz"),
            "error: argument --picture: 'x.xyz' does not end in .png",
        ),
        (("show", "halonet_h4", "--picture="), "error: argument --picture: '' does not end in"),
        (("show", "resnet50", "--picture=x.png"), "error: resnet50 has no halo attention to draw"),
        (
            ("show", "halonet_h4", "--query=96,0", "--picture=x.png"),
            "error: query 96,0 is not in the map of stage 1, 96 x 96",
        ),
        (
            ("show", "halonet_h4", "--query=1", "--picture=x.png"),
            "error: argument --query: '1' is not a pixel",
        ),
        (
            ("show", "halonet_tiny", "--picture=/no/such/folder/x.png"),
            "error: [Errno 2] No such file or directory: '/no/such/folder/x.png'",
        ),
    ],
)
def test_refusals_are_one_line(arguments, message, capsys):
    assert refused(capsys, *arguments).startswith(message)


def test_what_cannot_be_printed_is_not_called_a_refusal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with pytest.raises(UnicodeEncodeError):
        main(("show", "halonet_tiny"))


def test_the_module_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["halonet.models", "show", "vgg"])
    monkeypatch.delitem(sys.modules, "halonet.models.__main__")
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("halonet.models", run_name="__main__")
    assert exit.value.code == 2
    assert "unknown model 'vgg'" in capsys.readouterr().err

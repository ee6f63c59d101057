"""A sweep's members as one table: what stands in it, what is refused, and what it says."""

import json
import math

import pytest
from etils import epath

from experiments import aggregate, table
from experiments.collect import collect
from experiments.sweeps import SweepError
from experiments.table import CollectError, read_sweep, read_table
from halonet.runtime import versions
from tests.small_sweep import CODE, scaling_sweep, write_member, write_sweep


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """(folder, rows as they are read back) of `scaling_sweep`."""
    folder = tmp_path_factory.mktemp("runs") / "scale_smoke"
    scaling_sweep(folder, overrides={"train.steps": 4, "optim.name": "adamw"})
    csv, html = collect(folder)
    assert (csv.name, html.name) == ("scale_smoke.csv", "scale_smoke.html")
    return folder, read_table(csv)


def test_every_member_is_a_row(collected):
    rows = collected[1]
    assert [row["name"] for row in rows] == [
        f"h{n}_seed{seed}" for n in range(4) for seed in (0, 1)
    ]
    assert [row["state"] for row in rows] == ["done"] * 6 + ["failed", "queued"]
    assert [row["config.model.name"] for row in rows][::2] == [f"halonet_h{n}" for n in range(4)]
    assert [row["config.seed"] for row in rows] == ["0", "1"] * 4


def test_a_finished_member_has_every_value(collected):
    row = dict(collected[1][2])
    assert row.pop("top1") == pytest.approx(0.81)
    assert row.pop("best_top1") == pytest.approx(0.82)
    assert row == {
        "name": "h1_seed0",
        "id": "h1_seed0-00000002",
        "state": "done",
        "config.model.name": "halonet_h1",
        "config.seed": "0",
        "step": 4,
        "loss": 0.25,
        "best_step": 3,
        "examples": 1000,
        "parameters": 4000,
        "multiply_adds": 200_000,
        "training_flops": 6 * 200_000 * 64 * 4,
        "images_per_second": 200,
        "mfu": None,
        "goodput": 0.75,
        "seconds": 90,
        "starts": 1,
        "devices": "8 cpu",
        "commit": "a" * 40,
        **versions(),
        "config": "experiments/none.py",
        "command": (
            "python -m experiments run scale_smoke --config.train.steps=4 --config.optim.name=adamw"
        ),
    }


def test_unfinished_members_have_what_is_known(collected):
    failed, waiting = collected[1][6:]
    assert (failed["step"], failed["best_step"], failed["top1"]) == (3, 2, pytest.approx(0.6))
    assert failed["best_top1"] == pytest.approx(0.61)
    assert failed["parameters"] is failed["training_flops"] is failed["goodput"] is None
    known = {"name", "id", "state", "config.model.name", "config.seed", "config", "command"}
    assert {name for name, value in waiting.items() if value is not None} == known


def test_the_states_are_those_of_the_runs(tmp_path):
    names = ("done", "failed", "going", "fresh", "stopped")
    members = write_sweep(tmp_path / "it", [(name, {}) for name in names])
    write_member(tmp_path / "it", members[0], top1=0.5)
    for member in (members[2], *members[4:]):
        write_member(tmp_path / "it", member)
    # A run that failed before its first row, one with a heartbeat, one that was told to stop.
    (tmp_path / "it" / f"{members[1]['id']}.json").write_text('{"exit_code": 2}')
    (tmp_path / "it" / members[2]["id"] / "lock.json").write_text('{"heartbeat": 1e12}')
    (tmp_path / "it" / f"{members[4]['id']}.json").write_text('{"exit_code": 75}')
    states = [member.state for member in read_sweep(tmp_path / "it").members]
    assert states == ["done", "failed", "running", "queued", "preempted"]


def test_an_override_of_some_is_the_configuration_of_others(tmp_path):
    own = [("a", {"data.batch_size": 32, "model.plan": "c/h"}), ("b", {}), ("waits", {})]
    members = write_sweep(tmp_path / "it", own)
    write_member(tmp_path / "it", members[0], top1=0.5, batch=32)
    write_member(tmp_path / "it", members[1], top1=0.5)
    rows = table.table(read_sweep(tmp_path / "it"))
    assert [row["config.data.batch_size"] for row in rows] == ["32", "64", None]
    # No configuration is there to say it.
    assert [row["config.model.plan"] for row in rows] == ["c/h", None, None]


def test_texts_come_back_from_the_file_as_they_were(tmp_path):
    own = [('a,"b"\n<c>', {"data.mean": [0.5, 0.25, 0.125], "model.pad_to_blocks": True})]
    members = write_sweep(tmp_path / "it", own)
    members[0]["id"] = "x"
    sweep = {"sweep": "it", "config": "", "overrides": {}, "members": members}
    (tmp_path / "it" / "sweep.json").write_text(json.dumps(sweep))
    write_member(tmp_path / "it", members[0], top1=1 / 3)
    rows = table.table(read_sweep(tmp_path / "it"))
    table.write_table(rows, epath.Path(tmp_path) / "it.csv")
    assert rows[0]["config.data.mean"] == "(0.5, 0.25, 0.125)"
    assert rows[0]["config.model.pad_to_blocks"] == "True"
    empty = {name: None for name, value in rows[0].items() if value == ""}
    assert read_table(tmp_path / "it.csv") == [rows[0] | empty]


@pytest.mark.parametrize(
    ("other", "described"),
    [
        ({**CODE, "code": "b" * 40}, ("code " + "a" * 40, "code " + "b" * 40)),
        ({**CODE, "jax": "0.0.1"}, (f"jax {CODE['jax']}", "jax 0.0.1")),
        ({}, (f"code {'a' * 40}, ", "not recorded")),
    ],
    ids=["commit", "jax", "older"],
)
def test_versions_are_not_mixed_silently(tmp_path, capsys, other, described):
    folder = tmp_path / "it"
    members = write_sweep(folder, [("one", {"seed": 0}), ("two", {"seed": 1}), ("waits", {})])
    write_member(folder, members[0], top1=0.5)
    write_member(folder, members[1], top1=0.5, made_by=[other])
    with pytest.raises(CollectError, match="2 versions of the code") as info:
        collect(folder)
    line, first, second = str(info.value).splitlines()
    assert "--allow_mixed" in line
    assert first.startswith(f"  {described[0]}")
    assert first.endswith(": one")
    assert second == f"  {described[1]}: two"
    assert not (folder / "it.csv").exists()

    csv, html = collect(folder, allow_mixed=True)
    assert "Mixed: 2 versions of the code" in capsys.readouterr().out
    assert "Mixed: 2 versions of the code" in html.read_text()
    assert len(read_table(csv)) == 3


def test_a_member_that_two_versions_trained_is_mixed(tmp_path):
    folder, new = tmp_path / "it", {**CODE, "code": "b" * 40}
    members = write_sweep(folder, [("one", {}), ("two", {})])
    write_member(folder, members[0], top1=0.5, made_by=[new])
    write_member(folder, members[1], top1=0.5, made_by=[CODE, new])
    with pytest.raises(CollectError, match=r"code a+: two\n  code b+: one, two$|one, two\n.*: two"):
        collect(folder)
    csv, _ = collect(folder, allow_mixed=True)
    assert [row["commit"] for row in read_table(csv)] == [
        "b" * 40,
        f"{'a' * 40} then {'b' * 40}",
    ]


def test_members_that_have_not_finished_mix_nothing(tmp_path):
    folder = tmp_path / "it"
    members = write_sweep(folder, [("one", {}), ("two", {})])
    write_member(folder, members[0], top1=0.5)
    write_member(folder, members[1])
    collect(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "it holds no sweep: there is no sweep.json in it"),
        ("{", "it holds no sweep: there is no sweep.json in it"),
        ('{"sweep": "it", "config": "", "overrides": {}}', "is damaged: KeyError: 'members'"),
        (
            '{"sweep": "it", "config": "", "overrides": {}, "members": [{"name": "a"}]}',
            "is damaged: TypeError",
        ),
        (
            '{"sweep": "it", "config": "", "overrides": {}, "members": []}',
            "none of the 0 members in .*it has finished; python -m experiments run it goes on",
        ),
    ],
    ids=["no folder", "cut short", "no members", "half a member", "nothing"],
)
def test_what_is_no_sweep_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "it").mkdir()
        (tmp_path / "it" / "sweep.json").write_text(text)
    with pytest.raises(SweepError, match=message) as info:
        collect(tmp_path / "it")
    assert info.value.exit_code == 2
    assert "\n" not in str(info.value)


def test_without_a_finished_member_there_is_nothing_to_join(tmp_path):
    members = write_sweep(tmp_path / "it", [("one", {}), ("two", {})])
    write_member(tmp_path / "it", members[0])
    with pytest.raises(CollectError, match="none of the 2 members in .* has finished"):
        collect(tmp_path / "it")


def test_it_prints_the_best_first_and_where_the_files_are(tmp_path, capsys):
    scaling_sweep(tmp_path / "it")
    collect(tmp_path / "it", out=tmp_path / "far" / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        *("member", "state", "top-1,", "%", "best", "top-1,", "%", "parameters"),
        *("multiply-adds", "images/s", "minutes"),
    ]
    names = [line.split()[0] for line in lines[1:9]]
    assert names[:2] == ["h2_seed0", "h2_seed1"]
    assert names[-1] == "h3_seed1"
    assert lines[1].split()[1:] == ["done", "91.00", "92.00", "16.0k", "800k", "100", "1.5"]
    assert lines[-1] == f"written to {tmp_path}/far/out/it.csv and {tmp_path}/far/out/it.html"
    assert (tmp_path / "far" / "out" / "it.html").stat().st_size > 10_000


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    scaling_sweep(tmp_path / "it")
    (tmp_path / "file").write_text("")
    with pytest.raises(CollectError, match="file cannot be written: "):
        collect(tmp_path / "it", out=tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("top1,", "top2,", 1), "it has no column top1"),
        (lambda text: text.replace("200.0,", "fast,"), "could not convert string to float: 'fast'"),
        (lambda text: text + "one,more\n", "shorter than argument 1"),
        (lambda text: text + '"open', "unexpected end of data"),
        (lambda text: "", "not enough values"),
    ],
    ids=["column", "number", "line", "quote", "empty"],
)
def test_a_file_that_is_no_table_is_refused(collected, tmp_path, change, message):
    text = (collected[0] / "scale_smoke.csv").read_text()
    (tmp_path / "it.csv").write_text(change(text))
    with pytest.raises(CollectError, match=f"it.csv is no table of a sweep: .*{message}"):
        read_table(tmp_path / "it.csv")


def row_of(name, state="done", **values):
    return {"name": name, "state": state, **values}


def test_seeds_are_joined_where_nothing_else_differs(collected):
    its_groups = aggregate.groups(collected[1])
    assert [group.name for group in its_groups] == ["h0", "h1", "h2", "h3"]
    assert [group.settings for group in its_groups][1] == {"model.name": "halonet_h1"}
    assert [len(group.finished) for group in its_groups] == [2, 2, 2, 0]
    assert [len(group.members) for group in its_groups] == [2, 2, 2, 2]
    assert its_groups[0].values("top1") == pytest.approx([0.61, 0.59])
    assert its_groups[0].mean("top1") == pytest.approx(0.6)
    assert its_groups[3].mean("top1") is None


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (("b4h1-s0", "b4h1-s1"), "b4h1"),
        (("b4h1s0", "b4h1s1"), "b4h1"),
        (("zeros_seed10", "zeros_seed11"), "zeros"),
        (("masks0", "masks1"), "masks"),
        (("conv.0", "conv.1"), "conv"),
        (("0", "1"), "0"),
    ],
)
def test_a_group_has_the_name_that_its_members_share(names, name):
    rows = [row_of(it, **{"config.seed": str(seed)}) for seed, it in enumerate(names)]
    (group,) = aggregate.groups(rows)
    assert group.name == name
    assert group.settings == {}


def test_groups_of_one_name_keep_their_members():
    rows = [
        row_of(f"it_seed{seed}_{size}", **{"config.seed": str(seed), "config.size": size})
        for size in "ab"
        for seed in (0, 1)
    ]
    names = [group.name for group in aggregate.groups(rows)]
    assert names == ["it_seed0_a", "it_seed0_b"]


def test_the_front_is_what_nothing_beats():
    points = [(1, 0.5), (2, 0.7), (3, 0.6), (2, 0.65), (5, 0.9), (4, 0.7), (9, 0.9)]
    assert aggregate.front(points) == [0, 1, 4]
    for i, (cost, value) in enumerate(points):
        beaten = any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points)
        assert (i in aggregate.front(points)) == (not beaten)
    faster = [(-cost, value) for cost, value in points]
    assert aggregate.front(faster, more_is_better=True) == [4, 1, 0]
    assert aggregate.front([]) == []


def test_an_exact_power_law_is_found():
    costs = [1e6, 3e6, 2e7, 5e8]
    found = aggregate.power_law(costs, [5 * cost**-0.25 for cost in costs])
    assert found.exponent == pytest.approx(-0.25)
    assert found.factor == pytest.approx(5)
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    assert found.residuals == pytest.approx([0] * 4, abs=1e-9)
    assert found.r_squared == pytest.approx(1)


def test_the_error_of_the_exponent_is_that_of_least_squares():
    """By hand: x = -1, 0, 1 and y = 0, 1, 0 in logarithms have slope 0 and residuals -1/3, 2/3."""
    found = aggregate.power_law([math.exp(-1), 1.0, math.exp(1)], [1.0, math.e, 1.0])
    assert found.exponent == pytest.approx(0, abs=1e-12)
    assert found.factor == pytest.approx(math.exp(1 / 3))
    assert found.residuals == pytest.approx([-1 / 3, 2 / 3, -1 / 3])
    # s^2 = (6/9) / (3 - 2), Sxx = 2
    assert found.standard_error == pytest.approx(math.sqrt(6 / 9 / 2))
    assert found.r_squared == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("costs", [[1, 8], [1, 1, 8, 8], [1.0, 2.0, 3.9]])
def test_too_few_costs_or_too_close_ones_give_no_law(costs):
    assert aggregate.power_law(costs, [0.5] * len(costs)) is None


def test_what_a_sweep_asks_is_read_from_its_file():
    asked, rest = table.question("experiments/overhead.py:smoke")
    assert asked == "What does it cost a run that nothing goes wrong with to survive what might?"
    assert "\n" not in asked
    assert rest
    assert table.question("experiments/none.py") == ("", "")
    assert table.question("") == ("", "")

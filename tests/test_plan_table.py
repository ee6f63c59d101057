"""The command that plans H0 to H7: it goes on where it stopped."""

import json

import pytest
from absl.testing import flagsaver
from etils import epath

from experiments import plan_table

FOUND = {
    "model": "halonet_h0",
    "topology": {"name": "v4:4x4x8"},
    "fits": True,
    "images_per_device": {"wanted": 32, "compiled": 32},
    "memory": {"total": 3 * 2**30, "limit": 30.75 * 2**30},
    "largest_batch": {"images_per_device": 288},
    "seconds": {"estimate": 0.0512},
    "images_per_second": {"estimate": 80_000.0},
    "mfu": {"estimate": 0.123},
    "collectives": {"all-reduce": {"bytes": 22e6}},
    "schedule": {"days": {"estimate": 0.5}},
    "input": {"cores": 270.0},
    "versions": {"jax": "0.10.2", "libtpu": "0.0.42.1"},
    "plan_seconds": 300.2,
}


@pytest.fixture(scope="module", autouse=True)
def defined():
    plan_table.define_flags()
    yield
    for name in ("match", "limit"):
        delattr(plan_table.FLAGS, name)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command with a planner that only takes notes."""
    planned = []

    def plan(config, *, topology):
        planned.append((config.model.name, topology, config.data.batch_size, config.model.bn_group))
        return FOUND | {"model": config.model.name, "topology": {"name": topology}}

    monkeypatch.setattr(plan_table, "plan", plan)
    monkeypatch.setattr(plan_table, "step_program", lambda config, _: repr(config))
    monkeypatch.setattr(plan_table, "RECORD", epath.Path(tmp_path) / "plans.json")
    monkeypatch.setattr(plan_table, "TABLE", epath.Path(tmp_path) / "plans.md")
    monkeypatch.setattr(plan_table.importlib.metadata, "version", lambda name: "0")
    monkeypatch.setattr(plan_table, "code_hash", lambda paths: len(list(paths)))

    def command(**values):
        planned.clear()
        with flagsaver.flagsaver(**values):
            plan_table.FLAGS.mark_as_parsed()
            plan_table.main([""])
        return list(planned)

    return command


def test_it_goes_on_where_it_stopped(run, capsys):
    assert run(limit=1) == [("halonet_h0", "v5e:16x16", 4096, 16)]
    assert run(match="v4:4x4x8", limit=1) == [("halonet_h0", "v4:4x4x8", 4096, 32)]
    capsys.readouterr()
    rest = run()
    assert len(rest) == 14
    assert ("halonet_h0", "v4:4x4x8", 4096, 32) not in rest
    assert list(json.loads(plan_table.RECORD.read_text()))[:2] == [
        "halonet_h0 on v5e:16x16",
        "halonet_h0 on v4:4x4x8",
    ]
    assert plan_table.TABLE.read_text() == capsys.readouterr().out
    assert run() == []


def test_what_a_plan_depends_on_makes_it_anew(run, monkeypatch):
    assert len(run(match="halonet_h1")) == 2
    monkeypatch.setattr(plan_table, "BATCH", 8192)
    assert [batch for _, _, batch, _ in run(match="halonet_h1")] == [8192, 8192]
    monkeypatch.setattr(plan_table, "code_hash", lambda paths: "another")
    assert len(run(match="halonet_h1")) == 2
    assert run(match="halonet_h1") == []


def test_the_code_that_a_plan_depends_on_is_there():
    for name in plan_table.SOURCES:
        assert list((plan_table.ROOT / "halonet").glob(f"{name}.py")), name


def test_rows_say_what_fits():
    record = {"halonet_h0 on v4:4x4x8": {"plan": FOUND}}
    text = plan_table.render(record)
    assert (
        "| `halonet_h0` | v4:4x4x8 | yes | 3.0 of 30.75 | 288 | 51 | 80,000 | 12.3 % | 22 | 0.50 "
        "| 270 | 300 s |" in text
    )
    assert "Not planned yet: halonet_h0 on v5e:16x16, halonet_h1 on v5e:16x16" in text
    large = FOUND | {"fits": False, "images_per_device": {"wanted": 32, "compiled": 8}}
    assert "| no; 8 of 32 do |" in plan_table.render({"it": {"plan": large}})


def test_the_record_and_the_table_are_the_same():
    """The table in docs/ is what the command makes of the record beside it."""
    record = json.loads(plan_table.RECORD.read_text())
    assert plan_table.TABLE.read_text() == plan_table.render(record)

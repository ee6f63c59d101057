"""Everything runs where the workdir is not a folder of this machine."""

import json

import pytest
from etils import epath

import halonet
from halonet import checkpoint, evaluate
from halonet.runtime import Interrupted
from halonet.train import train_and_evaluate
from tests.small_run import small_config
from tests.test_train import send_signal_at

pytest_plugins = ["tests.mock_gcs"]
WORKDIR = "gs://bucket/runs/one"


@pytest.mark.middle
@pytest.mark.timeout(900)
def test_train_resume_evaluate_and_load_on_an_object_store(mock_gcs_events, monkeypatch):
    config = small_config(**{"train.steps": 6, "eval.every_steps": 3, "checkpoint.every_steps": 2})
    with monkeypatch.context() as patch:
        send_signal_at(2, patch)
        with pytest.raises(Interrupted):
            train_and_evaluate(config, WORKDIR)
    summary = train_and_evaluate(config, WORKDIR)
    workdir = epath.Path(WORKDIR)
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert [path.name for path in sorted((workdir / "metrics").iterdir())] == [
        "000.jsonl",
        "001.jsonl",
    ]
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint.saved_steps(WORKDIR)[-1] == 6
    assert evaluate.evaluate_checkpoint(config, WORKDIR, step="latest")["count"] == 1000
    assert halonet.load_run(WORKDIR, step="latest").step == 6
    assert not mock_gcs_events.bypassed

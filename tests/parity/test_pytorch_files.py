"""Files that PyTorch writes are read, and what could run in one is not."""

import argparse
import zipfile

import pytest
import torch

from halonet.models.convert import readers
from tests.test_convert import pickle_that_touches, refusal


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model", "state_dict", "model_ema", "state_dict_ema"], "state_dict_ema"),
        (["model", "state_dict", "model_ema"], "model_ema"),
        (["model", "state_dict"], "state_dict"),
        (["model"], "model"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_checkpoints_of_timms_training(tmp_path, names, taken, prefix):
    checkpoint = {name: {prefix + "w": torch.tensor([float(len(name))])} for name in names}
    checkpoint |= {"epoch": 3, "arch": "halonet26t", "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, tmp_path / "last.pth")
    arrays = readers.read_weights(tmp_path / "last.pth")
    assert {key: array.tolist() for key, array in arrays.items()} == {"w": [len(taken)]}


def test_pytorch_files_are_read_and_their_code_is_not(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    state["n"] = torch.tensor(3)
    torch.save(state, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "nested.bin")
    for name in ("zip.pth", "legacy.pt", "nested.bin"):
        arrays = readers.read_weights(tmp_path / name)
        assert {key: array.tolist() for key, array in arrays.items()} == {
            key: tensor.tolist() for key, tensor in state.items()
        }

    cut = (tmp_path / "zip.pth").read_bytes()[:-100]
    (tmp_path / "cut.pth").write_bytes(cut)
    marker = tmp_path / "marker"
    (tmp_path / "evil.pth").write_bytes(pickle_that_touches(marker))
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle_that_touches(marker))
        archive.writestr("archive/version", "3\n")
    for name in ("cut.pth", "evil.pth", "archive.pth"):
        assert "it is damaged, or holds more than arrays" in refusal(tmp_path / name)
    assert not marker.exists()
    torch.save({"a": 3}, tmp_path / "number.pth")
    assert refusal(tmp_path / "number.pth").endswith("a is a int, not a tensor")

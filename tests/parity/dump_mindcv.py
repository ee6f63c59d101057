"""What MindSpore and MindCV have to say, for tests that run without them. Run by `make parity`.

    PYTHONPATH=tests .venv-mindcv/bin/python tests/parity/dump_mindcv.py FOLDER

Writes to tests/golden: the names and shapes of halonet_50t's parameters, and a checkpoint of a tiny
network as MindSpore saves it, with its values; to FOLDER: a checkpoint of halonet_50t with random
weights, and its logits.

MindSpore has no window extraction for CPU, and MindCV 0.3.0 calls `ops.pad` as MindSpore 1 had it;
both are put in place here. The windows lie as MindCV's comments say, (channel, row, column). On a
GPU MindSpore puts channels last, by its documentation; MindCV's reshape then mixes pixels and
channels, which is no halo attention and not imitated.
"""

import json
import os
import pathlib
import sys
import types

import mindcv
import mindcv.models.halonet
import mindspore as ms
import numpy as np
from mindspore import nn, ops
from random_arrays import random_arrays, uniform

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


class Unfold(nn.Cell):
    """(N, C, H, W) to (N, C * size * size, rows, columns) by plain slices."""

    def __init__(self, ksizes, strides, rates, padding):
        super().__init__()
        assert padding == "valid"
        assert set(rates) == {1}
        self.size, self.stride = ksizes[1], strides[1]

    def construct(self, x):
        n, channels, height, width = x.shape
        rows, columns = ((side - self.size) // self.stride + 1 for side in (height, width))
        planes = [
            x[:, :, i :: self.stride, j :: self.stride][:, :, :rows, :columns]
            for i in range(self.size)
            for j in range(self.size)
        ]
        return ops.stack(planes, 2).reshape(n, channels * self.size**2, rows, columns)


def pad(x, paddings):
    """`ops.pad` of MindSpore 1: a pair of widths for each axis, the first axis first."""
    return ops.pad(x, tuple(int(width) for pair in reversed(paddings) for width in pair))


class Tiny(nn.Cell):
    """One array of each kind that a checkpoint of a network may hold."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        for dtype in ("float16", "float32", "float64", "bfloat16", "int32", "int64"):
            values = ms.Tensor(uniform(dtype, (2, 3), -9, 9)).astype(getattr(ms, dtype))
            setattr(self, dtype, ms.Parameter(values, name=dtype, requires_grad=False))


def save(network, path, **options):
    path.unlink(missing_ok=True)
    ms.save_checkpoint(network, str(path), **options)
    path.chmod(0o644)  # MindSpore leaves it to be read by its owner alone


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    network = Tiny()
    for parameter in (network.conv.weight, network.bn.gamma, network.bn.moving_variance):
        parameter.set_data(ms.Tensor(uniform(parameter.name, parameter.shape)))
    save(network, GOLDEN / "mindspore_tiny.ckpt", append_dict={"epoch_num": 7})
    values = {p.name: p.astype(ms.float32).asnumpy().tolist() for p in network.get_parameters()}
    values["epoch_num"] = 7
    (GOLDEN / "mindspore_tiny.json").write_text(json.dumps(values, indent=1) + "\n")

    mindcv.models.halonet.nn.Unfold = Unfold
    mindcv.models.halonet.ops = types.SimpleNamespace(**{**vars(ops), "pad": pad})
    model = mindcv.create_model("halonet_50t")
    model.set_train(False)
    parameters = list(model.get_parameters())
    shapes = {p.name: [list(p.shape), p.requires_grad] for p in parameters}
    rows = [f" {json.dumps(name)}: {json.dumps(row)}" for name, row in shapes.items()]
    (GOLDEN / "mindcv_halonet_50t.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
    arrays = random_arrays({name: tuple(shape) for name, (shape, _) in shapes.items()})
    for parameter in parameters:
        parameter.set_data(ms.Tensor(arrays[parameter.name]))
    save(model, folder / "halonet_50t.ckpt")
    images = uniform("images", (1, 256, 256, 3), -2.0, 2.0).transpose(0, 3, 1, 2)
    logits = model(ms.Tensor(np.ascontiguousarray(images))).asnumpy()
    np.save(folder / "halonet_50t_logits.npy", logits)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
    # MindSpore's cells complain, one by one, when the interpreter takes itself apart.
    sys.stdout.flush()
    os._exit(0)

"""Weights of timm and MindCV: every array of both sides, bit for bit, and files that are not."""

import functools
import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from flax import traverse_util
from safetensors.numpy import load_file, save, save_file

from halonet import checkpoint, load_run
from halonet.config import center_view
from halonet.data.views import CenterView
from halonet.models import VARIANTS, create_model
from halonet.models.convert import __main__ as command
from halonet.models.convert import readers, weights

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"

PEERS = [name for name, variant in VARIANTS.items() if variant.origin in weights.ENTRIES]
# The smallest of timm's, for what touches the disk.
NAME = "eca_halonext26ts"
CLASSES = 3

# Describing a model traces it: once here, whoever asks.
ENTRIES = {kind: functools.cache(entries) for kind, entries in weights.ENTRIES.items()}


@pytest.fixture(autouse=True)
def _described_once(monkeypatch):
    monkeypatch.setattr(weights, "ENTRIES", ENTRIES)


def described(name):
    """(model, entries) of a variant."""
    model = create_model(name, num_classes=CLASSES)
    return model, ENTRIES[VARIANTS[name].origin](model)


def with_all_classes(key, shape):
    """The shape of theirs at 1000 classes."""
    return (1000, *shape[1:]) if key.startswith(("head.fc.", "classifier.")) else shape


def random_arrays(name):
    """Any bits at all, not-a-numbers too, as the arrays of a peer's file."""
    rng = np.random.default_rng(len(name))
    arrays = {}
    for entry in described(name)[1]:
        if entry.how == "count":
            arrays[entry.theirs] = np.array(rng.integers(2**40))
        else:
            bits = rng.integers(2**32, size=entry.shape, dtype=np.uint32)
            arrays[entry.theirs] = bits.view(np.float32)
    return arrays


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        assert found[key].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("name", PEERS)
def test_each_array_of_both_sides_is_named_once(name):
    # That none of ours is left out is checked where the entries are made.
    _, entries = described(name)
    ours = [path for entry in entries for path in entry.ours]
    assert len(ours) == len(set(ours))
    assert len(entries) == len({entry.theirs for entry in entries})
    trained = [entry for entry in entries if entry.ours and entry.ours[0].startswith("params/")]
    shapes = [with_all_classes(entry.theirs, entry.shape) for entry in trained]
    assert sum(np.prod(shape, dtype=int) for shape in shapes) == VARIANTS[name].params


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("halonet26t", "stem.conv1.conv.weight", (24, 3, 3, 3)),
        ("halonet26t", "stages.0.0.shortcut.conv.weight", (256, 64, 1, 1)),
        ("halonet26t", "stages.2.1.self_attn.kv.weight", (512, 256, 1, 1)),
        ("halonet26t", "stages.2.1.self_attn.pos_embed.height_rel", (23, 32)),
        ("halonet26t", "stages.2.1.post_attn.running_var", (256,)),
        ("halonet26t", "head.fc.weight", (CLASSES, 2048)),
        ("haloregnetz_b", "stem.conv.weight", (32, 3, 3, 3)),
        ("haloregnetz_b", "stages.0.0.attn.fc1.weight", (24, 96, 1, 1)),
        ("haloregnetz_b", "stages.3.0.self_attn.q.weight", (192, 576, 1, 1)),
        ("haloregnetz_b", "final_conv.bn.num_batches_tracked", ()),
        ("eca_halonext26ts", "stages.0.0.conv2_kxk.conv.weight", (64, 16, 3, 3)),
        ("eca_halonext26ts", "stages.0.0.attn.conv.weight", (1, 1, 3)),
        ("lamhalobotnet50ts_256", "stages.1.1.self_attn.qkv.weight", (112, 128, 1, 1)),
        ("lamhalobotnet50ts_256", "stages.1.1.self_attn.conv_lambda.weight", (16, 1, 13, 13, 1)),
        ("lamhalobotnet50ts_256", "stages.1.1.self_attn.norm_v.weight", (32,)),
        ("halo2botnet50ts_256", "stages.3.1.self_attn.qkv.weight", (1536, 512, 1, 1)),
        ("halo2botnet50ts_256", "stages.3.1.self_attn.pos_embed.width_rel", (15, 128)),
        ("timm_halonet_h1", "stem.conv1.conv.weight", (64, 3, 7, 7)),
    ],
)
def test_timms_names_and_shapes(name, key, shape):
    assert {entry.theirs: entry.shape for entry in described(name)[1]}[key] == shape


def test_mindcvs_names_and_shapes():
    recorded = json.loads((GOLDEN / "mindcv_halonet_50t.json").read_text())
    found = {
        entry.theirs: list(with_all_classes(entry.theirs, entry.shape))
        for entry in described("halonet_50t")[1]
    }
    assert found == {key: shape for key, (shape, _) in recorded.items()}


def test_an_array_without_a_line_in_the_table_is_named(monkeypatch):
    monkeypatch.setattr(weights, "HEAD", weights.HEAD[:-1])
    with pytest.raises(weights.WeightsError, match="timm has no name for params/head/bias"):
        weights.timm_entries(create_model("halonet26t"))


@pytest.mark.parametrize("name", PEERS)
def test_a_round_trip_is_bit_for_bit(name):
    model, entries = described(name)
    arrays = random_arrays(name)
    variables, counts = weights.to_variables(arrays, entries, model)
    flat = traverse_util.flatten_dict(variables, sep="/")
    for entry in entries:
        assert [flat[path].shape for path in entry.ours] == list(entry.shapes)
    back = weights.from_variables(variables, entries, counts)
    assert_same_bits(back, arrays)
    assert all(array.flags.c_contiguous for array in back.values())


def entry_of(name, key):
    (entry,) = [entry for entry in described(name)[1] if entry.theirs == key]
    return entry


@pytest.mark.parametrize(
    ("name", "key", "where"),
    [
        # From (row, column) of theirs to (which of ours, its index), for two heads' worth of rows.
        (
            "halonet26t",  # 8 heads of 32 keys, then 32 values
            "stages.2.1.self_attn.kv.weight",
            {(0, 5): (0, 5, 0), (31, 5): (0, 5, 31), (32, 5): (1, 5, 0), (64, 9): (0, 9, 32)},
        ),
        (
            "haloregnetz_b",  # 8 heads of 24 keys, then 72 values
            "stages.3.0.self_attn.kv.weight",
            {(23, 1): (0, 1, 23), (24, 1): (1, 1, 0), (96, 1): (0, 1, 24), (767, 1): (1, 1, 575)},
        ),
        (
            "halo2botnet50ts_256",  # all queries, all keys, all values
            "stages.3.1.self_attn.qkv.weight",
            {(511, 2): (0, 2, 511), (512, 2): (1, 2, 0), (1024, 2): (2, 2, 0)},
        ),
        (
            "lamhalobotnet50ts_256",  # 4 heads of 16 queries, 16 keys, 32 values
            "stages.1.1.self_attn.qkv.weight",
            {(63, 3): (0, 3, 63), (64, 3): (1, 3, 0), (80, 3): (2, 3, 0), (111, 3): (2, 3, 31)},
        ),
        ("halonet26t", "head.fc.weight", {(2, 7): (0, 7, 2)}),
        ("halonet26t", "stages.0.0.conv1_1x1.conv.weight", {(7, 3): (0, 3, 7)}),
        ("halonet26t", "stem.conv2.conv.weight", {(7, 3, 0, 2): (0, 0, 2, 3, 7)}),
        ("halonet26t", "stages.2.1.self_attn.pos_embed.height_rel", {(4, 3): (0, 4, 3)}),
        ("eca_halonext26ts", "stages.0.0.attn.conv.weight", {(0, 0, 2): (0, 2)}),
        (
            "lamhalobotnet50ts_256",
            "stages.1.1.self_attn.conv_lambda.weight",
            {(7, 0, 2, 5, 0): (0, 2, 5, 7)},
        ),
    ],
)
def test_where_a_number_lies(name, key, where):
    entry = entry_of(name, key)
    theirs = np.arange(np.prod(entry.shape)).reshape(entry.shape)
    ours = entry.unpack(theirs)
    for index, (part, *place) in where.items():
        assert theirs[index].item() == ours[part][tuple(place)]


def test_narrow_numbers_are_widened_and_absent_counts_are_zero():
    model, entries = described("halonet26t")
    arrays = {entry.theirs: np.ones(entry.shape) for entry in entries if entry.ours}
    head = arrays["head.fc.bias"]
    for dtype, kept in (("float16", "float32"), (jnp.bfloat16, "float32"), ("float64", "float64")):
        arrays["head.fc.bias"] = head.astype(dtype)
        variables, counts = weights.to_variables(arrays, entries, model)
        assert variables["params"]["head"]["bias"].dtype == kept
    assert counts == {}
    count = weights.from_variables(variables, entries)["stem.conv1.bn.num_batches_tracked"]
    assert (count.dtype, count.shape, count) == (np.int64, (), 0)


def test_one_error_lists_all_that_differs():
    model, entries = described("halonet26t")
    arrays = {
        entry.theirs: np.zeros(entry.shape, np.float32 if entry.ours else int) for entry in entries
    }
    del arrays["head.fc.bias"], arrays["stem.conv1.bn.weight"]
    arrays |= {"ema.decay": np.zeros(()), "head.fc.weight": np.zeros((10, 2048))}
    arrays["stem.conv2.bn.bias"] = np.zeros(32, np.int8)
    with pytest.raises(weights.WeightsError) as error:
        weights.to_variables(arrays, entries, model)
    assert str(error.value) == (
        "missing: head.fc.bias, stem.conv1.bn.weight; extra: ema.decay []; misshapen: "
        "head.fc.weight is float64[10, 2048], not float[3, 2048], "
        "stem.conv2.bn.bias is int8[32], not float[32]"
    )
    assert error.value.exit_code == 4


@pytest.mark.parametrize(("theirs", "asked"), [("sehalonet33ts", NAME), ("halonet_50t", NAME)])
def test_weights_of_another_model_are_recognised(theirs, asked):
    model, entries = described(asked)
    arrays = {
        entry.theirs: np.broadcast_to(np.float32(0) if entry.ours else 0, entry.shape)
        for entry in described(theirs)[1]
    }
    with pytest.raises(weights.WeightsError, match=f"; they fit {theirs}$"):
        weights.to_variables(arrays, entries, model)


# Files. A pickle that calls os.system, byte by byte: GLOBAL, the argument, a tuple of it, REDUCE.


def pickle_that_touches(marker):
    command = f"touch {marker}".encode()
    size = len(command).to_bytes(4, "little")
    return b"\x80\x02cposix\nsystem\nX" + size + command + b"\x85R."


def refusal(path):
    """The one line that says why a file is not read."""
    with pytest.raises(weights.WeightsError) as error:
        readers.read_weights(path)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 4
    return str(error.value)


def test_the_code_in_the_pickle_works(tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    path.write_bytes(pickle_that_touches(marker))
    unpickle = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", unpickle, path], check=True)
    assert marker.exists()


# For .pth: tests/parity/test_pytorch_files.py.
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_code_in_a_file_does_not_run(tmp_path, suffix):
    path, marker = tmp_path / f"evil{suffix}", tmp_path / "marker"
    path.write_bytes(pickle_that_touches(marker))
    why = f"as {suffix}: it looks like a Python pickle, which may hold code"
    assert refusal(path).endswith(why)
    assert not marker.exists()


SAFETENSORS = save({"a": np.ones((2, 3), np.float32)})
CKPT = (GOLDEN / "mindspore_tiny.ckpt").read_bytes()


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.safetensors", SAFETENSORS[:-1], "SafetensorError: .*file not fully covered"),
        ("a.safetensors", SAFETENSORS[:20], "SafetensorError: .*invalid header length"),
        ("a.safetensors", SAFETENSORS.replace(b"[2,3]", b"[3,3]"), "SafetensorError: .*"),
        ("a.safetensors", SAFETENSORS.replace(b"F32", b"I32").replace(b"I32", b"U32"), ".*U32 are"),
        ("a.safetensors", save({}), "it holds no arrays"),
        ("a.safetensors", b"", "SafetensorError: .*header too small"),
        ("a.safetensors", b"<!DOCTYPE html>" + bytes(99), "it looks like a web page"),
        ("a.safetensors", b"version https://git-lfs.github.com", "it looks like a Git LFS pointer"),
        ("a.safetensors", b"PK\3\4" + bytes(99), "it looks like a zip archive, as PyTorch saves"),
        ("a.safetensors", CKPT, "it looks like a protobuf message, as MindSpore saves"),
        ("a.ckpt", CKPT[:-1], "it is no whole MindSpore checkpoint"),
        ("a.ckpt", bytes(range(1, 200)), "it is no whole MindSpore checkpoint"),
        ("a.ckpt", CKPT.replace(b"Float64", b"Float32"), "48 bytes are not a float32 array of sh"),
        ("a.ckpt", CKPT.replace(b"Float64", b"Float65"), "arrays of type float65 are not weights"),
        ("a.ckpt", b"\x0a\x03\x0a\x01a", "a is not a tensor"),
        ("a.ckpt", b"", "it holds no arrays"),
        ("a.ckpt", SAFETENSORS, "it looks like a .safetensors file"),
        ("a.pth", SAFETENSORS, "it looks like a .safetensors file"),
        ("a.pth", b"no archive", "PyTorch saves a zip archive or a pickle"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_file_that_is_not_what_it_says(tmp_path, name, data, why):
    path = tmp_path / name
    path.write_bytes(data)
    line = refusal(path)
    assert line.startswith(f"{path} cannot be read as {path.suffix}: ")
    assert re.search(f"{path.suffix}: {why}", line), line


def test_files_that_are_not_there_or_of_no_kind(tmp_path):
    assert refusal(tmp_path / "no.pth").endswith(
        "cannot be read as .pth: No such file or directory"
    )
    assert refusal(tmp_path).endswith("there are: .safetensors, .pth, .pt, .bin, .ckpt")


def test_pytorch_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"PK\3\4")
    assert "PyTorch is not installed" in (line := refusal(tmp_path / "a.pth"))
    assert line.endswith("'torch>=2.6', or take the .safetensors file of the same weights")


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu121"])
def test_a_pytorch_that_can_be_made_to_run_code_is_not_used(tmp_path, monkeypatch, version):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
    (tmp_path / "a.pth").write_bytes(b"PK\3\4")
    why = f"PyTorch {version} may run code in it (CVE-2025-32434): pip install 'torch>=2.6', or"
    assert why in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_before_every_key_is_taken_off(tmp_path, prefix):
    path = tmp_path / "a.safetensors"
    arrays = {"a": np.ones(1), "module.b": np.ones(2)}
    save_file({prefix + key: array for key, array in arrays.items()}, path)
    assert_same_bits(readers.read_weights(path), arrays)
    save_file(arrays, path)
    assert_same_bits(readers.read_weights(path), arrays)


def test_safetensors_of_every_float(tmp_path):
    arrays = {
        **{str(t): np.ones((2, 3), t) for t in ("float64", "float32", "float16", jnp.bfloat16)},
        "count": np.array(3),
    }
    save_file(arrays, tmp_path / "a.safetensors")
    assert_same_bits(readers.read_weights(tmp_path / "a.safetensors"), arrays)


def test_a_checkpoint_of_mindspore():
    recorded = json.loads((GOLDEN / "mindspore_tiny.json").read_text())
    arrays = readers.read_weights(GOLDEN / "mindspore_tiny.ckpt")
    assert arrays.keys() == recorded.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array.astype(np.float64), recorded[key], strict=False)
    for name in ("float16", "float32", "float64", "bfloat16", "int32", "int64"):
        assert arrays[name].dtype == jnp.dtype(name)
    assert arrays["epoch_num"].shape == ()


def test_a_large_array_of_mindspore_comes_in_parts(tmp_path):
    def value(tag, content):
        tensor = b"\x08\x02\x08\x02\x12\x07Float32\x1a" + bytes([len(content)]) + content
        value = b"\x0a\x01" + tag + b"\x12" + bytes([len(tensor)]) + tensor
        return b"\x0a" + bytes([len(value)]) + value

    content = np.arange(4, dtype=np.float32).tobytes()
    (tmp_path / "a.ckpt").write_bytes(value(b"a", content[:4]) + value(b"a", content[4:]))
    np.testing.assert_array_equal(readers.read_weights(tmp_path / "a.ckpt")["a"], [[0, 1], [2, 3]])


# The command.


@pytest.fixture
def run(capsys):
    """Runs the command in this process: (exit code, what it printed on either stream)."""

    def run(*words, **values):
        code = 0
        with flagsaver.flagsaver(**{key: str(value) for key, value in values.items()}):
            flags.FLAGS.mark_as_parsed()
            try:
                command.main(["convert", *map(str, words)])
            except SystemExit as end:
                code = end.code
            flags.FLAGS.unparse_flags()
        out, err = capsys.readouterr()
        if code:
            assert err.startswith("error: ")
            assert err.count("\n") == 1
            assert not out
        return code, err if code else out

    return run


@pytest.fixture(scope="module")
def timms(tmp_path_factory):
    """A file of timm's with three classes."""
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(random_arrays(NAME), path)
    return path


def test_a_file_becomes_a_run_and_the_file_again(run, timms, tmp_path):
    out, back = tmp_path / "run", tmp_path / "back.safetensors"
    classes = tmp_path / "classes.txt"
    classes.write_text("cat\ndog\nfish\n")
    code, text = run("timm", timms, model=NAME, out=out, classes=classes)
    assert code == 0
    assert "8,714,032 parameters, 3 classes, images of 256 px, from model.safetensors" in text
    assert "float64" not in text
    assert "\nnote: numbers in head.fc.weight, the first of 120 such arrays, are no finite" in text
    assert f'run = halonet.load_run("{out}")' in text
    assert f"--config.init.weights={out} --config.model.name={NAME} --config.data" in text

    opened = load_run(out)
    assert (opened.step, opened.weights, opened.classes) == (0, "raw", ("cat", "dog", "fish"))
    assert opened.model == create_model(NAME, num_classes=3)
    assert opened.preprocess([np.zeros((300, 400, 3), np.uint8)]).shape == (1, 256, 256, 3)
    assert opened.config.converted_from.file == "model.safetensors"
    # As its published accuracy was measured.
    assert center_view(opened.config) == CenterView(256, VARIANTS[NAME].crop_pct, "bicubic")
    model, entries = described(NAME)
    expected, _ = weights.to_variables(load_file(timms), entries, model)
    jax.tree.map(np.testing.assert_array_equal, opened.variables, expected)

    code, text = run("timm", out, to=back)
    assert code == 0
    assert f"timm.create_model('{NAME}', num_classes=3, checkpoint_path='{back}')" in text
    assert_same_bits(load_file(back), load_file(timms))
    assert sorted(path.name for path in tmp_path.iterdir()) == [back.name, classes.name, "run"]

    # Again into the same folder: the new names count.
    assert run("timm", timms, model=NAME, out=out)[0] == 0
    assert load_run(out).classes == ("0", "1", "2")
    code, line = run("timm", timms, model=NAME, out=tmp_path)
    assert (code, line) == (
        2,
        f"error: --out={tmp_path} holds something else; take another folder\n",
    )
    for config in ("5", '"converted_from"', "{}", "not JSON"):
        (out / "config.json").write_text(config)
        assert run("timm", timms, model=NAME, out=out) == (
            2,
            line.replace(f"{tmp_path} ", f"{out} "),
        )


def test_what_is_said_of_numbers_and_of_mindcv():
    assert not list(command.notes({"a": np.ones(1, np.float32), "n": np.array(3)}, "timm"))
    arrays = {"a": np.ones(1), "b": np.array([1, np.nan]), "c": np.array(np.inf, jnp.bfloat16)}
    wide, odd, unfold = command.notes(arrays, "mindcv")
    assert wide == "float64 arrays are stored as float32"
    assert odd == "numbers in b, the first of 2 such arrays, are no finite float32"
    assert unfold.startswith("MindSpore's own Unfold orders windows otherwise than MindCV's source")


def make_run(workdir, name, *, size, ema_decay=0.0, **state):
    """A run folder of given arrays, as training leaves it."""
    workdir.mkdir()
    config = {
        "model": {"name": name},
        "data": {"image_size": size, "mean": [0.5] * 3, "std": [0.5] * 3},
        "train": {"ema_decay": ema_decay},
    }
    (workdir / "config.json").write_text(json.dumps(config))
    checkpoint.save_variables(workdir, state, {"classes": ["a", "b", "c"]})


def test_a_trained_run_gives_its_averages(run, timms, tmp_path):
    model, entries = described(NAME)
    arrays = load_file(timms)
    averages, _ = weights.to_variables(arrays, entries, model)
    state = {**jax.tree.map(np.zeros_like, averages), "ema": averages}
    make_run(tmp_path / "run", NAME, size=256, ema_decay=0.5, **state)
    code, text = run("timm", tmp_path / "run", to=tmp_path / "a.safetensors")
    assert code == 0
    assert "(ema weights)" in text
    counts = {entry.theirs: np.array(0) for entry in entries if entry.how == "count"}
    assert_same_bits(load_file(tmp_path / "a.safetensors"), {**arrays, **counts})


def test_what_timm_does_not_have_is_refused(run, tmp_path):
    model = create_model("halonet_tiny", num_classes=CLASSES)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    make_run(tmp_path / "run", "halonet_tiny", size=32, **variables)
    to = tmp_path / "a.safetensors"
    code, line = run("timm", tmp_path / "run", to=to)
    assert code == 2
    assert "'halonet_tiny' is not one of timm's models; there are: timm_halonet_h1, " in line
    assert not to.exists()


def test_conventions_that_are_not_timms_are_refused():
    free = {"pad_to_blocks": True, "bn_group": 8, "dtype": "bfloat16", "implementation": "xla_rows"}
    free |= {"remat": "block", "drop_path": 0.1, "dropout": 0.1}
    command.check_conventions(create_model("halonet26t", **free), "halonet26t")
    other = create_model("halonet26t", border="mask", positions="exact")
    with pytest.raises(command.UsageError) as error:
        command.check_conventions(other, "halonet26t")
    assert str(error.value) == "timm's halonet26t cannot compute border='mask', positions='exact'"


@pytest.mark.parametrize(
    ("words", "values", "code", "message"),
    [
        ((), {}, 2, "one of these: timm FILE --model=NAME --out=DIR, mindcv FILE "),
        (("torch", "a.pth"), {"model": NAME, "out": "x"}, 2, "one of these: "),
        (("timm", "a.pth"), {"model": NAME}, 2, "one of these: "),
        (("timm", "a.pth"), {"model": NAME, "out": "x", "to": "y.safetensors"}, 2, "one of these"),
        (
            ("timm", "a.pth"),
            {"model": "halonet_h0", "out": "x"},
            2,
            "'halonet_h0' is not one of ti",
        ),
        (
            ("timm", "a.pth"),
            {"model": "halonet50t", "out": "x"},
            2,
            "'halonet50t' is not one of timm's models; did you mean 'halonet50ts'?",
        ),
        (("timm", "run"), {"to": "y.safetensors", "model": NAME}, 2, "one of these: "),
        (("timm", "run"), {"to": "y.safetensors", "classes": "names.txt"}, 2, "one of these: "),
        (("mindcv", "a.ckpt"), {"model": NAME, "out": "x"}, 2, f"{NAME!r} is not one of mindcv's"),
        (("mindcv", "run"), {"to": "y.safetensors"}, 2, "--to writes timm's files only"),
        (("timm", "run"), {"to": "y.pth"}, 2, "--to=y.pth must end in .safetensors"),
        (("timm", "no_run"), {"to": "y.safetensors"}, 2, "no_run holds no run"),
        (("timm", "no.pth"), {"model": NAME, "out": "x"}, 4, "no.pth cannot be read as .pth: No s"),
    ],
)
def test_a_command_that_cannot_be_followed(run, words, values, code, message):
    got, line = run(*words, **values)
    assert got == code
    assert message in line


def test_weights_that_do_not_fit_leave_nothing_behind(run, timms, tmp_path):
    code, line = run("timm", timms, model="halonet26t", out=tmp_path / "run")
    assert code == 4
    assert (
        f"{timms} does not hold halonet26t: extra: stages.0.0.attn.conv.weight [1, 1, 3], " in line
    )
    assert line.endswith(f"; they fit {NAME}\n")
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    code, line = run("timm", timms, model=NAME, out=tmp_path / "run", classes=names)
    assert code == 2
    assert "has 2 lines; the weights have 3 classes" in line
    assert list(tmp_path.iterdir()) == [names]


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_the_classes_of_mindcv_are_counted(run, tmp_path, leaf):
    shape = (CLASSES, 2048)[: 2 if leaf == "weight" else 1]
    save_file({f"classifier.1.{leaf}": np.zeros(shape)}, tmp_path / "a.safetensors")
    out = tmp_path / "run"
    code, line = run("mindcv", tmp_path / "a.safetensors", model="halonet_50t", out=out)
    assert code == 4
    other = {"weight": "bias", "bias": "weight"}[leaf]
    assert f"does not hold halonet_50t: missing: classifier.1.{other}, stage1.blocks.0." in line
    assert "misshapen" not in line


def test_keys_cannot_write_on_the_terminal(run, tmp_path):
    arrays = {"\x1b[2J\nerror: fine": np.zeros(1), "head.fc.bias": np.zeros(CLASSES)}
    save_file(arrays, tmp_path / "a.safetensors")
    code, line = run("timm", tmp_path / "a.safetensors", model=NAME, out=tmp_path / "run")
    assert code == 4
    assert "\x1b" not in line


def test_a_flag_that_does_not_exist(capsys):
    try:
        with pytest.raises(SystemExit) as end:
            command.parse_flags(["convert", "timm", "a.pth", "--clases=names"])
    finally:
        flags.FLAGS.unparse_flags()
        flags.FLAGS.set_gnu_getopt(False)
    assert end.value.code == 2
    line = "error: Unknown command line flag 'clases'. Did you mean: classes ?\n"
    assert capsys.readouterr().err == line


def test_the_command_line_itself(tmp_path):
    path, marker = tmp_path / "evil.safetensors", tmp_path / "marker"
    path.write_bytes(pickle_that_touches(marker))
    words = ["-m", "halonet.models.convert", "timm", path, "--model=halonet26t", "--out=x"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert done.stderr == (
        f"error: {path} cannot be read as .safetensors: "
        "it looks like a Python pickle, which may hold code\n"
    )
    assert not marker.exists()

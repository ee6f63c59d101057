"""`python -m halonet.data`: what it prints of a data set, and with which code it ends."""

import pathlib

import pytest
from PIL import Image

from halonet.data import check
from halonet.data import prepare as prepare_module
from halonet.data.__main__ import main
from tests.test_sources import encoded, prepare

ROOT = pathlib.Path(__file__).parent.parent
# ml_collections loads config files by an older way of importlib.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")


@pytest.fixture
def ran(capsys, monkeypatch):
    """Runs a command in this process: the exit code, the lines printed and those of errors."""
    rate = check.Rate(images_per_second=213.4, images_per_core_second=150.0)
    monkeypatch.setattr(check, "measure_rate", lambda *args, **kwargs: rate)

    def run(*arguments):
        capsys.readouterr()  # what TFDS prints when a test prepares something
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def config(name, **settings):
    settings = {"data.image_size": 16, "augment.flip": True, **settings}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return ("check", f"--config={ROOT / 'configs' / f'{name}.py'}", *flags)


def toy(folder, **settings):
    settings = {"data.data_dir": folder, "data.eval_split": "val", **settings}
    return config("default", **{"data.name": "toy", **settings})


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare(folder)
    return folder


def test_a_data_set_that_is_ready(ran, data_dir, tmp_path):
    sheet = tmp_path / "sheet.png"
    arguments = toy(
        data_dir, **{"data.threads": 3, "data.workers": 2, "augment.crop_min_area": 0.5}
    )
    code, out, err = ran(*arguments, f"--sheet={sheet}", "--images_per_second=150")
    assert (code, err) == (0, [])
    *rest, rate, cores, ready = out
    assert rest == [
        f"data    toy in {data_dir}/toy/1.0.0, array_record: 3 classes (ant, bee, cat)",
        "split   train: 10 examples",
        "split   val: 3 examples",
        "shards  train: 1, both ends of each can be read",
        "shards  val: 1, both ends of each can be read",
        f"sheet   {sheet}: 10 images",
    ]
    assert rate.startswith("input   213 images/s with data.workers=2 and data.threads=3 on ")
    assert rate.endswith(" cores; one core makes 150")
    assert cores == "cores   150 images/s need 1.0 cores of this kind"
    assert ready == "ready"
    with Image.open(sheet) as drawn:
        assert drawn.width > 400
    # What a step takes beyond that is a warning: it would run, but slowly.
    code, out, _ = ran(*arguments, "--images_per_second=800")
    assert code == 0
    assert out[-3:-1] == [
        "cores   800 images/s need 5.3 cores of this kind",
        "warning a step that takes 800 images/s would wait for its images",
    ]


def test_every_source_is_looked_at(ran, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        (tmp_path / split / "ant" / "one.png").write_bytes(encoded(3).read())
    for settings, first in (
        ({"data.name": "mnist5k", "data.image_size": 32}, "data    mnist5k: 10 classes (0, 1,"),
        ({"data.name": "fake:30:7"}, "data    fake:30:7: 7 classes (0, 1, 2, ...)"),
        (
            {"data.name": "folder", "data.data_dir": tmp_path, "data.eval_split": "val"},
            f"data    {tmp_path}: 1 classes (ant)",
        ),
    ):
        code, out, err = ran(*config("default", **settings))
        assert (code, err) == (0, [])
        assert out[0].startswith(first)
        assert out[-1] == "ready"


def test_what_is_not_prepared_is_mended_by_a_command(ran, tmp_path):
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"x" * 6_700_000)
    settings = {"data.name": "imagenet2012", "data.data_dir": tmp_path / "data"}
    code, out, err = ran(*config("default", **settings), f"--manual_dir={tmp_path}")
    assert code == 3
    assert err == [
        f"error: data set 'imagenet2012' not found: there is no folder {tmp_path}/data; "
        "prepare it there (python -m halonet.data prepare) or set data.data_dir"
    ]
    assert out == [
        f"archive {tmp_path}/ILSVRC2012_img_train.tar: missing",
        f"archive {tmp_path}/ILSVRC2012_img_val.tar: 6.7 MB",
        f"mend    python -m halonet.data prepare imagenet2012 --manual_dir={tmp_path} "
        f"--data_dir={tmp_path}/data",
    ]
    # The command is a good one, and says what it needs.
    code, out, err = ran(*out[-1].split()[4:])
    assert (code, out) == (3, [])
    assert err == [
        "error: imagenet2012 is prepared from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, "
        f"and {tmp_path} lacks ILSVRC2012_img_train.tar (found: ILSVRC2012_img_val.tar)"
    ]
    (tmp_path / "data" / "imagenet2012" / "incomplete.ABC_5.1.0").mkdir(parents=True)
    code, out, err = ran(*config("default", **settings))
    assert code == 3
    assert "is not fully prepared (found: incomplete.ABC_5.1.0); prepare it again: " in err[0]
    assert out[-1].startswith(
        "mend    python -m halonet.data prepare imagenet2012 --manual_dir=DIR"
    )


def test_a_name_that_nobody_knows(ran, tmp_path):
    code, out, err = ran(*toy(tmp_path, **{"data.name": "imagenett"}))
    assert code == 3
    (line,) = err
    assert line.startswith(f"error: data set 'imagenett' not found under {tmp_path}")
    (line,) = out
    assert line.startswith("mend    TensorFlow Datasets ")
    assert line.endswith(" has no data set 'imagenett'; did you mean 'imagenette'?")


def test_each_fault_is_a_line(ran, tmp_path, data_dir):
    code, out, err = ran(*toy(data_dir, **{"data.eval_split": "test", "data.train_split": "dev"}))
    assert (code, out) == (3, [])
    assert err == [
        f"error: data set 'toy' has no split '{split}' (found: train, val)"
        for split in ("dev", "test")
    ]
    # Of which one is there, as much is said as can be.
    code, out, err = ran(*toy(data_dir, **{"data.eval_split": "test"}))
    assert (code, len(err)) == (3, 1)
    assert out[1] == "split   train: 10 examples"
    assert "ready" not in out

    def broken(i):
        file = encoded(i)
        if i == 1:
            file.truncate(60)
        return file

    prepare(tmp_path, images=broken)
    code, out, err = ran(*toy(tmp_path))
    assert (code, len(err)) == (3, 2)
    for line, split in zip(err, ("train", "val"), strict=True):
        assert line.startswith("error: example ")
        assert f" of split '{split}' of data set 'toy' (toy-{split}.array_record-00000-of-" in line
        assert "is not a readable image: " in line
    # Where training passes over damaged images it is warned of, and evaluation never does.
    code, out, err = ran(*toy(tmp_path, **{"data.damaged": "skip"}))
    assert (code, len(err)) == (3, 1)
    assert "of split 'val' of" in err[0]
    (warning,) = (line for line in out if line.startswith("warning "))
    assert "of split 'train' of" in warning
    shard = next((tmp_path / "toy" / "1.0.0").glob("toy-val*"))
    shard.write_bytes(shard.read_bytes()[:50_000])
    code, out, err = ran(*toy(tmp_path))
    assert code == 3
    assert "(toy-val.array_record-00000-of-00001) cannot be read: " in err[0]


def test_damaged_shards_are_mended_by_preparing_again(ran, tmp_path):
    folder = prepare(tmp_path, "imagenet2012")
    settings = {"data.name": "imagenet2012", "data.train_split": "val"}
    shard = next(folder.glob("*-val*"))
    whole = shard.read_bytes()
    for content, message in (
        (whole[:50_000], "cannot be read: "),
        (b"", " lacks 1 of the 1 shards"),
    ):
        shard.write_bytes(content)
        if not content:
            shard.unlink()
        code, out, err = ran(*toy(tmp_path, **settings))
        (line,) = err
        assert message in line
        assert code == 3
        assert out[-1] == (
            f"mend    remove {folder}, then python -m halonet.data prepare imagenet2012 "
            f"--manual_dir=DIR --data_dir={tmp_path}"
        )


def test_many_faults_are_a_few_lines(ran, tmp_path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "train" / "ant" / f"{i:02}.png").write_bytes(b"no picture")
    splits = {"data.train_split": "train", "data.eval_split": "train"}
    settings = {"data.name": "folder", "data.data_dir": tmp_path, **splits}
    code, _, err = ran(*config("default", **settings))
    assert (code, len(err)) == (3, 6)
    assert err[0].startswith(f"error: {tmp_path}/train/ant/00.png is not a readable image: ")
    assert err[-1] == "error: and 15 more like these"


def test_an_interruption_is_a_line(ran, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "prepare", interrupted)
    assert ran("prepare", "toy", "--manual_dir=.") == (
        *(130, []),
        ["interrupted; the same command starts again"],
    )


@pytest.mark.parametrize("command", ["prepare", "check"])
def test_help_names_the_flags(ran, command):
    code, out, err = ran(command, "--help")
    assert (code, err) == (0, [])
    assert any("--manual_dir" in line for line in out)
    assert any({"check": "--images_per_second", "prepare": "--data_dir"}[command] in x for x in out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chekc"], "argument {prepare,check}: invalid choice: 'chekc'"),
        (["prepare", "toy"], "the following arguments are required: --manual_dir"),
        (["prepare", "toy", "--manual_dir=x", "--dir=y"], "unrecognized arguments: --dir=y"),
        (["check"], "--config"),
        (["check", "--config=nowhere.py"], "--config=nowhere.py: there is no such file"),
        (config("mnist", **{"data.thread": 2}), "did you mean 'data.threads'?"),
        (config("mnist", **{"data.threads": -1}), "config.data.threads=-1 must not be negative"),
        (config("mnist", **{"data.name": "fake"}), "config.data: data set 'fake' must be written"),
        ((*config("mnist"), "--sheet=sheet.jpg"), "--sheet=sheet.jpg does not end in .png"),
        ((*config("demo", **{"data.image_size": 32}), "--sheet=no/x.png"), "No such file"),
        ((*config("mnist"), "--images_per_second=-1"), "images_per_second"),
    ],
)
def test_a_wrong_command_is_one_line(ran, arguments, message):
    code, _, err = ran(*arguments)
    assert code == 2
    (line,) = err
    assert line.startswith("error: ")
    assert message in line

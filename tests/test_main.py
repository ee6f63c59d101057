"""The command line: what cannot run is refused in one line, with the exit code that says why."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import main
from configs import mnist
from halonet import processes, runtime
from halonet.config import ConfigError, parse_flags, save_config

ROOT = pathlib.Path(__file__).parent.parent
# ml_collections loads config files by an older way of importlib.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")
MNIST = f"--config={ROOT / 'configs' / 'mnist.py'}"
IMAGENET = ROOT / "configs" / "imagenet.py"


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs main in this process: the exit code, and the one line on stderr after "error: "."""
    monkeypatch.setattr(runtime, "enable_compilation_cache", lambda: None)

    def run(*arguments):
        argv = ["main.py", *map(str, arguments)]
        # The overrides of config keys are looked for there.
        monkeypatch.setattr(sys, "argv", argv)
        with flagsaver.flagsaver():
            with pytest.raises(SystemExit) as end:
                main.main(parse_flags(argv))
            flags.FLAGS.unparse_flags()
        return end.value.code, line_of(capsys.readouterr().err)

    return run


def last(value):
    """An id for a test: the last argument."""
    return value[-1] if isinstance(value, list) else ""


def line_of(stderr):
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr.removeprefix("error: ").removesuffix("\n")


def test_a_mistyped_key_in_a_config_file(refused, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import mnist\n\n\ndef get_config():\n"
        "    config = mnist.get_config()\n    config.optim.lerning_rate = 1.0\n    return config\n"
    )
    code, line = refused(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert line.startswith(f"{path}: ")
    assert "lerning_rate" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(", "'(' was never closed (mine.py, line 1)"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("nothing_of_this_name", "name 'nothing_of_this_name' is not defined"),
        (
            "def get_config():\n    return {'seed': 1}",
            "its get_config() returns no ConfigDict but a dict",
        ),
    ],
    ids=["syntax", "import", "name", "no ConfigDict"],
)
def test_a_config_file_that_is_none(refused, tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    code, line = refused(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert code == 2
    assert line.startswith(f"{path}: ")
    assert line.endswith(message)


UNREADABLE = [
    (
        [MNIST, "--workdir=w", "--config.learning_rate=1"],
        "no config key 'learning_rate' (value '1'); did you mean 'optim.learning_rate'?",
    ),
    (
        [MNIST, "--workdir=w", "--config.optm.warmup", "0.1"],
        "no config key 'optm.warmup' (value '0.1'); did you mean 'optim.warmup'?",
    ),
    (
        [MNIST, "--workdir=w", "--config.zzzzzz=1"],
        "no config key 'zzzzzz' (value '1'); configs/default.py lists them",
    ),
    (
        [MNIST, "--workdir=w", "--config.data.batch_size=abc"],
        "config.data.batch_size=abc is not of the key's type, int: now 64",
    ),
    (
        [MNIST, "--workdir=w", "--config.data.batch_size=1.5"],
        "config.data.batch_size=1.5 is not of the key's type, int: now 64",
    ),
    (
        [f"--config={IMAGENET}:halonet_h4", "--workdir=w", "--config.sed=1"],
        "no config key 'sed' (value '1'); did you mean 'seed'?",
    ),
    (
        [f"--config={IMAGENET}:halonet_h8", "--workdir=w"],
        f"{IMAGENET}:halonet_h8: unknown variant 'halonet_h8'; there are: halonet_h0, halonet_h1, "
        "halonet_h2, halonet_h3, halonet_h4, halonet_h5, halonet_h6, halonet_h7",
    ),
    (
        ["--config=configs/imagnet.py:halonet_h4", "--workdir=w"],
        "--config=configs/imagnet.py:halonet_h4: there is no such file",
    ),
    ([MNIST, "--workdir="], "flag --workdir=: it is empty; it would be this folder: ."),
    ([MNIST, "--workdirr=w"], "Unknown command line flag 'workdirr'. Did you mean: workdir ?"),
]


@pytest.mark.parametrize(("arguments", "message"), UNREADABLE, ids=last)
def test_unreadable_command_line(refused, arguments, message):
    assert refused(*arguments) == (2, message)


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (["--workdir=w"], "--config"),
        ([MNIST], "--workdir"),
        (["--config=configs/mnst.py", "--workdir=w"], r"configs/mnst\.py"),
        (["--config=configs/mnst.py", "--workdir=w", "--config.seed=1"], r"configs/mnst\.py"),
        # Dashes forgotten: not an override, and not to be passed over in silence.
        ([MNIST, "--workdir=w", "config.seed=1"], r"config\.seed=1"),
        ([MNIST, "--workdir=w", "--mode=tran"], "tran.*train.*evaluate"),
    ],
    ids=last,
)
def test_unusable_command_line(refused, monkeypatch, arguments, mentioned):
    # Were it let through, it would end here and not in an hour's training.
    monkeypatch.setattr(processes, "join_processes", lambda **settings: sys.exit("let through"))
    code, message = refused(*arguments)
    assert code == 2
    assert re.search(mentioned, message)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--config.data.batch_size=100"],
            2,
            "config.data.batch_size=100 cannot be shared by 8 devices in groups of "
            "config.model.bn_group=32; the nearest that can: 256",
        ),
        (
            ["--mode=evaluate", "--config.eval.batch_size=100"],
            2,
            "config.eval.batch_size=100 cannot be shared by 8 devices; the nearest that can: 96",
        ),
        (
            ["--config.data.batch_size=256", "--config.mesh.fsdp=3"],
            2,
            "config.mesh.data=0 x mesh.fsdp=3 x mesh.rows=1 does not fit 8 devices; mesh.fsdp can "
            "be one of [1, 2, 4, 8], and mesh.data=0 takes the rest",
        ),
        (
            ["--config.data.name=imagenet2012", "--config.data.data_dir=/nowhere/data"],
            3,
            "data set 'imagenet2012' not found: there is no folder /nowhere/data; "
            "prepare it there (python -m halonet.data prepare) or set data.data_dir",
        ),
        (
            ["--mode=evaluate", "--force"],
            2,
            "--force is of --mode=train; leave it out with --mode=evaluate",
        ),
        (
            ["--distributed.process_id=1"],
            2,
            "distributed.coordinator='', distributed.process_id=1 and "
            "distributed.process_count=0 go together: host:port, and an id from 0 to count - 1",
        ),
    ],
    ids=last,
)
def test_unusable_configuration(refused, tmp_path, arguments, code, message):
    workdir = tmp_path / "run"
    assert refused(MNIST, f"--workdir={workdir}", *arguments) == (code, message)
    assert not workdir.exists()


def test_evaluation_is_told_what_the_command_line_sets(refused, monkeypatch):
    def evaluate(config, workdir, *, chosen, **_):
        raise ConfigError(f"chosen: {', '.join(sorted(chosen))}")

    monkeypatch.setattr("halonet.evaluate.evaluate_checkpoint", evaluate)
    arguments = (
        "--workdir=w",
        "--mode=evaluate",
        "--config.seed=1",
        "--config.data.crop_pct",
        "0.5",
    )
    assert refused(MNIST, *arguments) == (2, "chosen: data.crop_pct, seed")


def test_evaluation_without_a_run(refused, tmp_path):
    workdir = tmp_path / "run"
    message = f"{workdir} holds no run: there is no config.json in it"
    assert refused(MNIST, f"--workdir={workdir}", "--mode=evaluate") == (2, message)
    assert not workdir.exists()


def test_a_plan_needs_no_workdir_but_a_known_topology(refused):
    code, message = refused(MNIST, "--mode=plan", "--plan.topology=v5e:3x3")
    assert code == 2
    assert message == (
        "--plan.topology: topology 'v5e:3x3' is none that is known; there are v5e: 1x1 2x2 2x4 4x4 "
        "4x8 8x8 8x16 16x16; and cpu:N"
    )


@pytest.mark.parametrize(
    ("mode", "function", "flag"),
    [
        (
            "plan",
            "plan.plan",
            {"topology": "cpu:8", "classes": 7, "examples": 70, "out": "plan.json"},
        ),
        (
            "export",
            "export.export_checkpoint",
            {
                "format": "savedmodel",
                "out": "digits",
                "preprocess": "outside",
                "step": "latest",
                "checkpoint": "other",
                "weights": "raw",
            },
        ),
    ],
)
def test_flags_of_a_mode_are_its_arguments(monkeypatch, mode, function, flag):
    given = {}
    monkeypatch.setattr(runtime, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(
        f"halonet.{function}", lambda config, *_, **settings: given.update(settings)
    )
    argv = ["main.py", MNIST, "--workdir=w", f"--mode={mode}", "--config.seed=7"]
    argv += [f"--{mode}.{key}={value}" for key, value in flag.items()]
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver():
        main.main(parse_flags(argv))
        flags.FLAGS.unparse_flags()
    assert list(given.pop("chosen", ["seed"])) == ["seed"]
    assert given == flag


def test_workdir_of_another_configuration(refused, tmp_path):
    other = mnist.get_config()
    other.data.batch_size = 256
    other.seed = 7
    save_config(other, tmp_path)
    code, message = refused(MNIST, f"--workdir={tmp_path}", "--config.data.batch_size=256")
    assert code == 2
    assert message == (
        f"{tmp_path} belongs to a run of another configuration (seed: 7 there, 0 now); "
        "take another --workdir, or the old values"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        UNREADABLE[0],
        (
            [MNIST, "--workdir=w", "--config.data.image_size=28"],
            "config.data.image_size=28: image height 28 cannot be cut into blocks of 4 in every "
            "stage (the last has stride 4); the nearest that work: 16 and 32; "
            "with pad_to_blocks any size does",
        ),
    ],
    ids=last,
)
def test_process_ends_with_one_line(tmp_path, arguments, message):
    """As a user sees it: nothing of the libraries on stderr, and the code of the process."""
    # Nothing is in Matplotlib's folder yet: it says so, to whoever listens to its log.
    folders = {"MPLCONFIGDIR": str(tmp_path / "mpl"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *arguments],
        cwd=tmp_path,
        env=os.environ | folders,
        capture_output=True,
        text=True,
    )
    assert line_of(done.stderr) == message
    assert done.returncode == 2
    assert not (tmp_path / "w").exists()


def test_an_old_python_is_told():
    program = (
        "import runpy, sys\nsys.version, sys.hexversion = '3.9.1 (main)', 0x030901F0\n"
        "runpy.run_path('main.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert line_of(done.stderr) == "Python 3.9.1; it must be 3.11 or later"
    assert done.returncode == 2


@pytest.mark.middle
def test_devices_that_are_not_there_are_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", MNIST, f"--workdir={tmp_path / 'run'}"],
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert line_of(done.stderr).startswith("JAX_PLATFORMS=nonsense: Unable to initialize backend")
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.middle
def test_a_warm_start_is_quick(tmp_path):
    """The digits run, in a new folder, with the programs that an earlier process has compiled."""
    cache = tmp_path / "cache" / "halonet" / "xla"
    variables = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    del variables["JAX_COMPILATION_CACHE_DIR"]
    compiled, seconds = [], []
    for start in ("cold", "warm"):
        subprocess.run(
            [
                *(sys.executable, ROOT / "main.py", "--config=configs/demo.py"),
                *(f"--workdir={tmp_path / start}", "--config.train.steps=2"),
            ],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            check=True,
        )
        compiled.append({path.name for path in cache.glob("jit_train_step-*-cache")})
        summary = json.loads((tmp_path / start / "summary.json").read_text())
        seconds.append(summary["perf/startup_seconds"])
    assert len(compiled[0]) == 1
    assert compiled[0] == compiled[1]
    assert seconds[1] < min(30, seconds[0])

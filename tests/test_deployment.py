"""docs/deployment.md: each piece of code in it, run as it stands on exports made here."""

import contextlib
import functools
import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import halonet
from halonet.config import load_config
from halonet.data.views import CenterView
from halonet.export import BOUNDS, export_checkpoint
from tests.command_lines import blocks
from tests.test_export import digits, relative
from tests.test_golden_run import GOLDEN, registered  # noqa: F401 (its model, in every test)

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "deployment.md").read_text()
PROGRAMS = dict(
    re.match(r"# (\w+\.py)\n(.*)", it.text, re.DOTALL).groups()
    for it in blocks(PAGE)
    if it.language == "python" and it.text.startswith("# ")
)
BLOCKS = [it.text for it in blocks(PAGE) if not it.language]
COMMANDS = BLOCKS[0].replace("\\\n", " ").splitlines()


def test_each_piece_is_found():
    assert set(PROGRAMS) == {
        *("square.py", "stablehlo.py", "savedmodel.py", "with_timm.py", "onnx_export.py"),
        *("service.py", "client.py"),
    }
    assert [it.split()[:3] for it in BLOCKS[1:]] == [
        ["python", "-m", "halonet.exported"],
        ["python", "-m", "venv"],
        ["python", "-m", "venv"],
    ]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop_pct"), [(256, 0.95), (224, 0.94), (427, 1.0), (33, 0.3)])
def test_the_square_is_what_the_model_sees(tmp_path, size, crop_pct, interpolation):
    scope = run_block("square.py", tmp_path)
    pictures = load_sample_images().images  # one wide, and one made high and odd
    for picture in (pictures[0], pictures[1].swapaxes(0, 1)[:-1]):
        found = scope["square"](Image.fromarray(picture), size, crop_pct, interpolation, where="")
        expected = CenterView(size, crop_pct, interpolation)(np.ascontiguousarray(picture))
        np.testing.assert_array_equal(found, expected)


def run_block(name, folder):
    """The names that a block defines."""
    path = folder / name
    path.write_text(PROGRAMS[name])
    return runpy.run_path(str(path))


def run(folder, *words, **variables):
    """Runs a command there, and what it printed."""
    environment = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
    done = subprocess.run(
        words, cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def exported_golden(folder, name, format):
    out = folder / "exports" / name
    export_checkpoint(load_config(GOLDEN), GOLDEN, format=format, out=str(out))
    images = digits((0, 250, 500, 750, 999))
    np.save(folder / "images.npy", images)
    run = halonet.load_run(GOLDEN)
    apply = jax.jit(functools.partial(run.model.apply, train=False))
    return np.asarray(apply(run.variables, run.preprocess(images)))


@pytest.mark.middle
@pytest.mark.parametrize(
    ("file", "name", "format"),
    [("stablehlo.py", "digits", "stablehlo"), ("savedmodel.py", "digits_tf", "savedmodel")],
)
def test_an_export_is_used_without_this_package(tmp_path, file, name, format):
    logits = exported_golden(tmp_path, name, format)
    (tmp_path / file).write_text(PROGRAMS[file])
    said = run(tmp_path, sys.executable, file, PYTHONPATH="")
    assert said.split() == [str(label) for label in logits.argmax(-1)]


@pytest.mark.middle
@pytest.mark.parametrize("format", ["stablehlo", "savedmodel"])
def test_an_export_command_does_what_it_says(undisturbed, tmp_path, format):
    command = COMMANDS[0] if format == "stablehlo" else COMMANDS[1]
    out = re.search(r"--export\.out=(\S+)", command)[1]
    assert ("--export.format=savedmodel" in command) == (format == "savedmodel")
    words = command.replace("runs/demo", str(undisturbed[0])).replace(out, str(tmp_path / "out"))
    said = run(ROOT, sys.executable, *words.split()[1:])
    assert f"\nwritten to {tmp_path / 'out'}, " in said
    said = run(ROOT, sys.executable, "-m", "halonet.exported", str(tmp_path / "out"))
    assert said.startswith(f"{tmp_path / 'out'} is whole\n{format} of halonet_tiny, 10 classes: ")


def in_environment(name, **replaced):
    """The words that run the commands of the page for an environment, all in one shell."""
    (block,) = (it for it in BLOCKS if it.startswith(f"python -m venv {name}\n"))
    for old, new in replaced.items():
        assert old in block
        block = block.replace(old, new)
    return ["bash", "-ec", block]


WITH_PYTHON = {"PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_onnx(undisturbed, tmp_path):
    (tmp_path / "onnx_export.py").write_text(PROGRAMS["onnx_export.py"])
    words = in_environment("onnx-env", **{"runs/demo": str(undisturbed[0])})
    said = run(tmp_path, *words, **WITH_PYTHON, PYTHONPATH=str(ROOT))
    assert said.splitlines()[-1].startswith("difference ")
    assert (tmp_path / "digits.onnx").stat().st_size > 4e5


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_server(tmp_path):
    logits = exported_golden(tmp_path, "digits", "stablehlo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for file in ("service.py", "client.py"):
        (tmp_path / file).write_text(PROGRAMS[file].replace(":3000", f":{port}"))
    variables = {"JAX_PLATFORMS": "cpu", "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": ""}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            in_environment("serve-env", **{"3000": port}),
            cwd=tmp_path,
            env=os.environ | WITH_PYTHON | variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/readyz", server)
            run(tmp_path, sys.executable, "client.py")
        finally:
            os.killpg(server.pid, 15)
            server.wait()
    assert relative(np.load(tmp_path / "logits.npy"), logits) < BOUNDS["float32"]


def wait_for(url, server, seconds=600):
    for _ in range(seconds):
        assert server.poll() is None
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(1)
    raise AssertionError(f"no answer from {url} for {seconds} s")

"""Every test runs strict: eight CPU devices, warnings are errors, rank promotion raises."""

import collections
import datetime
import json
import os
import pathlib
import platform

# Before anything imports jax: the devices are made when the backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# The tests compile the same few programs again and again, in several processes.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".cache" / "xla")
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """(workdir, summary) of a run of `small_config`, for reading only."""
    # Late: most tests need neither.
    from halonet.train import train_and_evaluate
    from tests.small_run import small_config

    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    return workdir, train_and_evaluate(small_config(), workdir)


def pytest_collection_modifyitems(items):
    # Each process takes whole files: the longest goes first, and what it compiles serves others.
    items.sort(key=lambda item: item.path.name != "test_train.py")


def pytest_addoption(parser):
    parser.addoption("--record", help="write what passed and failed to this JSON file")


def pytest_configure(config):
    # Under xdist only the controller sees every report.
    if config.getoption("--record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(pathlib.Path(config.getoption("--record"))))


class Recorder:
    """Counts outcomes by test function: the record of a tier too long for every change."""

    def __init__(self, path):
        self.path = path
        self.outcomes = collections.defaultdict(collections.Counter)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.outcomes[report.nodeid.split("[")[0]][report.outcome] += 1

    def pytest_sessionfinish(self):
        record = {
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "jax": jax.__version__,
            "tests": {name: dict(self.outcomes[name]) for name in sorted(self.outcomes)},
        }
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(record, indent=2) + "\n")

"""The processes of one run: how they join, compare their settings, and wait for each other."""

import re

import jax
import pytest

from halonet import processes

LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def joined(monkeypatch):
    """The arguments with which JAX was asked to join."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    return calls


def test_alone(no_launcher, joined):
    line = "alone, on 8 cpu device(s)"
    assert processes.join_processes() == line
    assert joined == []


def test_with_a_coordinator(no_launcher, joined):
    line = processes.join_processes(coordinator="host:1234", process_id=0, process_count=2)
    assert joined == [("host:1234", 2, 0)]
    assert line.startswith("process 0 of 1 (coordinator host:1234), ")


@pytest.mark.parametrize(
    ("coordinator", "bound"),
    [
        *((address, address) for address in ("127.0.0.1:1", "localhost:1", "[::1]:1")),
        *((address, None) for address in ("host:1", "10.0.0.1:1", "127.0.0.1.example.org:1")),
    ],
)
def test_a_local_coordinator_is_local(monkeypatch, coordinator, bound):
    def initialize(*_, coordinator_bind_address, **__):
        assert coordinator_bind_address == bound

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    processes.join_processes(coordinator=coordinator, process_id=0, process_count=2)


def test_in_a_cluster(no_launcher, joined, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert "(detected from the environment)" in processes.join_processes()
    assert joined == [()]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("Unable to initialize backend 'tpu':\nno"), "initialize backend 'tpu': no$"),
        (AssertionError(), "its plugin is not installed$"),
    ],
)
def test_devices_that_are_not_there_are_one_line(no_launcher, monkeypatch, error, why):
    def device_count():
        raise error

    monkeypatch.setattr(jax, "device_count", device_count)
    with pytest.raises(processes.PlatformError, match=f"^JAX_PLATFORMS=cpu: .*{why}") as caught:
        processes.join_processes()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"coordinator": "host:1"},
        {"coordinator": "host:1", "process_id": 0},
        {"coordinator": "host:1", "process_count": 2},
        {"process_id": 0},
        {"process_count": 2},
        {"process_id": 0, "process_count": 2},
        {"coordinator": "host:1", "process_id": 2, "process_count": 2},
        {"coordinator": "host", "process_id": 0, "process_count": 2},
        {"coordinator": "host:", "process_id": 0, "process_count": 2},
        {"coordinator": ":1", "process_id": 0, "process_count": 2},
    ],
)
def test_partial_settings(joined, settings):
    given = {"coordinator": "", "process_id": -1, "process_count": 0} | settings
    message = (
        f"distributed.coordinator={given['coordinator']!r}, "
        f"distributed.process_id={given['process_id']} and "
        f"distributed.process_count={given['process_count']} go together: host:port, and an id "
        "from 0 to count - 1"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        processes.join_processes(**settings)
    assert joined == []


@pytest.mark.parametrize(
    ("environment", "size"),
    [
        ({}, 1),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "what"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "what", "OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1,t1k-2,t1k-3"}, 4),
    ],
)
def test_cluster_size(no_launcher, monkeypatch, environment, size):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._cluster_size() == size

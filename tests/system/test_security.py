"""What real processes give away, and to whom."""

import json
import os
import urllib.parse

import pytest

from launch.rehearsal import free_port
from tests.small_run import SETTINGS
from tests.system.launch import launch

SECRETS = {
    "WANDB_API_KEY": "9f2c41d07b5e8a63f1d4c2b09e7a58d36c1b4f20",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzEXAMPLEKEY",
    "HF_TOKEN": "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",
}

JOIN = """
import sys, time
from halonet import processes
processes.join_processes(coordinator=sys.argv[1], process_id=int(sys.argv[2]), process_count=2)
print("joined", flush=True)
time.sleep(60)
"""


def listeners(pid):
    """(address in hexadecimal, port) of all that a process listens on."""
    sockets = set()
    for number in os.listdir(f"/proc/{pid}/fd"):
        sockets.add(os.readlink(f"/proc/{pid}/fd/{number}"))
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}") as file:
            for line in file.read().splitlines()[1:]:
                _, local, _, state, *rest = line.split()
                if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                    address, _, port = local.partition(":")
                    found.append((address, int(port, 16)))
    return found


@pytest.mark.middle
def test_a_local_coordinator_listens_on_this_machine_alone():
    port = free_port()
    pair = [launch("-c", JOIN, f"127.0.0.1:{port}", i) for i in range(2)]
    try:
        for process in pair:
            assert "joined\n" in process.stdout
        bound = [address for address, at in listeners(pair[0].pid) if at == port]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert bound in (["0100007F"], ["0000000000000000FFFF00000100007F"])


def holding(secret, data):
    """Whether bytes hold a secret, as it is or in JSON's and URLs' ways of writing it."""
    written = (secret, json.dumps(secret)[1:-1], urllib.parse.quote(secret, safe=""))
    return any(it.encode() in data for it in written)


@pytest.mark.middle
@pytest.mark.timeout(600)
def test_no_secret_of_the_environment_is_printed_or_saved(tmp_path):
    workdir = tmp_path / "run"
    settings = {**SETTINGS, "train.steps": 4, "data.workers": 1}
    command = [
        *("main.py", "--config=configs/mnist.py", f"--workdir={workdir}"),
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]
    refused = [*command, "--config.seed=-1"]
    for arguments, code in ((command, 0), ([*command, "--mode=evaluate"], 0), (refused, 2)):
        process = launch(*arguments, environment=SECRETS)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == code, output
        assert not any(holding(it, output.encode()) for it in SECRETS.values())
    files = [path for path in workdir.rglob("*") if path.is_file()]
    found = {path.name: path.read_bytes() for path in files}
    assert {"config.json", "summary.json", "evaluation.json", "000.jsonl"} <= found.keys()
    for name, data in found.items():
        assert not any(holding(it, data) for it in SECRETS.values()), name


def test_a_secret_would_be_found():
    assert all(holding(it, f'{{"a": "b{it}"}}'.encode()) for it in SECRETS.values())
    assert not holding("secret", b"secre t")

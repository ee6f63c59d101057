"""What real processes give away, and to whom."""

import os

import pytest

from tests.system.launch import free_port, launch

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

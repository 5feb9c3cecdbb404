"""Ports of servers lie below the ephemeral range of the system, and a port that was taken is detected."""

import socket
from pathlib import Path

from sgpo_async.engines.sglang.processes import process
from sgpo_async.engines.sglang.processes.process import ServerProcess, _free_port


def test_ports_are_free_and_below_the_ephemeral_range() -> None:
    below = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {_free_port() for _ in range(50)}
    assert len(ports) > 40
    assert all(below - process.PORTS <= port < below for port in ports)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports.pop()))


def test_a_port_that_was_taken_is_detected_in_the_log_of_this_start_only(tmp_path: Path) -> None:
    server = object.__new__(ServerProcess)
    server.log = tmp_path / "server.log"
    server.log.write_bytes(b"an earlier start: address already in use\n")
    server._log_start = server.log.stat().st_size
    assert not server.port_taken
    with server.log.open("ab") as log:
        log.write(b"[Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use\n")
    assert server.port_taken

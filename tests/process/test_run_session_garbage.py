"""Garbage at the ports of a run's weight sessions: a session may end, but the run goes on and loses nothing.

A session has ports only while it begins.
"""

import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from run_support import RealRun, assert_all_trained, real_run, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
STEPS = 30
SENDER, RECEIVER = "sgpo_async.session.sender", "sgpo_async.session.receiver"


def listening(processes: list[psutil.Process]) -> list[tuple[str, int]]:
    """The addresses at which these processes accept TCP connections: of the rendezvous and of Torch RPC."""
    found = []
    for process in processes:
        with suppress(psutil.Error):  # its session has just ended
            connections = process.net_connections("tcp")
            found += [tuple(own.laddr) for own in connections if own.status == psutil.CONN_LISTEN]
    return found


def send_garbage(run: RealRun) -> int:
    """Send random bytes to every port of the weight sessions; return how many ports took them."""
    taken = 0
    for address in listening(run.processes_with(SENDER) + run.processes_with(RECEIVER)):
        with suppress(OSError), socket.create_connection(address, timeout=5) as connection:
            connection.sendall(os.urandom(2**16))
            taken += 1
    return taken


def sessions_without_ports(run: RealRun) -> int:
    """How many weight senders run, or 0 while a process of a weight session has an open port."""
    senders = run.processes_with(SENDER)
    return 0 if listening(senders + run.processes_with(RECEIVER)) else len(senders)


@pytest.mark.slow
def test_garbage_at_the_ports_of_weight_sessions_costs_no_group(tmp_path: Path) -> None:
    with real_run(tmp_path, f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0") as run:
        hub = run.hub()
        learner = run.learner("--hub", run.address())
        actors = [run.actor(name, "--own-store") for name in ("first", "second")]
        until(lambda: send_garbage(run) >= 1, "a port that takes garbage")
        until(lambda: len(run.metrics()) > 2 and len(run.status()["actors"]) == 2, "three steps with two actors")
        until(lambda: sessions_without_ports(run) == 2, "two weight sessions without an open port")
        assert learner.wait() == 0, learner.output
        assert [actor.wait() for actor in actors] == [0, 0], actors[0].output
        assert hub.wait() == 0, hub.output
        run.assert_cleaned_up()
        print("sessions begun again:", sum(actor.output.count("joining again") for actor in actors))
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
        assert_all_trained(run.summary()["ledger"], tasks=STEPS * 4, size=run.settings.rollout.size)

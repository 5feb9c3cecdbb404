"""Actors that come and go: nothing of them stays behind, and the run goes on.

`python tests/process/test_actor_churn.py [TIMES]` does it 50 times; every second actor is killed, the others leave.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_support import PATIENCE_S, RealRun, real_run, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800)]
STEPS = 100_000  # more than the test lets it train


def things(run: RealRun, hub: psutil.Process) -> dict[str, Any]:
    """What an actor could leave behind."""
    status = run.status()  # first: it opens a connection to the hub
    return {
        "processes": len(run.processes()),
        "open files and sockets of the hub": hub.num_fds(),
        "shared memory": {name for name in os.listdir("/dev/shm") if "sgpo" in name or "torch" in name},  # noqa: PTH208
        "temporary files": {name for name in os.listdir(os.environ["TMPDIR"]) if "torch" not in name},  # noqa: PTH208
        "actors in the status": [actor["name"] for actor in status["actors"]],
    }


def until_equal(current: Callable[[], dict[str, Any]], expected: dict[str, Any]) -> None:
    """Wait until both are equal; the error shows what differs."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := current()) != expected:
        differing = {key: (expected[key], found[key]) for key in expected if found[key] != expected[key]}
        assert time.monotonic() < deadline, f"before and after: {differing}"
        time.sleep(0.5)


def churn(run: RealRun, times: int) -> dict[str, Any]:
    """Start an actor so often, and end each one while it works; return the last status of the hub."""
    started = run.hub()
    address = run.address()
    run.learner("--hub", address, ranks=1)
    run.actor("stays", hub=address)
    until(run.metrics, "the first step")
    hub = psutil.Process(started.process.pid)
    before = things(run, hub)
    for number in range(times):
        actor = run.actor("guest", hub=address)  # always under the same name
        until(lambda: run.actor_row("guest").get("tokens"), "tokens of the guest")
        kind = signal.SIGKILL if number % 2 else signal.SIGTERM
        actor.process.send_signal(kind)
        assert actor.wait() == (-signal.SIGKILL if number % 2 else 0), actor.output
        until(lambda: not run.actor_row("guest"), "the end of the guest's membership")
    until_equal(lambda: things(run, hub), before)
    status = run.status()
    trained = len(run.metrics())
    until(lambda: len(run.metrics()) > trained, "the run to go on")
    return status


@pytest.mark.slow
def test_actors_that_come_and_go_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    with real_run(tmp_path, f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0") as run:
        status = churn(run, 2)
        assert status["joined"] == 3
        assert status["left"] == 2
        assert status["ledger"]["rollouts"]["dropped"].get("rejected", 0) == 0


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as folder,
        real_run(Path(folder), f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0") as long_run,
    ):
        os.environ["TMPDIR"] = tempfile.mkdtemp(dir=folder)
        times = int(sys.argv[1]) if len(sys.argv) > 1 else 50
        last = churn(long_run, times)
        print({key: last[key] for key in ("step", "joined", "left", "leases_reissued", "ledger")})

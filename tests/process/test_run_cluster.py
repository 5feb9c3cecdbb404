"""A run of separate commands, as on a cluster: one actor is killed, another joins, and a stranger sends garbage."""

import os
import time
from pathlib import Path

import msgpack
import psutil
import pytest
from run_support import PATIENCE_S, RealRun, assert_all_trained, real_run, suspended, until

from sgpo_async.transport import Dealer
from sgpo_async.wire import encode
from sgpo_async.wire.records import PROTOCOL, Heartbeat

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
STEPS = 12


def garbage(max_bytes: int) -> dict[str, list[bytes]]:
    """Invalid messages, by kind."""
    whole = [bytes(frame) for frame in encode(Heartbeat(state="serving"))]
    return {
        "malformed": [os.urandom(1000)],
        "truncated": [whole[0][:-3], *whole[1:]],
        "oversized": [whole[0], bytes(max_bytes)],
        "wrong version": [msgpack.packb(PROTOCOL + 1) + whole[0][1:], *whole[1:]],
        "empty": [b""],
        "nested": [whole[0][:1] + b"\x82\xa4kind\xa9Heartbeat\xa5state" + b"\x91" * 900 + b"\xc0"],
    }


def send_garbage(run: RealRun) -> None:
    """Send every invalid message; the hub must count one rejection for each."""
    before = run.status()["rejected"]
    messages = garbage(run.settings.hub.max_message_mb * 2**20)
    stranger = Dealer(run.address(), max_bytes=2**30)
    for message in messages.values():
        assert stranger.send(message)
    until(lambda: run.status()["rejected"] >= before + len(messages), "all rejections")
    assert run.status()["rejected"] == before + len(messages)
    stranger.close()


def kill_actor_with_a_lease(run: RealRun, name: str, process: psutil.Process) -> None:
    """Send SIGKILL to an actor while it certainly holds a lease."""

    def suspended_with_a_lease() -> bool:
        process.suspend()
        if run.actor_row(name)["leases"]:
            return True
        process.resume()
        return False

    until(suspended_with_a_lease, f"a lease of {name}")
    process.kill()


def test_a_run_continues_when_an_actor_is_killed_and_another_joins(tmp_path: Path) -> None:
    with real_run(tmp_path, f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0", "hub.max_message_mb=4") as run:
        hub = run.hub()
        learner = run.learner("--hub", run.address())
        first, second = run.actor("first", "--own-store"), run.actor("second", "--own-store")
        until(lambda: run.metrics() and run.actor_row("first"), "the first step")

        orphans = psutil.Process(first.process.pid).children(recursive=True)
        assert any("sgpo_async.session.receiver" in child.cmdline() for child in orphans)
        kill_actor_with_a_lease(run, "first", psutil.Process(first.process.pid))
        with suspended(run.processes_with("launch/learner.py", "-u")):
            psutil.wait_procs(orphans, PATIENCE_S)
            assert not any(child.is_running() for child in orphans)
            until(lambda: not run.actor_row("first"), "removal of the killed actor from the hub")
            send_garbage(run)
            third = run.actor("third")
            until(lambda: "engine ready" in third.output, "the engine of the third actor")
            ready = time.monotonic()
            until(lambda: run.actor_row("third").get("state") == "serving", "the weights of the third actor")
        until(lambda: run.actor_row("third").get("tokens"), "the first tokens of the third actor")
        print(f"the third actor generates {time.monotonic() - ready:.1f} s after its engine is ready")

        assert (learner.wait(), hub.wait(), second.wait(), third.wait()) == (0, 0, 0, 0), learner.output
        run.assert_cleaned_up()
        summary, steps = run.summary(), [line["step"] for line in run.metrics()]
        assert summary["steps"] == STEPS and steps == list(range(1, STEPS + 1))
        assert summary["leases_reissued"] >= 1 and summary["rejected"] == len(garbage(0))
        assert summary["world_size"] == 2 and summary["actors"] == 2
        assert_all_trained(summary["ledger"], tasks=STEPS * 4, size=run.settings.rollout.size)

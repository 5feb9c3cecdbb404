"""A run by separate commands, as on a cluster; one actor dies in the middle, another comes, and strangers write."""

import os
import time
from pathlib import Path

import msgpack
import psutil
import pytest
from run_support import PATIENCE_S, RealRun, assert_all_trained, paused, real_run, until

from sgpo_async.transport import Dealer
from sgpo_async.wire import encode
from sgpo_async.wire.records import PROTOCOL, Heartbeat

pytestmark = [pytest.mark.process, pytest.mark.timeout(900)]
STEPS = 12


def garbage(max_bytes: int) -> dict[str, list[bytes]]:
    """Messages that no member would send."""
    whole = [bytes(frame) for frame in encode(Heartbeat(state="serving"))]
    return {
        "malformed": [os.urandom(1000)],
        "truncated": [whole[0][:-3], *whole[1:]],
        "oversized": [whole[0], bytes(max_bytes)],
        "wrong version": [msgpack.packb(PROTOCOL + 1) + whole[0][1:], *whole[1:]],
        "empty": [b""],
    }


def write_garbage(run: RealRun) -> None:
    """Each message of a stranger is one counted rejection."""
    before = run.status()["rejected"]
    messages = garbage(run.run.hub.max_message_mb * 2**20)
    stranger = Dealer(run.address(), max_bytes=2**30)
    for message in messages.values():
        assert stranger.send(message)
    until(lambda: run.status()["rejected"] >= before + len(messages), "all rejections")
    assert run.status()["rejected"] == before + len(messages)
    stranger.close()


def die_with_a_lease(run: RealRun, name: str, process: psutil.Process) -> None:
    """kill -9, at a moment when it holds a lease for certain."""

    def caught() -> bool:
        process.suspend()
        if run.actor_row(name)["leases"]:
            return True
        process.resume()
        return False

    until(caught, "a lease to lose")
    process.kill()


def test_a_run_continues_when_an_actor_dies_and_another_joins(tmp_path: Path) -> None:
    with real_run(tmp_path, f"steps={STEPS}", "hub.address=tcp://127.0.0.1:0", "hub.max_message_mb=4") as run:
        hub = run.hub()
        learner = run.learner("--hub", run.address())
        first, second = run.actor("first"), run.actor("second")
        until(lambda: run.lines() and run.actor_row("first"), "the first step")

        orphans = psutil.Process(first.process.pid).children(recursive=True)
        assert any("sgpo_async.session.receiver" in child.cmdline() for child in orphans)
        die_with_a_lease(run, "first", psutil.Process(first.process.pid))
        with paused(run.with_words("launch/learner.py", "-u")):
            psutil.wait_procs(orphans, PATIENCE_S)
            assert not any(child.is_running() for child in orphans)
            until(lambda: not run.actor_row("first"), "the hub's giving it up")
            write_garbage(run)
            third = run.actor("third")
            until(lambda: "engine ready" in third.output, "the engine of the third actor")
            ready = time.monotonic()
            until(lambda: run.actor_row("third").get("state") == "serving", "the weights of the third actor")
        until(lambda: run.actor_row("third").get("tokens"), "its first tokens")
        print(f"the third actor contributes {time.monotonic() - ready:.1f} s after its engine is ready")

        assert (learner.ended(), hub.ended(), second.ended(), third.ended()) == (0, 0, 0, 0), learner.output
        run.assert_no_trace()
        summary, steps = run.summary(), [line["step"] for line in run.lines()]
        assert summary["steps"] == STEPS and steps == list(range(1, STEPS + 1))
        assert summary["leases_reissued"] >= 1 and summary["rejected"] == 5
        assert summary["world_size"] == 2 and summary["actors"] == 2
        assert_all_trained(summary["ledger"], tasks=STEPS * 4, size=run.run.rollout.size)

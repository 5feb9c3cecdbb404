"""Interrupts of the learner and of the hub: all ranks stop at the same step, and the learner has time to save it."""

from __future__ import annotations

import pytest
from hub_support import Driver, make_run

from sgpo_async.hub.core import CHECKPOINT_GRACE_S, INTERRUPT_GRACE_S, SILENT_S
from sgpo_async.hub.events import Interrupted, Warn
from sgpo_async.wire import records as wire

WHY = "learner rank 1 received SIGTERM"
END = "the hub received SIGINT"


def hub_of(ranks: int, *, groups: int = 0, parts: int = 1) -> Driver:
    """`ranks` ranks have joined, and the actor `b"a"` has sent `groups` groups."""
    driver = Driver(make_run(batch=2, parts=parts))
    driver.learner(ranks=ranks)
    driver.actor(b"a", credit=1)
    driver.serve_evaluation(b"a")
    driver.send(b"a", wire.Ready(tasks=2, version=0))
    for lease in driver.leases(b"a")[:groups]:
        driver.serve(b"a", lease)
    return driver


def names(ranks: int) -> list[bytes]:
    return [f"r{rank}".encode() for rank in range(ranks)]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_no_rank_gets_a_batch_that_a_stopping_rank_asks_for(first: int) -> None:
    """Whichever rank asks first, with or without a signal, and whether or not there are enough groups."""
    hub = hub_of(3, groups=1)
    order = [*names(3)[first:], *names(3)[:first]]
    for member in order:
        hub.send(member, wire.BatchRequest(step=0, stopping=WHY if member == b"r1" else ""))
    for member in order:
        assert hub.only(member, wire.NoBatch) == wire.NoBatch(step=0, reason=WHY)
        assert not hub.take(member, wire.Shard)


def test_a_batch_that_some_ranks_have_is_trained_before_all_stop() -> None:
    hub = hub_of(2, groups=2)
    for member in names(2):
        hub.send(member, wire.BatchRequest(step=0))
    hub.send(b"r1", wire.BatchRequest(step=0, stopping=WHY))  # its shard is still on the way
    assert len(hub.take(b"r1", wire.Shard)) == 2 and not hub.take(b"r1", wire.NoBatch)
    hub.send(b"r1", wire.BatchRequest(step=1, stopping=WHY))
    assert not hub.take(b"r1", wire.NoBatch), "rank 0 has not committed yet"
    hub.send(b"r0", wire.Commit(step=0))
    assert hub.only(b"r1", wire.NoBatch).step == 1
    hub.send(b"r0", wire.SnapshotRequest(step=1))
    assert hub.only(b"r0", wire.Snapshot).step == 1
    hub.send(b"r0", wire.BatchRequest(step=1))
    assert hub.only(b"r0", wire.NoBatch) == wire.NoBatch(step=1, reason=WHY)
    hub.send(b"r0", wire.BatchRequest(step=1))
    assert hub.only(b"r0", wire.NoBatch).step == 1, "a repeated request gets the same answer"
    assert hub.core.closing is None, "the hub goes on without the learner"


def test_a_step_of_which_parts_are_missing_is_given_up_when_all_ranks_wait() -> None:
    """Its groups stay in the buffer, and the next learner gets them."""
    hub = hub_of(2, groups=1, parts=2)
    for member in names(2):
        hub.send(member, wire.BatchRequest(step=0))
    before = {rollout.task for member in names(2) for rollout in hub.only(member, wire.Shard).rollouts}
    hub.send(b"r1", wire.BatchRequest(step=0, part=1, stopping=WHY))
    assert not hub.take(b"r1", wire.NoBatch), "rank 0 still trains on the first part"
    hub.send(b"r0", wire.BatchRequest(step=0, part=1))
    for member in names(2):
        assert hub.only(member, wire.NoBatch) == wire.NoBatch(step=0, reason=WHY)
    hub.send(b"r0", wire.BatchRequest(step=0, part=1))
    assert hub.only(b"r0", wire.NoBatch).step == 0, "a repeated request gets the same answer"
    assert hub.core.status()["ledger"]["buffered"] == 1
    for member in names(2):
        hub.send(member, wire.Goodbye())
    hub.learner(ranks=2)
    for member in names(2):
        hub.send(member, wire.BatchRequest(step=0))
    assert {rollout.task for member in names(2) for rollout in hub.only(member, wire.Shard).rollouts} == before


def test_the_next_learner_is_not_stopped() -> None:
    hub = hub_of(1, groups=2)
    hub.send(b"r0", wire.BatchRequest(step=0, stopping=WHY))
    hub.only(b"r0", wire.NoBatch)
    hub.send(b"r0", wire.Goodbye())
    hub.learner()
    hub.send(b"r0", wire.BatchRequest(step=0))
    assert hub.only(b"r0", wire.Shard).step == 0


def test_an_interrupted_hub_waits_until_the_learner_has_left() -> None:
    """The learner finishes its step, stops at the next one, and has its snapshot."""
    hub = hub_of(1, groups=2)
    hub.send(b"r0", wire.BatchRequest(step=0))
    hub.only(b"r0", wire.Shard)
    effects = hub.handle(Interrupted(END))
    assert [effect.text for effect in effects if isinstance(effect, Warn)] == [
        f"{END}: waiting up to 30 s until the learner has written a checkpoint; a second signal ends the hub at once"
    ]
    assert hub.only(b"r0", wire.Stop).reason == hub.only(b"a", wire.Stop).reason == END
    hub.send(b"a", wire.Goodbye())
    for _ in range(int(CHECKPOINT_GRACE_S / 2)):
        hub.send(b"r0", wire.Heartbeat())
        hub.handle(Interrupted(END))  # the loop repeats it
        hub.advance(1.0)
    assert hub.shutdown is None and not hub.take(b"r0", wire.Stop)
    hub.send(b"r0", wire.Commit(step=0))
    hub.only(b"r0", wire.Committed)
    hub.send(b"r0", wire.BatchRequest(step=1))
    assert hub.only(b"r0", wire.NoBatch) == wire.NoBatch(step=1, reason=END)
    hub.send(b"r0", wire.SnapshotRequest(step=1))
    hub.only(b"r0", wire.Snapshot)
    hub.send(b"r0", wire.Goodbye())
    assert hub.shutdown == END


def test_ranks_that_wait_for_a_batch_are_told_at_once() -> None:
    hub = hub_of(2)
    for member in names(2):
        hub.send(member, wire.BatchRequest(step=0))
    hub.handle(Interrupted(END))
    assert [hub.only(member, wire.NoBatch).reason for member in names(2)] == [END, END]


@pytest.mark.parametrize("case", ["no learner", "a silent learner", "a second signal"])
def test_an_interrupted_hub_does_not_wait_for(case: str) -> None:
    hub = Driver() if case == "no learner" else hub_of(1)
    if case == "a silent learner":
        hub.advance(SILENT_S + 0.1)
    hub.handle(Interrupted(END))
    if case == "a second signal":
        hub.advance(INTERRUPT_GRACE_S + 0.1)
        assert hub.shutdown is None
        hub.handle(Interrupted(END, at_once=True))
    else:
        assert not any(isinstance(effect, Warn) for effect in hub.effects)
        hub.advance(INTERRUPT_GRACE_S + 0.1)
    assert hub.shutdown == END


def test_an_interrupted_hub_waits_no_longer_than_its_limit() -> None:
    hub = hub_of(1)
    hub.handle(Interrupted(END))
    for _ in range(int(CHECKPOINT_GRACE_S) - 1):
        hub.advance(1.0)
        hub.send(b"r0", wire.Heartbeat())
    assert hub.shutdown is None
    hub.advance(1.1)
    assert hub.shutdown == END

"""Leases of slow actors are moved, with their tokens, when another actor has nothing to do."""

from __future__ import annotations

from hub_support import Driver, Source, make_part, make_run

from sgpo_async.hub.stragglers import KNOWN, LATE
from sgpo_async.wire import records as wire


def beat(hub: Driver, member: bytes, *, tokens: int, running: int = 3) -> None:
    """A heartbeat a second after the one before it."""
    wall = hub.now
    hub.send(member, wire.Heartbeat(version=0, running=running, tokens=tokens, busy_s=wall, wall_s=wall))


def busy_hub(*, slow_tokens: int, more_credit: int = 0) -> tuple[Driver, wire.Lease]:
    """Actor b has completed leases of two seconds and is idle; actor a samples so many tokens per second.

    Besides its lease, actor a can take `more_credit` others.
    """
    hub = Driver(make_run(batch=KNOWN + 1, max_lag=0), Source())
    hub.learner()
    hub.actor(b"b", credit=2)
    hub.serve_evaluation(b"b")
    hub.core.actors[b"b"].credit = 0
    hub.actor(b"a", credit=1)
    (lease,) = hub.leases(b"a")
    hub.send(b"b", wire.Ready(tasks=KNOWN + 1, version=0))
    for member in (b"a", b"b"):
        beat(hub, member, tokens=0)
    hub.advance(2.0)
    for done in hub.leases(b"b"):
        hub.serve(b"b", done)
    assert len(hub.core.training.leases.durations) == KNOWN
    hub.send(b"a", wire.Ready(tasks=more_credit, version=0))
    for second in range(1, int(2 * LATE) + 3):
        if slow_tokens >= 0:
            beat(hub, b"a", tokens=slow_tokens * second)
        beat(hub, b"b", tokens=90 * second)
        if second == 2:
            part = make_part(0, 0, 5)
            hub.send(b"a", wire.Progress(task=lease.task, attempt=0, purpose="train", partial=(part,)))
        hub.advance(1.0)
    return hub, lease


def test_a_late_lease_of_a_slow_actor_is_moved_with_its_tokens() -> None:
    hub, lease = busy_hub(slow_tokens=9)
    (moved,) = hub.leases(b"b")
    assert (moved.task, moved.attempt) == (lease.task, 1)
    assert [len(part.tokens) for part in moved.partial] == [5]
    assert hub.take(b"a", wire.Revoked) == [wire.Revoked(task=lease.task, attempt=0)]
    assert hub.core.status()["leases_moved"] == 1
    hub.serve(b"b", moved)
    ledger = hub.core.status()["ledger"]
    assert (ledger["buffered"], ledger["dropped"]) == (KNOWN + 1, {})


def test_a_slow_actor_keeps_the_credit_that_it_has_sent() -> None:
    """It counts the leases that it has asked for, so it would never ask for them again."""
    hub, lease = busy_hub(slow_tokens=9, more_credit=7)
    assert [moved.task for moved in hub.leases(b"b")] == [lease.task]
    assert hub.core.actors[b"a"].credit == 7


def test_a_late_lease_of_a_silent_actor_is_moved() -> None:
    hub, lease = busy_hub(slow_tokens=-1)
    assert [moved.task for moved in hub.leases(b"b")] == [lease.task]


def test_a_long_rollout_of_an_actor_as_fast_as_the_others_stays() -> None:
    hub, _ = busy_hub(slow_tokens=80)
    assert not hub.leases(b"b")
    assert hub.core.status()["leases_moved"] == 0


def test_nothing_is_moved_without_an_idle_actor() -> None:
    hub, _ = busy_hub(slow_tokens=80)
    hub.core.actors[b"b"].credit = 0
    for second in range(10):
        beat(hub, b"b", tokens=1000 + 90 * second)
        beat(hub, b"a", tokens=1000 + second)
        hub.advance(1.0)
    assert hub.core.status()["leases_moved"] == 0

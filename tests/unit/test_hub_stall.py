"""A run in which nothing moves: the hub says so once, and names who holds it up."""

from __future__ import annotations

import pytest
from hub_support import Driver, Source, make_rollout, make_run

from sgpo_async.hub.events import Warn
from sgpo_async.wire import records as wire


def wait(hub: Driver, seconds: int = 302) -> list[str]:
    """Let time pass while all members send heartbeats; return the hub's warnings."""
    before = len(hub.effects)
    for _ in range(seconds):
        for actor in list(hub.core.actors.values()):
            tasks = [n for t in hub.core._lease_tables for n in t.held_by(actor.member)]
            hub.send(actor.member, wire.Heartbeat(state="serving", version=actor.version, tasks=tasks))
        for rank in list(hub.core.learner_ranks.ranks.values()):
            hub.send(rank.member, wire.Heartbeat(state="training"))
        hub.advance(1.0)
    return [effect.text for effect in hub.effects[before:] if isinstance(effect, Warn)]


def run_of(*members: str) -> Driver:
    hub = Driver(make_run(batch=2, max_lag=0), Source(held_out=1))
    if "learner" in members:
        hub.learner(ranks=2, publish="weights" in members)
    if "actor" in members:
        hub.actor(b"a", credit=0, version=0 if "weights" in members else -1)
        hub.send(b"a", wire.Ready(tasks=1, version=0))
        hub.serve_evaluation(b"a")
    return hub


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (["actor"], "no learner is connected"),
        (["learner"], "the learner has published no weights yet"),
        (["learner", "weights"], "no actor is connected: start one with sgpo-async actor"),
        (["learner", "weights", "actor"], "leases but no tokens from a"),
    ],
    ids=str,
)
def test_the_culprit_is_named_once(members: list[str], expected: str) -> None:
    hub = run_of(*members)
    (text,) = wait(hub)
    assert text.startswith("nothing has moved for 30")
    assert expected in text
    assert hub.core.status()["stalled"] == text
    assert wait(hub) == [], "once is enough"


def with_batch() -> Driver:
    hub = run_of("learner", "weights", "actor")
    hub.send(b"a", wire.Ready(tasks=1, version=0))
    for lease in hub.leases(b"a"):
        hub.serve(b"a", lease)
    return hub


def test_a_learner_that_does_not_return_from_a_step_is_the_culprit() -> None:
    hub = with_batch()
    for rank in (b"r0", b"r1"):
        hub.send(rank, wire.BatchRequest(step=0))
    (text,) = wait(hub)
    assert "the learner has had the batch of step 0 all this time" in text


def test_a_rank_that_does_not_ask_is_the_culprit() -> None:
    hub = with_batch()
    hub.send(b"r1", wire.BatchRequest(step=0))
    (text,) = wait(hub)
    assert "no request for the batch of step 0 from rank 0 of the learner" in text


def test_an_actor_that_loads_no_weights_is_the_culprit() -> None:
    hub = run_of("learner", "weights")
    hub.actor(b"a", version=-1)
    (text,) = wait(hub)
    assert "version 0 of the weights is not loaded by a" in text


def test_a_rank_that_repeats_its_request_hears_how_long_ago_the_run_made_progress() -> None:
    hub = run_of("learner", "weights", "actor")
    hub.send(b"r0", wire.BatchRequest(step=0))
    assert hub.take(b"r0", wire.Pending) == []
    hub.send(b"r0", wire.BatchRequest(step=0))
    wait(hub, 40)
    hub.send(b"r0", wire.BatchRequest(step=0))
    soon, late = hub.take(b"r0", wire.Pending)
    assert soon.idle_s <= 2.0
    assert 38.0 <= late.idle_s <= 42.0


def test_a_run_that_moves_again_is_no_longer_stalled() -> None:
    hub = run_of("learner", "weights", "actor")
    assert wait(hub)
    (lease,) = hub.leases(b"a")
    hub.send(b"a", make_rollout(lease, 0))
    hub.advance(2.0)
    assert hub.core.status()["stalled"] == ""
    assert len(wait(hub)) == 1

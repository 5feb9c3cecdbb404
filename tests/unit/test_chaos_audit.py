"""The audit accepts every history that the hub can have, and finds what is doctored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hub_support import Driver, Source, make_run, train_one_step
from test_hub_random import World

from sgpo_async.chaos.audit import Audit, Observed, observe
from sgpo_async.hub import events as ev
from sgpo_async.wire import records as wire


def observing(driver: type[Driver]) -> type[Driver]:
    """A driver that keeps what there is to see after every event."""

    class Observing(driver):
        seen: list[Observed]

        def _handle(self, event):
            effects = super()._handle(event)
            self.__dict__.setdefault("seen", [])
            self.seen.append(observe(self.core, event, effects, number=len(self.seen), at=self.now))
            return effects

    return Observing


def audited(run: Any, seen: list[Observed]) -> Audit:
    audit = Audit(run)
    for observed in seen:
        audit.see(observed)
    return audit


@pytest.mark.parametrize("seed", range(12))
def test_it_finds_nothing_in_any_history_of_the_hub(seed: int) -> None:
    rng = Random(seed)
    shape = {"batch": rng.randint(2, 4), "max_lag": rng.randint(0, 3), "ranks": rng.randint(1, 2)}
    world = observing(World)(Random(seed), parts=rng.randint(1, 2), stale=rng.choice(["drop", "mask"]), **shape)
    world.start_learner()
    for _ in range(250):
        world.act()
    world.finish()
    world.close()
    audit = audited(world.run, world.seen)
    assert not audit.violations
    assert audit.copy.step == world.run.steps and audit.counts["commits"] >= world.run.steps


@pytest.fixture
def run_of_two_steps() -> Driver:
    driver = observing(Driver)(make_run(steps=2), Source(held_out=0))
    driver.learner()
    driver.actor(b"a")
    for step in range(2):
        train_one_step(driver, step=step)
    return driver


def lines_of(driver: Driver) -> list[dict[str, Any]]:
    """The metrics of the run, with the ledgers that the hub has told."""
    sent = [effect.message for effect in driver.effects if isinstance(effect, ev.Send)]
    told = [message for message in sent if isinstance(message, wire.Committed)]
    return [{"step": one.step + 1, "ledger": one.status["ledger"]} for one in told]


def end(driver: Driver, seen: list[Observed]) -> list[str]:
    return audited(driver.run, seen).end(lines_of(driver), {"ledger": driver.core.status()["ledger"]})


def without(kind: type) -> Callable[[Observed], Observed]:
    """Forge: as if the hub had not sent the messages of this kind."""

    def forged(observed: Observed) -> Observed:
        return replace(observed, effects=[one for one in observed.effects if not _sends(one, kind)])

    return forged


def twice(kind: type) -> Callable[[Observed], Observed]:
    def forged(observed: Observed) -> Observed:
        again = [one for one in observed.effects if _sends(one, kind)]
        return replace(observed, effects=[*observed.effects, *again])

    return forged


def _sends(effect: ev.Effect, kind: type) -> bool:
    return isinstance(effect, ev.Send) and isinstance(effect.message, kind)


def earlier_version(observed: Observed) -> Observed:
    """Forge: the second batch has the version of before the first."""
    shards = [one for one in observed.effects if _sends(one, wire.Shard) and one.message.step == 1]
    old = [replace(one, message=replace(one.message, version=-5)) for one in shards]
    return replace(observed, effects=[*(one for one in observed.effects if one not in shards), *old])


def test_it_accepts_the_true_run(run_of_two_steps: Driver) -> None:
    assert end(run_of_two_steps, run_of_two_steps.seen) == []


@pytest.mark.parametrize(
    ("forge", "found"),
    [
        (without(wire.Lease), "runs without a lease"),
        (without(wire.Ack), "ended without a word"),
        (without(wire.Shard), "step 0 has the tasks []"),
        (without(wire.Committed), "the ledger counts"),
        (twice(wire.Lease), "is leased again"),
        (earlier_version, "a batch has version -5 after 0"),
        (lambda one: replace(one, ledger=one.ledger | {"trained": 0}), "the ledger counts"),
        (lambda one: replace(one, waiting=frozenset(), running={}, complete=frozenset()), "has dropped {} more"),
        (lambda one: replace(one, event=ev.Tick()), "was never received"),
    ],
    ids=["lease", "ack", "shard", "commit", "twice", "version", "ledger", "lost", "received"],
)
def test_it_finds_a_forgery(run_of_two_steps: Driver, forge: Callable[[Observed], Observed], found: str) -> None:
    lines = end(run_of_two_steps, [forge(one) for one in run_of_two_steps.seen])
    assert any(found in line for line in lines), lines


def test_it_finds_a_group_that_is_trained_twice(run_of_two_steps: Driver) -> None:
    """The second commit is answered with the batch of the first one."""
    seen = run_of_two_steps.seen
    first = next(one for observed in seen for one in observed.effects if _sends(one, wire.Shard))
    forged = [
        replace(
            observed,
            effects=[
                replace(one, message=replace(one.message, rollouts=first.message.rollouts))
                if _sends(one, wire.Shard)
                else one
                for one in observed.effects
            ],
        )
        for observed in seen
    ]
    assert any("although it is trained" in line for line in end(run_of_two_steps, forged))


def test_it_finds_a_journal_that_lacks_an_event(run_of_two_steps: Driver) -> None:
    """A replay without one rollout has another ledger than the run has told its learner."""
    log = run_of_two_steps.log
    rollout = next(n for n, (event, _) in enumerate(log) if isinstance(getattr(event, "message", None), wire.Rollout))
    again = observing(Driver)(run_of_two_steps.run, Source(held_out=0))
    for event, now in [*log[:rollout], *log[rollout + 1 :]]:
        again.now = now
        again._handle(event)
    lines = audited(again.run, again.seen).end(
        lines_of(run_of_two_steps), {"ledger": run_of_two_steps.core.status()["ledger"]}
    )
    assert any("has a ledger that the journal does not have" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda lines: lines[:1], "must have the steps 1 to 2 once each, got [1]"),
        (lambda lines: [lines[0], *lines], "got [1, 1, 2]"),
        (lambda lines: [lines[0], lines[1] | {"ledger": lines[0]["ledger"]}], "step 2 has a ledger that the journal"),
    ],
)
def test_it_finds_metrics_of_another_run(run_of_two_steps: Driver, change: Callable, found: str) -> None:
    audit = audited(run_of_two_steps.run, run_of_two_steps.seen)
    lines = audit.end(change(lines_of(run_of_two_steps)), {"ledger": run_of_two_steps.core.status()["ledger"]})
    assert any(found in line for line in lines)

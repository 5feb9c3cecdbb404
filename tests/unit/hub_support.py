"""Test support for HubCore: problems, rollouts, and a driver that plays the network and the members."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sgpo_async.config.schema import Evaluation, Hub, Learner, Local, Rollout, Run
from sgpo_async.hub import HubCore
from sgpo_async.hub.events import CloseSender, Effect, Event, OpenSender, Received, Send, SenderUp, Shutdown, Tick
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.wire import records as wire


class Source:
    """Problems whose text contains their position; those at multiples of `without_strategy_every` have no strategy."""

    verifier = "exact"

    def __init__(self, held_out: int = 2, without_strategy_every: int = 0) -> None:
        self._held_out = [self._problem(f"held-out {i}", i) for i in range(held_out)]
        self._without_strategy_every = without_strategy_every

    def training(self, position: int) -> Problem:
        every = self._without_strategy_every
        return self._problem(f"training {position}", position, strategy=not every or position % every != 0)

    def held_out(self) -> list[Problem]:
        return self._held_out

    def _problem(self, text: str, number: int, *, strategy: bool = True) -> Problem:
        return Problem(id=text, problem=text, answer=str(number), strategy=f"how to {text}" if strategy else None)


def make_run(
    *,
    batch: int = 2,
    parts: int = 1,
    max_lag: int = 1,
    steps: int = 5,
    autonomous: int = 2,
    guided: int = 1,
    share: float = 1.0,
    **hub: Any,
) -> Run:
    return Run(
        steps=steps,
        rollout=Rollout(autonomous=autonomous, guided=guided),
        learner=Learner(problems_per_step=batch, parts=parts, batch_timeout_s=60),
        hub=Hub(max_lag=max_lag, heartbeat_s=1, lease_timeout_s=20, **{"stale": "drop"} | hub),
        evaluation=Evaluation(samples=1, share=share),
        local=Local(ranks=1),
    )


def make_rollout(lease: wire.Lease, slot: int, *, versions: tuple[int, ...] = (0,), **changes) -> wire.Rollout:
    """A rollout for `slot` of `lease`, as an actor sends it; each version in `versions` has two tokens."""
    spans = len(versions)
    fields = {
        "task": lease.task,
        "attempt": lease.attempt,
        "slot": slot,
        "purpose": lease.purpose,
        "guided": slot >= lease.autonomous,
        "prompt": np.arange(3, dtype=np.int32),
        "tokens": np.arange(2 * spans, dtype=np.int32),
        "logprobs": np.full(2 * spans, -1.0, np.float32),
        "versions": np.array(versions, np.int32),
        "digests": np.zeros(spans, np.int64),
        "ends": np.arange(2, 2 * spans + 1, 2, dtype=np.int32),
        "reward": 1.0,
        "finish": "stop",
    }
    made = wire.Rollout(**{**fields, **changes})
    scored = lease.unguided_scores and made.guided and made.reward == 1.0 and made.purpose == "train"
    needs_unguided_logprob = scored and made.unguided_logprob is None
    return replace(made, unguided_logprob=-1.0) if needs_unguided_logprob else made


def make_part(slot: int, start: int, tokens: int, version: int = 0) -> wire.PartialRollout:
    """`tokens` tokens of an unfinished rollout, from position `start` on."""
    return wire.PartialRollout(
        slot=slot,
        start=start,
        tokens=np.arange(start, start + tokens, dtype=np.int32),
        logprobs=np.full(tokens, -0.5, np.float32),
        versions=np.array([version], np.int32),
        digests=np.zeros(1, np.int64),
        ends=np.array([tokens], np.int32),
    )


class Driver:
    """A hub core, its clock, and an inbox for each process that it sends messages to."""

    def __init__(
        self,
        run: Run | None = None,
        source: Source | None = None,
        benchmarks: Sequence[Benchmark] = (),
        run_id: str = "",
    ) -> None:
        self.run = run or make_run()
        self.core = HubCore(self.run, source or Source(), benchmarks=benchmarks, store="/store", run_id=run_id)
        self.now = 0.0
        self.inbox: dict[bytes, list[wire.Message]] = defaultdict(list)
        self.log: list[tuple[Event, float]] = []
        self.effects: list[Effect] = []
        self.shutdown: str | None = None

    def handle(self, event: Event) -> list[Effect]:
        """Give the core an event. After a Commit, rank 0 publishes the new version, as a learner does at once."""
        effects = self._handle(event)
        match event:
            case Received(member, wire.Commit()) if 0 <= self.core.published < self.core.training.version:
                self._handle(Received(member, wire.Published(version=self.core.training.version)))
        return effects

    def _handle(self, event: Event) -> list[Effect]:
        self.log.append((event, self.now))
        effects = self.core.handle(event, self.now)
        self.core.check_ledgers()
        self.effects += effects
        self.deliver(effects)
        return effects

    def deliver(self, effects: Sequence[Effect]) -> None:
        """Carry out what the core has decided."""
        for effect in effects:
            match effect:
                case Send(member, message):
                    self.inbox[member].append(message)
                case Shutdown(reason):
                    self.shutdown = reason

    def send(self, member: bytes, message: wire.Message) -> list[Effect]:
        return self.handle(Received(member, message))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.handle(Tick())

    def take(self, member: bytes, kind: type) -> list:
        """Remove the messages of `kind` from the inbox of `member` and return them."""
        found = [message for message in self.inbox[member] if isinstance(message, kind)]
        self.inbox[member] = [message for message in self.inbox[member] if not isinstance(message, kind)]
        return found

    def only(self, member: bytes, kind: type):
        """Like `take`, for exactly one message."""
        found = self.take(member, kind)
        assert len(found) == 1, (found, self.inbox[member])
        return found[0]

    # what the members do

    def actor(self, member: bytes, *, credit: int = 0, version: int = 0) -> None:
        """An actor joins that serves `version` and can take `credit` leases."""
        effects = self.send(member, wire.Hello(role="actor", name=member.decode()))
        assert OpenSender(member, member.decode()) in effects
        self.handle(SenderUp(member, "127.0.0.1", 4000))
        self.send(member, wire.Ready(tasks=credit, version=version))

    def learner(self, *, ranks: int = 1, publish: bool = True) -> None:
        """A learner world with ranks `b"r0"`, `b"r1"`, ... joins; rank 0 publishes the version of its Welcome."""
        for rank in range(ranks):
            name = f"r{rank}"
            hello = wire.Hello(role="learner", name=name, rank=rank, world_size=ranks)
            self.send(name.encode(), hello)
        if publish:
            welcome = self.take(b"r0", wire.Welcome)[-1]
            self.send(b"r0", wire.Published(version=welcome.version))

    def serve(self, member: bytes, lease: wire.Lease, *, versions: tuple[int, ...] | None = None, **changes) -> None:
        """The actor sends all rollouts of a lease, sampled by `versions` or else by the lowest allowed version."""
        for slot in range(lease.autonomous + lease.guided):
            chosen = versions or (max(lease.min_version, 0),)
            self.send(member, make_rollout(lease, slot, versions=chosen, **changes))

    def serve_evaluation(self, member: bytes) -> None:
        """The actor serves evaluation leases until there are none; after each of them it sends a credit of 1."""
        while leases := self.leases(member, "evaluate"):
            for lease in leases:
                self.serve(member, lease, versions=(self.core.training.version,))
                self.send(member, wire.Ready(tasks=1, version=self.core.training.version))

    def leases(self, member: bytes, purpose: str = "train") -> list[wire.Lease]:
        """New leases of `purpose`; leases of the other purpose stay in the inbox."""
        leases = self.take(member, wire.Lease)
        self.inbox[member] += [lease for lease in leases if lease.purpose != purpose]
        return [lease for lease in leases if lease.purpose == purpose]

    @property
    def senders_closed(self) -> list[bytes]:
        return [effect.member for effect in self.effects if isinstance(effect, CloseSender)]


def train_one_step(driver: Driver, *, step: int = 0) -> wire.Committed:
    """The actor `b"a"` serves a batch, and rank 0 trains on it and commits it."""
    batch = driver.run.learner.problems_per_step
    driver.send(b"a", wire.Ready(tasks=batch, version=driver.core.training.version))
    for lease in driver.leases(b"a"):
        driver.serve(b"a", lease)
    driver.send(b"r0", wire.BatchRequest(step=step))
    driver.only(b"r0", wire.Shard)
    driver.send(b"r0", wire.Commit(step=step))
    committed = driver.only(b"r0", wire.Committed)
    driver.send(b"r0", wire.Published(version=driver.core.training.version))
    return committed

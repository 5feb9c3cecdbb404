"""The hub under random sequences of events: joins, losses, duplicates, late rollouts, crashes, snapshots, restores.

The hub itself is killed at random as well, and goes on from its journal. A model of the members runs beside the core
and checks after every event that both ledgers balance and that the core never breaks a rule.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hub_support import Driver, Source, make_part, make_rollout, make_run
from hypothesis import example, given, settings

from sgpo_async.hub import HubCore
from sgpo_async.hub.core import FAIR_S, RETURN_S
from sgpo_async.hub.events import Effect, Event, HubRestarted, Received, Rejected, SenderDown, SenderUp
from sgpo_async.hub.journal import Journal
from sgpo_async.hub.recovery import recover, save, write_event
from sgpo_async.wire import encode
from sgpo_async.wire import records as wire


class World(Driver):
    """Correct members whose actions `rng` draws at random, and an unreliable network."""

    def __init__(
        self, rng: Random, *, batch: int, max_lag: int, ranks: int, parts: int = 1, steps: int = 6, **hub: Any
    ) -> None:
        self.source = Source(held_out=3, without_strategy_every=4)
        if extra := hub.pop("extra_batches", 0):
            hub["batches_in_flight"] = max_lag + 1 + extra
        run = make_run(batch=batch, parts=parts, max_lag=max_lag, steps=steps, **hub)
        super().__init__(run, self.source)
        self.parts = parts
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.journal = Journal(Path(self.folder.name))
        self.core, _ = recover(self.core, self.journal)
        self.kills = 0
        self.rng_saves = Random(rng.random())
        self.rng, self.ranks = rng, ranks
        self.live: list[bytes] = []  # actors
        self.actors_started = self.worlds = 0  # numbers of actors and of learner worlds so far
        self.granted: dict[bytes, int] = {}
        self.held: dict[bytes, dict[tuple[int, int], tuple[wire.Lease, list[int]]]] = {}
        self.version_of: dict[bytes, int] = {}
        self.issued: set[tuple[int, int]] = set()
        self.sampled: dict[tuple[int, int, int], int] = {}  # tokens that the hub knows, by (task, attempt, slot)
        self.reported: dict[tuple[int, int], int] = {}  # most tokens ever reported, by (task, slot)
        self.sent: list[tuple[bytes, wire.Rollout]] = []
        self.learner_step = 0
        self.shards: dict[tuple[int, int], wire.Shard] = {}  # of the present step, by rank and part
        self.trained: set[int] = set()
        self.checkpoint: tuple[int, bytes, set[int]] = (0, b"", set())
        self.newest = -1
        self.first_version = 0  # lowest version since the last restore

    def handle(self, event: Event) -> list[Effect]:
        frames = encode(event.message) if isinstance(event, Received) else []
        write_event(self.journal, event, at=self.now, frames=frames)
        if self.rng_saves.random() < 0.02:
            self.journal.commit()
            effects = super().handle(event)
            save(self.core, self.journal)
        else:
            effects = super().handle(event)
        if isinstance(event, Received) and isinstance(event.message, wire.Rollout) and not self.core.closing:
            self.check_rules_are_applied()
        return effects

    def check_rules_are_applied(self) -> None:
        """After most rollouts, the core does not apply its rules: they must have nothing to do.

        Soon after a publication they may have: what is kept for other actors depends on which weights a task needs.
        """
        if self.core.now - self.core.published_at > FAIR_S:
            self.core._effects = []
            self.core._apply_rules()
            assert not self.core._effects

    def close(self) -> None:
        self.journal.close()
        self.folder.cleanup()

    # one random action

    ACTIONS = (
        ("rollout", 60), ("ready", 12), ("new_actor", 3), ("lose_actor", 1), ("duplicate", 3), ("release", 2),
        ("report", 8), ("break_connection", 2), ("kill_hub", 1.5), ("load", 10), ("invalid_messages", 0.5), ("tick", 4),
        ("silence", 0.5), ("request_batch", 20), ("commit", 12), ("crash", 0.7), ("snapshot", 2), ("evaluate", 0.3),
        ("early_leaver", 0.5),
    )  # fmt: skip

    def act(self) -> None:
        names, weights = zip(*self.ACTIONS, strict=True)
        getattr(self, self.rng.choices(names, weights)[0])()
        self.check_inboxes()

    def check_inboxes(self) -> None:
        """Read all inboxes and check the messages."""
        for member in self.live:
            self.read(member)
        for rank in range(self.ranks):
            for shard in self.take(self.rank(rank), wire.Shard):
                self.check_shard(shard)
                self.shards[rank, shard.part] = shard
        training = self.core.training
        assert training.leases.live <= self.run.hub.most_batches * self.run.learner.problems_per_step
        assert training.version >= self.newest
        self.newest = training.version

    def read(self, member: bytes) -> None:
        """An actor takes the hub's leases and revocations, in order."""
        messages = [m for m in self.inbox[member] if isinstance(m, wire.Lease | wire.Revoked)]
        self.inbox[member] = [m for m in self.inbox[member] if not isinstance(m, wire.Lease | wire.Revoked)]
        for message in messages:
            if isinstance(message, wire.Revoked):
                self.held[member].pop((message.task, message.attempt), None)
                continue
            self.check_lease(member, message)
            slots = sorted(set(range(message.autonomous + message.guided)) - set(message.finished.tolist()))
            self.rng.shuffle(slots)
            self.held[member][message.task, message.attempt] = (message, slots)
            self.sampled |= {(message.task, message.attempt, part.slot): len(part.tokens) for part in message.partial}

    def check_lease(self, member: bytes, lease: wire.Lease) -> None:
        assert (lease.task, lease.attempt) not in self.issued, "the same attempt was leased twice"
        self.issued.add((lease.task, lease.attempt))
        self.granted[member] -= 1
        assert self.granted[member] >= 0, "more leases than credit"
        assert self.version_of[member] >= lease.min_version
        assert lease.min_version >= self.first_version, "the lease admits tokens from before the restore"
        assert (lease.strategy is None) == (lease.guided == 0)
        size = lease.autonomous + lease.guided
        assert len(lease.finished) < size
        unfinished = set(range(size)) - set(lease.finished.tolist())
        for part in lease.partial:
            assert part.slot in unfinished
            assert part.versions.min() >= lease.min_version or self.run.hub.stale != "drop"
            assert len(part.tokens) <= self.reported.get((lease.task, part.slot), 0), "tokens that nobody reported"

    def check_shard(self, shard: wire.Shard) -> None:
        assert shard.problems == self.run.learner.problems_per_step
        assert shard.rollouts or self.run.learner.problems_per_step < self.ranks * self.parts, "a rank without groups"
        for rollout in shard.rollouts:
            assert rollout.versions.max() <= shard.version
            assert self.run.hub.stale != "drop" or shard.version - rollout.oldest_version <= self.run.hub.max_lag

    # actors

    def new_actor(self) -> None:
        if len(self.live) == 4:
            return
        member = b"actor-%d" % self.actors_started
        self.actors_started += 1
        self.live.append(member)
        self.held[member], self.granted[member] = {}, 0
        self.send(member, wire.Hello(role="actor", name=member.decode()))
        self.handle(SenderUp(member, "127.0.0.1", 4000))
        self.version_of[member] = self.core.published
        if self.core.published >= 0:
            self.ready(member)

    def ready(self, member: bytes | None = None) -> None:
        member = member or self.some_actor()
        if member and self.version_of[member] >= 0:
            tasks = self.rng.randint(0, 4)
            self.granted[member] += tasks
            self.send(member, wire.Ready(tasks=tasks, version=self.version_of[member]))

    def load(self) -> None:
        """An actor loads the newest weights."""
        member = self.some_actor()
        if member and self.core.published >= 0:
            self.version_of[member] = self.core.published
            self.heartbeat(member)

    def heartbeat(self, member: bytes) -> None:
        self.send(member, wire.Heartbeat(state="serving", version=self.version_of[member]))

    def some_actor(self) -> bytes | None:
        return self.rng.choice(self.live) if self.live else None

    def rollout(self) -> None:
        """An actor finishes some rollouts of its leases, perhaps also of leases that it has lost."""
        member = self.some_actor()
        for _ in range(self.rng.randint(1, 5)):
            if member and self.held[member]:
                self.finish_rollout(member)

    def finish_rollout(self, member: bytes) -> None:
        key = self.rng.choice(list(self.held[member]))
        lease, slots = self.held[member][key]
        newest = self.version_of[member]
        versions = sorted(self.rng.randint(lease.min_version, newest) for _ in range(self.rng.randint(1, 2)))
        made = make_rollout(lease, slots.pop(), versions=tuple(versions), reward=float(self.rng.randint(0, 1)))
        if not slots:
            del self.held[member][key]
        self.sent.append((member, made))
        self.send(member, made)
        assert self.take(member, wire.Ack)[-1].slot == made.slot

    def duplicate(self) -> None:
        """An earlier rollout arrives again, perhaps from another member."""
        if self.sent:
            member, rollout = self.rng.choice(self.sent)
            self.send(self.rng.choice([member, b"non-member"]), rollout)

    def report(self) -> None:
        """An actor reports what some of its running rollouts have sampled."""
        member = self.some_actor()
        if not member or not self.held[member]:
            return
        (task, attempt), (lease, slots) = self.rng.choice(list(self.held[member].items()))
        parts = []
        for slot in self.rng.sample(slots, self.rng.randint(1, len(slots))):
            start, count = self.sampled.get((task, attempt, slot), 0), self.rng.randint(1, 3)
            self.sampled[task, attempt, slot] = start + count
            self.reported[task, slot] = max(self.reported.get((task, slot), 0), start + count)
            version = self.rng.randint(max(lease.min_version, 0), self.version_of[member])
            parts.append(make_part(slot, start, count, version))
        report = wire.Progress(task=task, attempt=attempt, purpose=lease.purpose, partial=tuple(parts))
        self.send(member, report)

    def break_connection(self) -> None:
        """An actor loses messages of both directions, and says Hello again; some of its leases are lost on the way."""
        member = self.some_actor()
        if member:
            if self.rng.random() < 0.5:
                self.handle(SenderDown(member, "connection lost"))
            self.come_back(member)

    def come_back(self, member: bytes) -> None:
        self.read(member)
        for key in self.rng.sample(list(self.held[member]), len(self.held[member]) // 3):
            del self.held[member][key]
        self.granted[member] = 0
        holds = np.array(list(self.held[member]), np.int32).reshape(-1)
        self.send(member, wire.Hello(role="actor", name=member.decode(), holds=holds))
        self.handle(SenderUp(member, "127.0.0.1", 4000))
        self.read(member)
        if (b"", member.decode()) in self.core.quarantined:  # after invalid messages; it ends
            self.live = [one for one in self.live if one != member]
            self.held[member].clear()
            return
        leased = {
            (number, lease.attempt)
            for table in (self.core.training.leases, self.core.evaluation.leases)
            for number, lease in table.running.items()
            if lease.member == member
        }
        assert set(self.held[member]) == leased, "the hub and the actor disagree about its leases"

    def kill_hub(self) -> None:
        """The hub is killed between two events; the next process goes on from its journal, and the actors come back."""
        self.journal.commit()
        self.restart_hub()

    def restart_hub(self) -> None:
        core = HubCore(self.run, self.source, store="/store")
        self.core, _ = recover(core, self.journal)
        self.handle(HubRestarted())
        self.kills += 1
        for member in self.rng.sample(self.live, len(self.live)):
            self.come_back(member)

    def release(self) -> None:
        member = self.some_actor()
        if member and self.held[member]:
            task, attempt = self.rng.choice(list(self.held[member]))
            del self.held[member][task, attempt]
            self.granted[member] = 0
            self.send(member, wire.Release(task=task, attempt=attempt, reason="drains"))

    def lose_actor(self) -> None:
        member = self.some_actor()
        if member:
            self.live.remove(member)
            if self.rng.random() < 0.5:
                self.handle(SenderDown(member, "killed"))
                self.advance(RETURN_S + 0.1)
            else:
                self.send(member, wire.Goodbye())

    def silence(self) -> None:
        """Some actors send nothing until they time out."""
        silent = [member for member in self.live if self.rng.random() < 0.3]
        self.now += self.run.hub.lease_timeout_s + 1
        for member in self.live:
            if member not in silent:
                self.heartbeat(member)
        self.live = [member for member in self.live if member not in silent]
        self.advance(0.1)
        self.check_lost(silent)

    def check_lost(self, silent: list[bytes]) -> None:
        for member in silent:
            assert member in self.senders_closed

    def invalid_messages(self) -> None:
        self.handle(Rejected(b"non-member", "not MessagePack"))
        self.send(b"non-member", wire.Commit(step=0))
        if member := self.some_actor():
            self.send(member, wire.Commit(step=self.core.training.step))
            self.send(member, wire.Release(task=10**6, attempt=0, reason=""))
            self.read(member)  # leases that the hub gave before the Release took their credit
            self.granted[member] = 0

    def tick(self) -> None:
        self.advance(self.rng.choice([0.1, 1.0, 3.0]))

    # the learner

    def rank(self, rank: int) -> bytes:
        return b"rank-%d-of-world-%d" % (rank, self.worlds)

    @property
    def learning(self) -> bool:
        return self.core.learner_ranks.rank_of(self.rank(0)) == 0

    def crash(self) -> None:
        """The learner ends, with or without a Goodbye, and resumes from its last checkpoint."""
        if self.learning and self.rng.random() < 0.5:
            for rank in range(self.ranks):
                self.send(self.rank(rank), wire.Goodbye())
        self.start_learner()

    def start_learner(self) -> None:
        self.worlds += 1
        self.shards = {}
        self.learner_step, state, trained = self.checkpoint
        for rank in self.rng.sample(range(self.ranks), self.ranks):
            name = f"learner-{self.worlds}-{rank}"
            hello = wire.Hello(role="learner", name=name, rank=rank, world_size=self.ranks)
            self.send(self.rank(rank), hello)
        version = self.only(self.rank(0), wire.Welcome).version
        if self.learner_step != self.core.training.step:
            self.trained = set(trained)
            before = self.core.training.version
            self.send(self.rank(0), wire.Restore(state=state, id=f"restore {self.worlds}"))
            version = self.only(self.rank(0), wire.Restored).version
            assert version > before
            self.first_version = version
        self.send(self.rank(0), wire.Published(version=version))

    def request_batch(self) -> None:
        """One rank requests its next shard; sometimes an earlier one, in a repeated request that arrives late."""
        if self.learning and self.core.training.step < self.run.steps:
            rank = self.rng.randrange(self.ranks)
            part = self.next_part(rank) if self.rng.random() < 0.8 else self.rng.randint(0, self.next_part(rank))
            self.send(self.rank(rank), wire.BatchRequest(step=self.learner_step, part=part))

    def next_part(self, rank: int) -> int:
        """The first part that a rank has not received; when it has all, the last, which it may request again."""
        return min(sum(held == rank for held, _ in self.shards), self.parts - 1)

    def early_leaver(self) -> None:
        """Rank 1 says Goodbye before rank 0 commits the step."""
        if self.learning and self.ranks > 1 and len(self.shards) == self.ranks * self.parts:
            self.send(self.rank(1), wire.Goodbye())
            self.commit()

    def commit(self) -> None:
        if not self.learning or len(self.shards) < self.ranks * self.parts:
            return
        tasks = self.batch_tasks()
        assert not tasks & self.trained, "a task was trained twice"
        self.send(self.rank(0), wire.Commit(step=self.learner_step))
        committed = self.only(self.rank(0), wire.Committed)
        assert committed.status["lag"]["max"] <= self.run.hub.max_lag or self.run.hub.stale != "drop"
        self.trained |= tasks
        self.shards, self.learner_step = {}, self.learner_step + 1
        self.send(self.rank(0), wire.Published(version=self.core.training.version))

    def batch_tasks(self) -> set[int]:
        """Task numbers of the batch; checks that each group is complete and on one rank."""
        seen: dict[int, int] = {}
        for shard in self.shards.values():
            numbers = [rollout.task for rollout in shard.rollouts]
            assert numbers == sorted(numbers)
            for number in dict.fromkeys(numbers):
                group = [rollout for rollout in shard.rollouts if rollout.task == number]
                assert number not in seen
                assert [rollout.slot for rollout in group] == list(range(2 if number % 4 == 0 else 3))
                seen[number] = len(group)
        assert len(seen) == self.run.learner.problems_per_step
        return set(seen)

    def snapshot(self) -> None:
        if self.learning:
            self.send(self.rank(0), wire.SnapshotRequest(step=self.learner_step))
            state = self.only(self.rank(0), wire.Snapshot).state
            self.checkpoint = (self.learner_step, state, set(self.trained))

    def evaluate(self) -> None:
        if self.learning:
            self.send(self.rank(0), wire.Evaluate(version=self.core.training.version))

    # without faults

    def finish(self) -> None:
        """Without further faults, one new actor and a new learner finish the run."""
        for member in self.live:
            self.send(member, wire.Goodbye())
        self.live = []
        self.start_learner()
        self.new_actor()
        (member,) = self.live
        for _ in range(2000):
            if self.core.training.step == self.run.steps and self.core.evaluation.current is None:
                return
            self.version_of[member] = self.core.published
            self.granted[member] += 1
            self.send(member, wire.Ready(tasks=1, version=self.core.published))
            self.check_inboxes()
            while self.held[member]:
                self.finish_rollout(member)
            for rank in range(self.ranks):
                if self.core.training.step < self.run.steps:
                    request = wire.BatchRequest(step=self.learner_step, part=self.next_part(rank))
                    self.send(self.rank(rank), request)
            self.check_inboxes()
            self.commit()
        raise AssertionError(f"stuck: {self.core.status()}")


CASES = {
    "batch": st.integers(2, 4),
    "max_lag": st.integers(0, 3),
    "ranks": st.integers(1, 2),
    "parts": st.integers(1, 2),
    "stale": st.sampled_from(["drop", "mask", "correct"]),
    "batch_from": st.sampled_from(["complete", "begun"]),
    "share": st.sampled_from([0.3, 1.0]),
    "extra_batches": st.integers(0, 2),
    "seed": st.integers(0, 2**32),
    "length": st.integers(1, 400),
}


def history(seed: int, length: int, **shape: Any) -> World:
    world = World(Random(seed), **shape)
    world.start_learner()
    for _ in range(length):
        world.act()
    return world


@settings(max_examples=120, deadline=None)
@given(**CASES)
def test_after_any_history_the_ledgers_balance_and_the_run_can_be_finished(seed, length, **shape):
    world = history(seed, length, **shape)
    world.finish()
    world.close()
    ledger = world.core.status()["ledger"]
    batch = world.run.learner.problems_per_step
    assert (ledger["trained"], ledger["in_flight"], ledger["buffered"]) == (world.run.steps * batch, 0, 0)
    assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values())


@settings(max_examples=30, deadline=None)
@given(**CASES)
# Here leases are on their way while an actor sends invalid messages.
@example(
    seed=26012, length=282, batch=4, max_lag=1, ranks=1, parts=1, stale="drop", batch_from="complete", share=0.3,
    extra_batches=0,
)  # fmt: skip
# A status must not change after it was sent: here an actor is quarantined later.
@example(
    seed=253, length=235, batch=2, max_lag=1, ranks=1, parts=1, stale="drop", batch_from="complete", share=0.3,
    extra_batches=0,
)  # fmt: skip
def test_the_same_events_give_the_same_effects(seed, length, **shape):
    world = history(seed, length, **shape)
    world.close()
    again = HubCore(world.run, Source(held_out=3, without_strategy_every=4), store="/store")
    effects = [effect for event, now in world.log for effect in again.handle(event, now)]
    assert repr(effects) == repr(world.effects)


def is_lease(effect: Effect) -> bool:
    return isinstance(getattr(effect, "message", None), wire.Lease)


def test_the_random_histories_contain_the_important_events():
    """Otherwise the random tests would check nothing."""
    worlds = [history(seed, 200, batch=2, max_lag=seed % 3, ranks=1 + seed % 2) for seed in range(20)]
    received = {type(event.message) for world in worlds for event, _ in world.log if hasattr(event, "message")}
    sent = {type(effect.message) for world in worlds for effect in world.effects if hasattr(effect, "message")}
    dropped = {reason for world in worlds for reason in world.core.training.leases.rollouts.dropped}
    assert {wire.Restore, wire.Commit, wire.Release, wire.SnapshotRequest, wire.Evaluate, wire.Goodbye} <= received
    assert {wire.Restored, wire.Committed, wire.Snapshot, wire.Evaluated, wire.Refused, wire.Shard} <= sent
    assert {wire.Progress} <= received and {wire.Revoked} <= sent
    assert {"resume", "stale"} <= dropped
    assert any(effect.message.partial for w in worlds for effect in w.effects if is_lease(effect))
    assert any(effect.message.finished.size for w in worlds for effect in w.effects if is_lease(effect))
    assert sum(world.kills for world in worlds) > 20
    assert sum(world.core.training.leases.duplicates for world in worlds) > 20
    assert sum(world.core.training.step for world in worlds) > 20

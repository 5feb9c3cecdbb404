"""A copy of a run's ledger, kept from the messages alone, against the state and the ledger of the hub.

    journal ── replay ──▶ Observed: event, effects, state after it ──▶ Audit.see ─┐
    metrics.jsonl, summary.json ─────────────────────────────────────▶ Audit.end ─┴─▶ violations, one line each

What must hold, after every event:

- the leases that the messages have opened and not ended are exactly those that the hub counts as running;
- a lease ends by its last acknowledgement, by Revoked, by Release, by a final refusal of its actor, or by Restore;
- no attempt is leased twice, no task while another attempt at it runs, or after it is trained or dropped;
- an acknowledged rollout was received; a trained group is whole, was acknowledged, and was not trained before;
- a task leaves the copy only by a commit, or together with one more drop, with its reason, in the ledger;
- versions of batches and restores grow.

A Restore takes the copy back to where it was when the hub gave out this state. Attempts and versions go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from sgpo_async.config import Run
from sgpo_async.hub import HubCore
from sgpo_async.hub import events as ev
from sgpo_async.wire import records as wire

MOST_LINES = 20  # of violations that are kept

Holder = tuple[int, bytes]
"""Attempt, and the member that has it."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One event of the replay: its effects, and what the hub's state is after it. Evaluation has negative tasks."""

    number: int  # of the event
    at: float  # on the core's clock, in seconds
    event: ev.Event
    effects: Sequence[ev.Effect]
    running: Mapping[int, Holder]
    waiting: frozenset[int]
    complete: frozenset[int]  # of training
    ledger: Mapping[str, Any]  # of the training tasks: dispatched, trained, dropped by reason
    version: int


def observe(core: HubCore, event: ev.Event, effects: Sequence[ev.Effect], *, number: int, at: float) -> Observed:
    """What there is to see after `core` has handled an event."""
    tables = (core.training.leases, core.evaluation.leases)
    ledger = core.training.leases.tasks
    return Observed(
        number=number,
        at=at,
        event=event,
        effects=effects,
        running={task: (lease.attempt, lease.member) for table in tables for task, lease in table.running.items()},
        waiting=frozenset(task.number for table in tables for _, _, task in table.waiting),
        complete=frozenset(core.training.leases.complete),
        ledger={"dispatched": ledger.dispatched, "trained": ledger.trained, "dropped": dict(ledger.dropped)},
        version=core.training.version,
    )


@dataclass
class OpenLease:
    """A lease as its actor knows it."""

    attempt: int
    member: bytes
    size: int
    arrived: set[int]  # slots

    @property
    def holder(self) -> Holder:
        return self.attempt, self.member


@dataclass
class LedgerCopy:
    """What a Restore takes back: the tasks of training."""

    live: set[int] = field(default_factory=set)  # leased, and neither trained nor dropped
    complete: dict[int, int] = field(default_factory=dict)  # number of rollouts, by task
    trained: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    drops: Mapping[str, int] = field(default_factory=dict)  # the hub's count of them by reason
    step: int = 0  # committed steps

    def clone(self) -> LedgerCopy:
        """With sets of its own."""
        own = replace(self, live=set(self.live), complete=dict(self.complete))
        return replace(own, trained=set(self.trained), dropped=set(self.dropped))

    def ledger(self) -> tuple[int, int, int]:
        """Dispatched, trained and dropped tasks."""
        return len(self.live) + len(self.trained) + len(self.dropped), len(self.trained), len(self.dropped)


class Audit:
    """Reads a run event by event; `violations` says in one line each what must not be."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()  # of events, leases, acknowledgements, ...
        self.copy = LedgerCopy()
        self._open: dict[int, OpenLease] = {}
        self._leased: set[tuple[int, int]] = set()  # all attempts
        self._received: set[tuple[bytes, int, int, int]] = set()
        self._states: dict[str, LedgerCopy] = {"": LedgerCopy()}  # by the digest of what the hub gave out
        self._restored = ""  # id of the last Restore
        self._rank_of: dict[bytes, int] = {}
        self._shards: dict[tuple[int, int], dict[int, int]] = {}  # rollouts by task, by rank and part
        self._newest = -1  # version
        self._ledgers: dict[int, list[Mapping[str, Any]]] = {}  # of Committed, by step
        self._last: Mapping[str, Any] = {}
        self._now: Observed | None = None

    # ---- event by event

    def see(self, observed: Observed) -> None:
        """Enter one event into the copy, and compare it with the state."""
        self._now = observed
        self.counts["events"] += 1
        ended: dict[int, str] = {}  # leases that may end now, and why
        self._receive(observed.event, ended)
        for effect in observed.effects:
            if isinstance(effect, ev.Send):
                self._send(effect.member, effect.message, ended)
        self._close_leases(observed, ended)
        self._settle(observed)
        self._last = observed.ledger

    def _receive(self, event: ev.Event, ended: dict[int, str]) -> None:
        match event:
            case ev.HubRestarted():
                self.counts["restarts of the hub"] += 1
            case ev.Received(member, wire.Rollout() as rollout):
                self.counts["rollouts received"] += 1
                self._received.add((member, rollout.task, rollout.attempt, rollout.slot))
            case ev.Received(member, wire.Release(task=task, attempt=attempt)):
                if task in self._open and self._open[task].holder == (attempt, member):
                    ended[task] = "released"
            case ev.Received(member, wire.Hello(role="learner", rank=rank)):
                self._rank_of[member] = rank

    def _send(self, member: bytes, message: wire.Message, ended: dict[int, str]) -> None:
        match message:
            case wire.Lease():
                self._lease(member, message, ended)
            case wire.Ack(task=task, attempt=attempt, slot=slot):
                self._acknowledge(member, task, attempt, slot)
            case wire.Revoked(task=task, attempt=attempt):
                if task in self._open and self._open[task].holder == (attempt, member):
                    ended[task] = "revoked"
                    self.copy.complete.pop(task, None)
            case wire.Refused(final=True):
                ended |= {task: "refused" for task, lease in self._open.items() if lease.member == member}
            case wire.Welcome() if member in self._rank_of:
                self._shards.clear()  # a new world: its batch may be another one
            case wire.Shard():
                self._shard(member, message)
            case wire.Committed():
                self._commit(message)
            case wire.Snapshot(state=state):
                self._states[_digest(state)] = self.copy.clone()
            case wire.Restored(version=version):
                self._restore(version, ended)

    def _lease(self, member: bytes, lease: wire.Lease, ended: dict[int, str]) -> None:
        self.counts["leases"] += 1
        task, key = lease.task, (lease.task, lease.attempt)
        self._require(key not in self._leased, f"attempt {lease.attempt} of task {task} is leased again")
        self._require(task not in self._open or task in ended, f"task {task} is leased while another attempt runs")
        if task >= 0:
            copy = self.copy
            settled = task in copy.trained or task in copy.dropped or task in copy.complete
            self._require(not settled, f"task {task} is leased although it is settled or complete")
            copy.live.add(task)
        ended.pop(task, None)
        self._leased.add(key)
        size, finished = lease.autonomous + lease.guided, set(lease.finished.tolist())
        self._open[task] = OpenLease(lease.attempt, member, size, finished)

    def _acknowledge(self, member: bytes, task: int, attempt: int, slot: int) -> None:
        self.counts["acknowledgements"] += 1
        known = (member, task, attempt, slot) in self._received
        self._require(known, f"rollout {task}/{attempt}/{slot} is acknowledged and was never received")
        lease = self._open.get(task)
        if lease and lease.holder == (attempt, member) and slot not in lease.arrived:
            lease.arrived.add(slot)
            self.counts["rollouts accepted"] += 1
            if task >= 0 and len(lease.arrived) == lease.size:
                self.copy.complete[task] = lease.size  # unless Revoked follows, because this rollout was invalid

    def _shard(self, member: bytes, shard: wire.Shard) -> None:
        self._grow(shard.version, "batch", may_repeat=True)
        rollouts = Counter(rollout.task for rollout in shard.rollouts)
        self._shards[self._rank_of.get(member, -1), shard.part] = dict(rollouts)
        for task, size in rollouts.items():
            self._require(task not in self.copy.trained, f"task {task} is in a batch although it is trained")
            whole = self.copy.complete.get(task)
            self._require(whole == size, f"task {task} is in a batch with {size} rollouts, of {whole} acknowledged")

    def _commit(self, message: wire.Committed) -> None:
        self._ledgers.setdefault(message.step, []).append(message.status["ledger"])
        if message.step == self.copy.step - 1:
            return  # the answer to a repeated request
        copy = self.copy
        self._require(message.step == copy.step, f"step {message.step} is committed after step {copy.step - 1}")
        tasks = [task for shard in self._shards.values() for task in shard]
        expected = self.run.learner.problems_per_step
        self._require(len(tasks) == len(set(tasks)) == expected, f"step {message.step} has the tasks {sorted(tasks)}")
        self._require(not copy.trained & set(tasks), f"step {message.step} trains tasks again")
        for task in tasks:
            self.counts["rollouts trained"] += copy.complete.pop(task, 0)
        copy.trained |= set(tasks)
        copy.live -= set(tasks)
        copy.step = message.step + 1
        self.counts["commits"] += 1
        self._shards.clear()

    def _restore(self, version: int, ended: dict[int, str]) -> None:
        assert self._now and isinstance(self._now.event, ev.Received)
        request = self._now.event.message
        assert isinstance(request, wire.Restore)
        if request.id and request.id == self._restored:
            return  # the answer to a repeated request
        self._restored = request.id
        self._grow(version, "restore", may_repeat=False)
        self._require(_digest(request.state) in self._states, "a state is restored that the hub never gave out")
        self.copy = self._states.get(_digest(request.state), LedgerCopy()).clone()
        self._ledgers = {step: found for step, found in self._ledgers.items() if step < self.copy.step}
        self._shards.clear()
        ended |= dict.fromkeys(self._open, "restored")
        self.counts["restores"] += 1

    def _close_leases(self, observed: Observed, ended: Mapping[int, str]) -> None:
        """Compare the open leases with those that run; one that is over must have been ended by a message."""
        for task, lease in list(self._open.items()):
            if observed.running.get(task) == lease.holder and task not in ended:
                continue
            complete = len(lease.arrived) == lease.size
            self._require(complete or task in ended, f"the lease of task {task} ended without a word")
            runs = observed.running.get(task) == lease.holder
            self._require(not runs, f"the lease of task {task} is {ended.get(task)} and still runs")
            self.counts[f"leases {ended.get(task, 'completed')}"] += 1
            del self._open[task]
        for task in observed.running.keys() - self._open.keys():
            self._require(False, f"task {task} runs without a lease")

    def _settle(self, observed: Observed) -> None:
        """What has left the hub's state is trained, or it is dropped with a reason."""
        copy = self.copy
        there = (observed.running, observed.waiting, observed.complete)
        gone = {task for task in copy.live if not any(task in place for place in there)}
        for task in gone:
            copy.complete.pop(task, None)
        copy.dropped |= gone
        copy.live -= gone
        drops = Counter(observed.ledger["dropped"])
        drops.subtract(copy.drops)
        if drops.total() != len(gone):
            self._require(False, f"tasks {sorted(gone)} are gone, but the ledger has dropped {dict(+drops)} more")
        copy.drops = observed.ledger["dropped"]
        counted = (observed.ledger["dispatched"], observed.ledger["trained"], sum(copy.drops.values()))
        self._require(counted == copy.ledger(), f"the ledger counts {counted}, the messages {copy.ledger()}")
        self._require(observed.complete == copy.complete.keys(), "the complete groups are not the acknowledged ones")

    def _grow(self, version: int, what: str, *, may_repeat: bool) -> None:
        grown = version > self._newest or (may_repeat and version == self._newest)
        self._require(grown, f"a {what} has version {version} after {self._newest}")
        self._newest = max(self._newest, version)

    # ---- at the end

    def end(self, lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
        """Compare the copy with the metrics and the summary of the run; return all violations."""
        self._now = None
        self.violations += self._of_metrics(lines)
        ledger = summary.get("ledger")
        if ledger is None:
            self.violations.append("summary.json: missing")
        else:
            self.violations += _differing("summary.json", ledger, [self._last])
            left = {name: ledger[name] for name in ("in_flight", "buffered") if ledger[name]}
            if left:
                self.violations.append(f"summary.json: {left} at the end")
        if self.copy.step != self.run.steps:
            self.violations.append(f"the journal ends at step {self.copy.step} of {self.run.steps}")
        return self.violations

    def _of_metrics(self, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        steps = [line["step"] for line in lines]
        if steps != list(range(1, self.run.steps + 1)):
            yield f"metrics.jsonl: must have the steps 1 to {self.run.steps} once each, got {steps}"
        for line in lines:
            where = f"metrics.jsonl: step {line['step']}"
            yield from _differing(where, line["ledger"], self._ledgers.get(line["step"] - 1, []))

    def _require(self, holds: bool, violation: str) -> None:
        if holds:
            return
        self.counts["violations"] += 1
        if len(self.violations) < MOST_LINES:
            where = f"event {self._now.number}, {_name(self._now.event)}: " if self._now else ""
            self.violations.append(where + violation)


def _differing(where: str, ledger: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line if a ledger is none of those that the journal knows."""
    keys = ("dispatched", "trained", "dropped")
    if not any(all(ledger[key] == one[key] for key in keys) for one in known):
        found = {key: ledger[key] for key in keys}
        yield f"{where} has a ledger that the journal does not have: {found}"


def _digest(state: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(state) if state else ""


def _name(event: ev.Event) -> str:
    return type(event.message if isinstance(event, ev.Received) else event).__name__

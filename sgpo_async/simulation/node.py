"""A simulated inference node: the actor's side of the protocol around an engine that only counts (`rates`).

    take (Welcome, Lease, Revoked, Ack) ─▶ waiting leases ─▶ queue ─▶ running, at most `slots` ─▶ Rollout, Ready
    offer (version) ───────────────────────────▶ load: the running sequences go on under the new version

It does no I/O and has no clock: the caller says what time it is, asks when something happens next (`due`) and sends
what is in `outbox`. So the same node runs in virtual time around a hub's core, and over sockets in real time.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sgpo_async.simulation.rates import EngineRates
from sgpo_async.simulation.workload import Workload
from sgpo_async.wire import records as wire

Updates = Literal["in-flight", "wait-for-batch"]
Key = tuple[int, int, int]  # task, attempt, slot
LONGEST = 2**17
MARKS = 256  # versions that running sequences may have begun under
TOKENS, LOGPROBS = np.zeros(LONGEST, np.int32), np.full(LONGEST, -1.0, np.float32)


@dataclass(eq=False)
class Sequence:
    """A rollout in the engine or in its queue."""

    key: Key
    lease: wire.Lease
    length: int  # when it is finished
    spans: list[tuple[int, int]] = field(default_factory=list)  # version and end of what was sampled before `begun`
    begun: float = 0.0  # the engine's step at which it went on
    reported: int = 0  # tokens that the hub knows

    @property
    def sampled(self) -> int:
        """Tokens that were sampled before `begun`."""
        return self.spans[-1][1] if self.spans else 0


class Node:
    """One node. Times are in seconds."""

    def __init__(
        self, name: str, rates: EngineRates, workload: Workload, *, size: int, updates: Updates = "in-flight"
    ) -> None:
        """`size` rollouts of a lease; `updates`: whether a version is loaded at once, or when nothing runs any more."""
        self.name, self._rates, self._workload, self._size, self._updates = name, rates, workload, size, updates
        self.outbox: list[wire.Message] = [wire.Hello(role="actor", name=name)]
        self.version = -1
        self.tokens = 0.0
        self.report_s = 1.0  # between two reports, as the hub wants it
        self.idle: dict[str, float] = defaultdict(float)  # slot-seconds by cause
        self.empty_s = 0.0  # time in which nothing ran
        self.busy_slot_s = 0.0
        self._now = 0.0
        self._step = 0.0  # decoding steps so far
        self._context = 0.0  # tokens that the running sequences hold
        self._paused_until = 0.0
        self._loading_until = 0.0
        self._offered = self._coming = -1  # the newest version that is here, and the one that is being loaded
        self._marks: list[tuple[float, int]] = []  # the step at which each version began to sample
        self._waiting: deque[wire.Lease] = deque()  # for a version
        self._queue: deque[Sequence] = deque()  # for a slot
        self._running: dict[Key, Sequence] = {}
        self._ends: list[tuple[float, int, Sequence]] = []  # a heap of (step, order, sequence)
        self._order = itertools.count()
        self._open: Counter[tuple[int, int]] = Counter()  # unfinished rollouts of each lease
        self._granted = 0
        self._welcomed = False
        self._prefilled: set[tuple[int, int, bool]] = set()

    # ---- what the caller does

    def take(self, message: wire.Message, now: float) -> None:
        """Process a message of the hub."""
        self.advance(now)
        match message:
            case wire.Welcome():
                self._welcomed = True
                self._ask()
            case wire.Lease():
                self.report_s = message.report_s
                self._waiting.append(message)
                self._admit()
            case wire.Revoked():
                self._revoke(message.task, message.attempt)
        self._fill()

    def offer(self, version: int, now: float) -> None:
        """A version has arrived at the node."""
        self.advance(now)
        self._offered = max(self._offered, version)
        self._load()
        self._fill()

    def advance(self, now: float) -> None:
        """Let the time pass."""
        while self._now < now:
            due = min(self.due, now)
            self._pass(due)
            self._finish()
            self._load()
            self._fill()

    @property
    def due(self) -> float:
        """When something happens next, if no message arrives."""
        found = math.inf
        if self._loading_until > self._now:
            found = self._loading_until
        if self._running:
            start = max(self._now, self._paused_until)
            steps = max(0.0, min(self._ends[0][0] - self._step, self._room))
            found = min(found, start + self._rates.seconds(steps, len(self._running), self._context))
        return found

    def report(self, now: float) -> None:
        """Report what the unfinished rollouts have sampled, and that this node lives."""
        self.advance(now)
        by_lease: dict[tuple[int, int], list[wire.PartialRollout]] = {}
        for sequence in self._running.values():
            if (part := self._part(sequence)) is not None:
                by_lease.setdefault(sequence.key[:2], []).append(part)
        for (task, attempt), parts in by_lease.items():
            ordered = tuple(sorted(parts, key=lambda part: part.slot))
            self.outbox.append(wire.Progress(task=task, attempt=attempt, purpose="train", partial=ordered))
        self._heartbeat()

    def cut(self) -> tuple[dict[str, float], float, float, float]:
        """Idle slot-seconds by cause, busy ones, time without any sequence, and tokens, since the last call."""
        found = self.idle, self.busy_slot_s, self.empty_s, self.tokens
        self.idle, self.busy_slot_s, self.empty_s, self.tokens = defaultdict(float), 0.0, 0.0, 0.0
        return found

    # ---- time

    @property
    def _room(self) -> float:
        """Decoding steps until the keys and values fill the memory."""
        if math.isinf(self._rates.capacity) or len(self._running) <= 1:
            return math.inf
        return max(0.0, (self._rates.capacity - self._context) / len(self._running))

    def _pass(self, until: float) -> None:
        """Decode until this time, before which nothing ends."""
        seconds, running = until - self._now, len(self._running)
        decoding = max(0.0, until - max(self._now, self._paused_until))
        if running and decoding > 0:
            steps = self._rates.steps(decoding, running, self._context)
            if self._ends and until >= self.due - 1e-9:
                steps = min(self._ends[0][0] - self._step, self._room)  # exactly, without rounding
            self._step += steps
            self._context += steps * running
            self.tokens += steps * running
        self.busy_slot_s += running * seconds
        if free := self._rates.slots - running:
            self.idle[self._cause()] += free * seconds
        self.empty_s += 0.0 if running else seconds
        self._now = until

    def _cause(self) -> str:
        """Why a slot is free."""
        if self._loading_until > self._now:
            return "loads weights"
        if self._queue:
            return "memory is full"
        if self._waiting or self._offered > self.version:
            return "waits for weights"
        return "no lease" if self._welcomed else "joins"

    # ---- leases

    def _ask(self) -> None:
        """Ask for as many leases as an actor does: for every free slot, and one more."""
        if not self._welcomed or self.version < 0:
            return
        unfinished = self._size * (self._granted - len(self._open)) + sum(self._open.values())
        wanted = -(-(self._rates.slots - unfinished) // self._size) + 1
        if wanted > 0:
            self._granted += wanted
            self.outbox.append(wire.Ready(tasks=wanted, version=self.version))

    def _admit(self) -> None:
        """Start the leases that the version may serve."""
        if self._updates == "wait-for-batch" and self._offered > self.version:
            return  # what runs has to end first
        while self._waiting and self._waiting[0].min_version <= self.version:
            lease = self._waiting.popleft()
            begun = {part.slot: part for part in lease.partial}
            finished = set(lease.finished.tolist())
            for slot in range(lease.autonomous + lease.guided):
                if slot not in finished:
                    self._queue.append(self._sequence(lease, slot, begun.get(slot)))
                    self._open[lease.task, lease.attempt] += 1

    def _sequence(self, lease: wire.Lease, slot: int, part: wire.PartialRollout | None) -> Sequence:
        key = (lease.task, lease.attempt, slot)
        spans = [] if part is None else list(zip(part.versions.tolist(), part.ends.tolist(), strict=True))
        known = spans[-1][1] if spans else 0
        length = 1 if lease.purpose == "evaluate" else self._workload.length(lease.task, slot)
        return Sequence(key, lease, max(length, known + 1), spans, reported=known)

    def _fill(self) -> None:
        """Give free slots to what waits for them."""
        while self._queue and len(self._running) < self._rates.slots and self.version >= 0:
            sequence = self._queue[0]
            prompt = self._prompt(sequence)
            if self._running and self._context + prompt + sequence.sampled > self._rates.capacity * 0.95:
                return
            self._queue.popleft()
            group = (*sequence.key[:2], sequence.key[2] >= sequence.lease.autonomous)
            if group not in self._prefilled or sequence.sampled:
                self._prefilled.add(group)
                seconds = (prompt + sequence.sampled) * self._rates.prefill_s
                self._paused_until = max(self._paused_until, self._now) + seconds
            sequence.begun = self._step
            self._running[sequence.key] = sequence
            self._context += prompt + sequence.sampled
            end = self._step + sequence.length - sequence.sampled
            heapq.heappush(self._ends, (end, next(self._order), sequence))

    def _finish(self) -> None:
        """Send the rollouts that are finished; if the memory is full, take the shortest sequence out."""
        while self._ends and self._ends[0][0] <= self._step + 1e-6:
            _, _, sequence = heapq.heappop(self._ends)
            if self._running.get(sequence.key) is not sequence:
                continue  # revoked, or taken out
            self._remove(sequence)
            self.outbox.append(self._rollout(sequence))
            self._closed(sequence)
        self._drop_dead_ends()
        if self._room <= 1e-6:
            self._take_out(min(self._running.values(), key=lambda one: one.sampled + self._step - one.begun))

    def _drop_dead_ends(self) -> None:
        while self._ends and self._running.get(self._ends[0][2].key) is not self._ends[0][2]:
            heapq.heappop(self._ends)

    def _take_out(self, sequence: Sequence) -> None:
        """Put a running sequence back into the queue with what it has: its keys and values are computed again."""
        self._remove(sequence)
        spans = self._spans(sequence)
        again = Sequence(sequence.key, sequence.lease, sequence.length, spans, reported=sequence.reported)
        self._queue.append(again)
        self._drop_dead_ends()

    def _remove(self, sequence: Sequence) -> None:
        del self._running[sequence.key]
        held = self._prompt(sequence) + sequence.sampled + self._step - sequence.begun
        self._context = max(0.0, self._context - held) if self._running else 0.0

    def _closed(self, sequence: Sequence) -> None:
        """One rollout less of its lease; a finished lease is replaced."""
        lease = sequence.key[:2]
        self._open[lease] -= 1
        if self._open[lease] <= 0:
            self._end_lease(lease)
        self._ask()

    def _end_lease(self, lease: tuple[int, int]) -> None:
        self._open.pop(lease, None)
        self._prefilled -= {(*lease, False), (*lease, True)}
        self._granted -= 1

    def _revoke(self, task: int, attempt: int) -> None:
        lease = (task, attempt)
        held = lease in self._open
        for waiting in [one for one in self._waiting if (one.task, one.attempt) == lease]:
            self._waiting.remove(waiting)
            held = True
        self._queue = deque(one for one in self._queue if one.key[:2] != lease)
        for sequence in [one for one in self._running.values() if one.key[:2] == lease]:
            self._remove(sequence)
        self._drop_dead_ends()
        if held:
            self._end_lease(lease)
            self._ask()

    # ---- weights

    def _load(self) -> None:
        """Begin to load a version that is here, and end a load whose time is over."""
        if self._loading_until and self._now >= self._loading_until:
            self._loading_until = 0.0
            self.version = self._coming
            self._marks = [*self._marks[-MARKS:], (self._step, self.version)]
            self._heartbeat()
            self._ask()
            self._admit()
        if self._offered <= self.version or self._loading_until:
            return
        if self._updates == "wait-for-batch" and (self._running or self._queue):
            return
        self._coming = self._offered
        self._loading_until = self._now + max(self._rates.load_s, 1e-9)
        self._paused_until = max(self._paused_until, self._loading_until)

    # ---- messages

    def _heartbeat(self) -> None:
        self.outbox.append(wire.Heartbeat(state="serving", version=self.version, running=len(self._running)))

    def _prompt(self, sequence: Sequence) -> int:
        lengths = self._workload.lengths
        return lengths.prompt + (lengths.strategy if sequence.key[2] >= sequence.lease.autonomous else 0)

    def _spans(self, sequence: Sequence, total: int | None = None) -> list[tuple[int, int]]:
        """Version and end of each span so far; `total` tokens in all, if that is known."""
        done = sequence.sampled
        total = done + int(self._step - sequence.begun + 1e-6) if total is None else total
        spans = list(sequence.spans)
        after = [mark for mark in self._marks if mark[0] > sequence.begun]
        first = [version for step, version in self._marks if step <= sequence.begun][-1]
        for (version, _), end in zip(
            [(first, 0.0), *[(version, step) for step, version in after]],
            [*[done + math.ceil(step - sequence.begun - 1e-6) for step, _ in after], total],
            strict=True,
        ):
            end = min(end, total)
            if end > (spans[-1][1] if spans else 0):
                if spans and spans[-1][0] == version:
                    spans[-1] = (version, end)
                else:
                    spans.append((version, end))
        return spans

    def _part(self, sequence: Sequence) -> wire.PartialRollout | None:
        spans, known = self._spans(sequence), sequence.reported
        total = spans[-1][1] if spans else 0
        if total <= known or total >= sequence.length:
            return None
        new = [(version, end - known) for version, end in spans if end > known]
        sequence.reported = total
        return wire.PartialRollout(slot=sequence.key[2], start=known, **_arrays(new))

    def _rollout(self, sequence: Sequence) -> wire.Rollout:
        (task, attempt, slot), lease = sequence.key, sequence.lease
        guided, train = slot >= lease.autonomous, lease.purpose == "train"
        cut = sequence.length >= lease.max_new_tokens
        correct = train and self._workload.correct(task, slot, guided=guided)
        return wire.Rollout(
            task=task,
            attempt=attempt,
            slot=slot,
            purpose=lease.purpose,
            guided=guided,
            prompt=TOKENS[: self._prompt(sequence)],
            reward=float(correct),
            finish="length" if cut else "stop",
            unguided_logprob=-1.0 if lease.unguided_scores and guided and correct and not cut else None,
            **_arrays(self._spans(sequence, sequence.length)),
        )


def _arrays(spans: list[tuple[int, int]]) -> dict[str, Any]:
    """Tokens, log-probabilities and spans; the tokens are views of one array."""
    count = spans[-1][1]
    return {
        "tokens": TOKENS[:count],
        "logprobs": LOGPROBS[:count],
        "versions": np.array([version for version, _ in spans], np.int32),
        "digests": np.zeros(len(spans), np.int64),
        "ends": np.array([end for _, end in spans], np.int32),
    }

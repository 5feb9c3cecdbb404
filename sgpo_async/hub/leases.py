"""The states of all tasks of one purpose (training or evaluation).

    add ──▶ waiting ── lease ──▶ running ── arrive (all slots) ──▶ complete ── train | drop ──▶ ledger
               ▲                    ├── discard ──▶ ledger   (no actor can serve the task)
               └─ revoke | reject ──┘   (the task waits again, with the next attempt, before younger tasks)

A revoked task keeps what its actors have sent: the finished rollouts, and the tokens of the others. The next lease
continues them all, so that no work is lost and no length is favoured (see `rollout.partial`). A task starts again from
nothing if its actor sent something invalid (reject), or if its tokens have become too old.

The ledger counts a task as dispatched once, but its rollouts each time that they start from nothing.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from sgpo_async.hub.ledger import Ledger
from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.rollout.partial import Arrived
from sgpo_async.tasks.task_sampler import Task
from sgpo_async.wire.records import Lease, Progress, Rollout

MAX_INVALID_LEASES = 3  # a task is dropped after so many leases with an invalid rollout or report
DURATIONS = 64  # number of completed leases whose durations are kept


@dataclass(kw_only=True)
class RunningLease:
    """A lease that an actor is working on."""

    task: Task
    attempt: int
    member: bytes
    min_version: int  # the actor must serve at least this version
    oldest: int  # the oldest version of a token that the group may hold, which an earlier attempt may have sampled
    issued: float  # time of the lease
    last_progress: float  # time of the last message about this lease
    arrived: Arrived  # what this attempt and the earlier ones have sent

    @property
    def continues_another(self) -> bool:
        """Whether some of its finished rollouts come from an earlier attempt, by another actor."""
        return any(rollout.attempt != self.attempt for rollout in self.arrived.rollouts.values())

    @cached_property
    def terms(self) -> Lease:
        """What the rollouts of this lease must comply with."""
        return self.task.lease(attempt=self.attempt, min_version=self.oldest)

    def __getstate__(self) -> dict[str, Any]:
        """Without `terms`, which hold the whole problem: the hub saves its state often."""
        return {name: value for name, value in self.__dict__.items() if name != "terms"}


class LeaseTable:
    """All tasks of one purpose, with one ledger for the tasks and one for their rollouts.

    With `keeps_tokens` false, the table keeps only the rewards and versions of rollouts, which suffice for pass rates
    and lag. With `drops_stale` false, a task is continued however old its first tokens are.
    """

    def __init__(self, *, first_attempt: int = 0, keeps_tokens: bool = True, drops_stale: bool = True) -> None:
        """`first_attempt` is the attempt number of a new task's first lease."""
        self._keeps_tokens, self._drops_stale = keeps_tokens, drops_stale
        self.tasks, self.rollouts = Ledger(), Ledger()
        self.waiting: list[tuple[int, int, Task]] = []  # a heap of (order, attempt, task)
        self.carried: dict[int, Arrived] = {}  # what earlier attempts at a waiting task have sent, by task number
        self.running: dict[int, RunningLease] = {}  # by task number
        self.complete: dict[int, CompletedGroup] = {}  # by task number; includes groups handed to a learner
        self.first_attempt = self.last_attempt = first_attempt  # last_attempt: the highest attempt of any lease so far
        self._invalid_leases: Counter[int] = Counter()  # leases with an invalid rollout or report, by task number
        self.durations: deque[float] = deque(maxlen=DURATIONS)  # seconds of the last completed leases
        self.completed = 0  # number of groups that were ever complete
        self.reissued = 0  # number of revoked leases
        self.duplicates = 0  # number of rollouts that no lease was waiting for
        self.tokens = 0  # number of tokens in all accepted rollouts, with those that environments wrote

    @property
    def live(self) -> int:
        """Number of tasks that are neither trained nor dropped."""
        return len(self.waiting) + len(self.running) + len(self.complete)

    def add(self, task: Task) -> None:
        """Dispatch a new task."""
        self.tasks.dispatched += 1
        self.enqueue(task, attempt=self.first_attempt)

    def enqueue(self, task: Task, *, attempt: int) -> None:
        """Put a dispatched task into the queue of waiting tasks, before younger ones."""
        heapq.heappush(self.waiting, (abs(task.number), attempt, task))

    def lease(self, member: bytes, *, min_version: int, now: float) -> Lease:
        """Lease the first waiting task to `member`, with what earlier attempts have sampled.

        If the table drops what is stale, that must be `min_version` or newer; otherwise the task starts again.
        """
        _, attempt, task = heapq.heappop(self.waiting)
        arrived = self.carried.pop(task.number, None)
        oldest = arrived.oldest_version if arrived else None
        if oldest is not None and oldest < min_version and self._drops_stale:
            self.rollouts.drop("stale", task.size)
            arrived = oldest = None
        if arrived is None:
            arrived = Arrived(size=task.size)
            self.rollouts.dispatched += task.size
        self.running[task.number] = RunningLease(
            task=task,
            attempt=attempt,
            member=member,
            min_version=min_version,
            oldest=min_version if oldest is None else min(oldest, min_version),
            issued=now,
            last_progress=now,
            arrived=arrived,
        )
        self.last_attempt = max(self.last_attempt, attempt)
        lease = task.lease(attempt=attempt, min_version=min_version)
        finished = np.array(sorted(arrived.rollouts), np.int32)
        return replace(lease, finished=finished, partial=arrived.partial())

    def lease_of(self, member: bytes, sent: Rollout | Progress) -> RunningLease | None:
        """The running lease of `member` to which this belongs; None if it comes too late."""
        lease = self.running.get(sent.task)
        return lease if lease and (lease.member, lease.attempt) == (member, sent.attempt) else None

    def report(self, progress: Progress, *, now: float) -> None:
        """Keep what the running rollouts of a lease have sampled."""
        lease = self.running[progress.task]
        lease.last_progress = now
        for part in progress.partial:
            lease.arrived.report(part)

    def arrive(self, rollout: Rollout, *, now: float) -> bool:
        """Store an expected rollout; return whether it completes the group."""
        lease = self.running[rollout.task]
        lease.last_progress = now
        self.tokens += len(rollout.tokens)
        lease.arrived.finish(rollout if self._keeps_tokens else _without_tokens(rollout))
        if lease.arrived.missing:
            return False
        del self.running[rollout.task]
        self.completed += 1
        self.durations.append(now - lease.issued)
        ordered = tuple(lease.arrived.rollouts[slot] for slot in range(lease.task.size))
        self.complete[rollout.task] = CompletedGroup(number=rollout.task, attempt=lease.attempt, rollouts=ordered)
        return True

    def renew(self, member: bytes, numbers: Iterable[int], *, now: float) -> None:
        """Record that `member` is still working on the tasks `numbers`, so that their leases do not time out."""
        for number in numbers:
            lease = self.running.get(int(number))
            if lease is not None and lease.member == member:
                lease.last_progress = now

    def held_by(self, member: bytes) -> list[int]:
        """Numbers of the tasks that are leased to `member`."""
        return [number for number, lease in self.running.items() if lease.member == member]

    def silent_since(self, moment: float) -> list[int]:
        """Numbers of the leased tasks about which the hub has received nothing since `moment`."""
        return [number for number, lease in self.running.items() if lease.last_progress < moment]

    def revoke(self, number: int) -> None:
        """End this lease, and put its task back into the queue with the next attempt and all that has arrived."""
        lease = self.running.pop(number)
        self.carried[number] = lease.arrived
        self.enqueue(lease.task, attempt=lease.attempt + 1)
        self.reissued += 1

    def reject(self, number: int) -> None:
        """End this lease because of an invalid rollout or report, and drop what has arrived.

        The task is leased again, or dropped if MAX_INVALID_LEASES of its leases have ended like this.
        """
        self._invalid_leases[number] += 1
        if self._invalid_leases[number] >= MAX_INVALID_LEASES:
            self.discard(number, "invalid")
            return
        self.forget(number)

    def forget(self, number: int) -> None:
        """End this lease, drop what has arrived, and put its task back into the queue with the next attempt."""
        lease = self.running.pop(number)
        self.rollouts.drop("rejected", lease.task.size)
        self.enqueue(lease.task, attempt=lease.attempt + 1)
        self.reissued += 1

    def discard(self, number: int, reason: str) -> None:
        """Drop this task, which can never be completed, and the rollouts of its lease."""
        lease = self.running.pop(number)
        self.tasks.drop(reason, 1)
        self.rollouts.drop(reason, lease.task.size)

    def train(self, numbers: Iterable[int]) -> list[CompletedGroup]:
        """Remove these complete groups, count them as trained, and return them."""
        groups = [self.complete.pop(number) for number in numbers]
        self.tasks.trained += len(groups)
        self.rollouts.trained += sum(len(group.rollouts) for group in groups)
        return groups

    def drop(self, number: int, reason: str) -> None:
        """Drop this complete group without training on it."""
        group = self.complete.pop(number)
        self.tasks.drop(reason, 1)
        self.rollouts.drop(reason, len(group.rollouts))

    def balances(self) -> dict[str, dict[str, int]]:
        """Numbers of tasks and rollouts in flight and buffered, counted from the present leases and groups.

        A rollout is in flight from the first lease of its task until it arrives; a task is in flight until all of its
        rollouts have arrived.
        """
        started = [*(lease.arrived for lease in self.running.values()), *self.carried.values()]
        arrived = sum(len(one.rollouts) for one in started)
        missing = sum(one.missing for one in started)
        grouped = sum(len(group.rollouts) for group in self.complete.values())
        return {
            "tasks": {"in_flight": len(self.waiting) + len(self.running), "buffered": len(self.complete)},
            "rollouts": {"in_flight": missing, "buffered": arrived + grouped},
        }

    def check(self) -> None:
        """Assert that both ledgers balance."""
        balances = self.balances()
        self.tasks.check(**balances["tasks"])
        self.rollouts.check(**balances["rollouts"])

    def plain(self) -> dict[str, Any]:
        """The ledger of the tasks as plain data, with that of the rollouts under "rollouts"."""
        balances = self.balances()
        return self.tasks.plain(**balances["tasks"]) | {"rollouts": self.rollouts.plain(**balances["rollouts"])}


def _without_tokens(rollout: Rollout) -> Rollout:
    return replace(
        rollout, prompt=np.empty(0, np.int32), tokens=np.empty(0, np.int32), logprobs=np.empty(0, np.float32)
    )

"""The way of tasks of one purpose: waiting, leased to an actor, complete, and then trained or dropped.

    add ──▶ waiting ── lease ──▶ running ── arrive (all slots) ──▶ complete ── train | drop ──▶ ledger
               ▲                    ├── discard ──▶ ledger   nobody can do it
               └───── revoke ───────┘   as a whole, under the next attempt, before younger tasks

A revoked lease drops all its rollouts, the arrived ones too: keeping those that happened to be done would favour short
ones. So rollouts are dispatched anew with every attempt, while the task is dispatched once and stays in flight.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sgpo_async.hub.ledger import Ledger
from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.tasks.task_sampler import Task
from sgpo_async.wire.records import Lease, Rollout

MISFITS = 3  # leases of one task that may end by a rollout which cannot be what was asked for


@dataclass(kw_only=True)
class Running:
    """A lease in an actor's hands."""

    task: Task
    attempt: int
    member: bytes
    min_version: int
    news: float  # when something was last heard of it
    rollouts: dict[int, Rollout] = field(default_factory=dict)  # by slot

    def misfit(self, rollout: Rollout, *, newest: int) -> str | None:
        """Why this rollout cannot be what was asked for; `newest` is the highest version there is."""
        if not 0 <= rollout.slot < self.task.size:
            return "slot out of range"
        if rollout.guided != (rollout.slot >= self.task.autonomous):
            return "guided flag does not belong to this slot"
        if rollout.oldest_version < self.min_version:
            return "tokens older than the lease allows"
        if rollout.versions.max() > newest:
            return "tokens of a version that does not exist"
        return None


class LeaseTable:
    """All tasks of one purpose, and their two ledgers.

    Without `keeps_tokens`, only what a pass rate needs is kept of a rollout: reward and versions.
    """

    def __init__(self, *, first_attempt: int = 0, keeps_tokens: bool = True) -> None:
        self._keeps_tokens = keeps_tokens
        self.tasks, self.rollouts = Ledger(), Ledger()
        self.waiting: list[tuple[int, int, Task]] = []  # a heap of (order, attempt, task)
        self.running: dict[int, Running] = {}  # by task number
        self.complete: dict[int, CompletedGroup] = {}  # by task number; handed to a learner or not
        self.first_attempt = self.last_attempt = first_attempt  # of a new task; of any lease so far
        self._misfits: Counter[int] = Counter()  # leases that were rejected, by task number
        self.reissued = 0  # leases that were revoked
        self.duplicates = 0  # rollouts that were not awaited any more
        self.tokens = 0  # sampled, in all rollouts taken in

    @property
    def live(self) -> int:
        """Tasks that are neither trained nor dropped."""
        return len(self.waiting) + len(self.running) + len(self.complete)

    def add(self, task: Task) -> None:
        """Dispatch a new task."""
        self.tasks.dispatched += 1
        self.wait(task, attempt=self.first_attempt)

    def wait(self, task: Task, *, attempt: int) -> None:
        """Put a task that is dispatched already in the queue, before younger ones."""
        heapq.heappush(self.waiting, (abs(task.number), attempt, task))

    def lease(self, member: bytes, *, min_version: int, now: float) -> Lease:
        """Give the first waiting task to `member`."""
        _, attempt, task = heapq.heappop(self.waiting)
        self.running[task.number] = Running(
            task=task, attempt=attempt, member=member, min_version=min_version, news=now
        )
        self.last_attempt = max(self.last_attempt, attempt)
        self.rollouts.dispatched += task.size
        return task.lease(attempt=attempt, min_version=min_version)

    def awaits(self, member: bytes, rollout: Rollout) -> Running | None:
        """The lease of `member` that this rollout is a new part of; None if it is a duplicate or comes too late."""
        lease = self.running.get(rollout.task)
        if lease is None or (lease.member, lease.attempt) != (member, rollout.attempt):
            return None
        return None if rollout.slot in lease.rollouts else lease

    def arrive(self, rollout: Rollout, *, now: float) -> None:
        """Take in an awaited rollout; with the last one the group is complete."""
        lease = self.running[rollout.task]
        lease.news = now
        self.tokens += len(rollout.tokens)
        lease.rollouts[rollout.slot] = rollout if self._keeps_tokens else _without_tokens(rollout)
        if len(lease.rollouts) == lease.task.size:
            del self.running[rollout.task]
            ordered = tuple(lease.rollouts[slot] for slot in range(lease.task.size))
            self.complete[rollout.task] = CompletedGroup(number=rollout.task, attempt=lease.attempt, rollouts=ordered)

    def hear_of(self, member: bytes, numbers: Iterable[int], *, now: float) -> None:
        """`member` says that it is at work on these."""
        for number in numbers:
            lease = self.running.get(int(number))
            if lease is not None and lease.member == member:
                lease.news = now

    def held_by(self, member: bytes) -> list[int]:
        """Numbers of the tasks that `member` works on."""
        return [number for number, lease in self.running.items() if lease.member == member]

    def silent_since(self, moment: float) -> list[int]:
        """Numbers of the tasks of which nothing was heard since `moment`."""
        return [number for number, lease in self.running.items() if lease.news < moment]

    def revoke(self, number: int, reason: str) -> None:
        """The lease is lost: drop its rollouts, let the task wait for its next attempt."""
        lease = self.running.pop(number)
        self.rollouts.drop(reason, lease.task.size)
        self.wait(lease.task, attempt=lease.attempt + 1)
        self.reissued += 1

    def reject(self, number: int) -> None:
        """A rollout of this lease is a misfit, so its slot would stay empty: reissue it, but not for ever."""
        self._misfits[number] += 1
        if self._misfits[number] < MISFITS:
            self.revoke(number, "rejected")
        else:
            self.discard(number, "misfit")

    def discard(self, number: int, reason: str) -> None:
        """This task can never be done: drop it and the rollouts of its lease."""
        lease = self.running.pop(number)
        self.tasks.drop(reason, 1)
        self.rollouts.drop(reason, lease.task.size)

    def train(self, numbers: Iterable[int]) -> list[CompletedGroup]:
        """These complete groups have served their purpose."""
        groups = [self.complete.pop(number) for number in numbers]
        self.tasks.trained += len(groups)
        self.rollouts.trained += sum(len(group.rollouts) for group in groups)
        return groups

    def drop(self, number: int, reason: str) -> None:
        """This complete group will never be trained."""
        group = self.complete.pop(number)
        self.tasks.drop(reason, 1)
        self.rollouts.drop(reason, len(group.rollouts))

    def balances(self) -> dict[str, dict[str, int]]:
        """Tasks and rollouts in flight and buffered, counted anew from what is there.

        A rollout is in flight until it arrives, a task until all its rollouts have.
        """
        arrived = sum(len(lease.rollouts) for lease in self.running.values())
        leased = sum(lease.task.size for lease in self.running.values())
        grouped = sum(len(group.rollouts) for group in self.complete.values())
        return {
            "tasks": {"in_flight": len(self.waiting) + len(self.running), "buffered": len(self.complete)},
            "rollouts": {"in_flight": leased - arrived, "buffered": arrived + grouped},
        }

    def check(self) -> None:
        """Assert that both ledgers balance."""
        balances = self.balances()
        self.tasks.check(**balances["tasks"])
        self.rollouts.check(**balances["rollouts"])

    def plain(self) -> dict[str, Any]:
        """The tasks' balance, with the rollouts' under "rollouts"."""
        balances = self.balances()
        return self.tasks.plain(**balances["tasks"]) | {"rollouts": self.rollouts.plain(**balances["rollouts"])}


def _without_tokens(rollout: Rollout) -> Rollout:
    return replace(
        rollout, prompt=np.empty(0, np.int32), tokens=np.empty(0, np.int32), logprobs=np.empty(0, np.float32)
    )

"""Training tasks from dispatch to commit: admission, batches and weight versions.

    task sampler ─▶ lease ─▶ complete groups ─┬─▶ form (batch) ─▶ shard (one per rank) ─▶ commit ─▶ version + 1
                                              └─▶ drop_stale

version = base + step. It names the weights after `step` optimiser steps and is never used twice: when the learner
resumes from an earlier step, `base` grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sgpo_async.config.schema import Run
from sgpo_async.hub.admission import free_capacity, lowest_version
from sgpo_async.hub.balance import balance
from sgpo_async.hub.batch_metrics import batch_metrics
from sgpo_async.hub.leases import LeaseTable
from sgpo_async.hub.settled import Settled
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import Lease, Shard

Part = tuple[tuple[int, ...], ...]
"""The task numbers of each rank, ascending."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Groups that the hub has sent to the ranks and that are not committed yet; they stay in the buffer until then."""

    step: int
    parts: tuple[Part, ...]  # so far

    @property
    def numbers(self) -> list[int]:
        """All task numbers, ascending."""
        return sorted(number for part in self.parts for share in part for number in share)


class Training:
    """The training tasks, the current batch, and the rules of admission, staleness and batching."""

    def __init__(self, run: Run, task_sampler: TaskSampler, *, version: int = 0, first_attempt: int = 0) -> None:
        """Start at step 0 with weights of `version`; `first_attempt` numbers the first lease of a task."""
        self.run, self.task_sampler = run, task_sampler
        self.leases = LeaseTable(first_attempt=first_attempt, drops_stale=run.hub.stale == "drop")
        self.step = 0  # number of committed optimiser steps
        self.position = 0  # number of the next new task
        self.base = self.first_version = version  # weights older than first_version were made before the last restore
        self.batch: Batch | None = None
        self.tokens_trained = 0
        self.last: dict[str, Any] = {}  # metrics of the last committed batch
        self.settled = Settled()
        self._dropped_of = (-1, -1)  # the version and the number of completed groups when stale ones were dropped
        self._late_of: tuple[int, list[int]] = (-1, [])  # a version, and the tasks that had stale tokens when it began

    @property
    def version(self) -> int:
        """Version of the weights after the steps committed so far."""
        return self.base + self.step

    def has_dispatched(self, number: int) -> bool:
        """Whether a training task with this number has ever been dispatched."""
        return 0 <= number < self.position

    @property
    def leasable(self) -> int:
        """How many tasks could be leased now: those that wait, and new ones."""
        leases, hub = self.leases, self.run.hub
        capacity = free_capacity(
            fresh=leases.live - len(self._running_with_stale_tokens()),
            live=leases.live,
            batch=self.run.learner.problems_per_step,
            max_lag=hub.max_lag,
            batches=hub.most_batches,
            steps_left=self.run.steps - self.step,
        )
        return len(leases.waiting) + max(0, capacity)

    def lowest_version(self) -> int | None:
        """The lowest weight version that may serve the next lease; None if there is no task to lease."""
        if not self.leasable:
            return None
        leases, batch = self.leases, self.run.learner.problems_per_step
        ahead = len(leases.running) + len(leases.complete) - len(self._running_with_stale_tokens())
        lowest = lowest_version(version=self.version, ahead=ahead, batch=batch, max_lag=self.run.hub.max_lag)
        return max(min(lowest, self.version), self.first_version)

    def lease(self, member: bytes, *, min_version: int, now: float) -> Lease:
        """Lease the oldest waiting task to `member`; if no task is waiting, lease a new one."""
        if not self.leases.waiting:
            self.leases.add(self.task_sampler.task(self.position))
            self.position += 1
        return self.leases.lease(member, min_version=min_version, now=now)

    def drop_stale(self) -> None:
        """Drop the complete groups of which the next batch could train nothing."""
        state = self.version, self.leases.completed
        if state != self._dropped_of:
            self._dropped_of = state
            for number in self.stale(self.leases.complete):
                self.settled.dropped.add(self.leases.complete[number].rollouts)
                self.leases.drop(number, "stale")

    def drop_unfinished(self, number: int) -> None:
        """Drop a running task, whose group would be stale when it is complete."""
        self.settled.drop_unfinished(self.leases.running[number].arrived)
        self.leases.discard(number, "stale")

    def stale(self, numbers: Iterable[int]) -> list[int]:
        """The complete groups among `numbers` of which the next batch could train nothing; see `hub.stale`."""
        groups = ((number, self.leases.complete[number]) for number in numbers)
        match self.run.hub.stale:
            case "drop":
                return [number for number, group in groups if group.oldest_version < self._oldest]
            case "mask":
                return [number for number, group in groups if group.newest_version < self._oldest]
        return []

    def certain_to_be_dropped(self) -> list[int]:
        """The running tasks whose groups would be dropped when they are complete, as far as reports told lately."""
        return self._running_with_stale_tokens() if self.run.hub.stale == "drop" else []

    def _running_with_stale_tokens(self) -> list[int]:
        """The running tasks that had stale tokens when the present version began."""
        running = self.leases.running
        if self._late_of[0] != self.version:
            ages = {number: lease.arrived.oldest_version for number, lease in running.items()}
            late = [number for number, oldest in ages.items() if oldest is not None and oldest < self._oldest]
            self._late_of = self.version, late
        return [number for number in self._late_of[1] if number in running]

    @property
    def _oldest(self) -> int:
        """The oldest version of a token that is not stale in the next batch."""
        return self.version - self.run.hub.max_lag

    def _candidates(self) -> list[int]:
        """The complete groups that the next part of the batch may take, in the order in which it takes them."""
        taken = set(self.batch.numbers) if self.batch else set()
        ready = sorted(number for number in self.leases.complete if number not in taken)
        if self.run.hub.batch_from == "complete":
            return ready
        unfinished = [*self.leases.running, *(task.number for *_, task in self.leases.waiting)]
        return [number for number in ready if number < min(unfinished, default=math.inf)]

    @property
    def next_part(self) -> int:
        """Which part of the batch is formed next; `learner.parts` if all are."""
        return len(self.batch.parts) if self.batch else 0

    @property
    def batch_is_whole(self) -> bool:
        """Whether all parts of the batch are formed."""
        return self.next_part == self.run.learner.parts

    def form(self, ranks: int) -> bool:
        """Form the next part of the batch from the oldest complete groups, and balance it over `ranks` by tokens.

        Returns whether there are enough complete groups.
        """
        assert not self.batch_is_whole
        problems, parts, part = self.run.learner.problems_per_step, self.run.learner.parts, self.next_part
        size = problems * (part + 1) // parts - problems * part // parts
        formed = self.batch.parts if self.batch else ()
        numbers = self._candidates()[:size]
        if len(numbers) < size:
            return False
        assert not self.stale(numbers)
        shares = balance([self.leases.complete[number].tokens for number in numbers], ranks)
        new = tuple(tuple(numbers[i] for i in share) for share in shares)
        self.batch = Batch(step=self.step, parts=(*formed, new))
        return True

    def shard(self, rank: int, part: int) -> Shard:
        """What `rank` trains on in this part of the batch."""
        assert self.batch is not None
        groups = [self.leases.complete[number] for number in self.batch.parts[part][rank]]
        return Shard(
            step=self.step,
            part=part,
            version=self.version,
            problems=self.run.learner.problems_per_step,
            rollouts=tuple(rollout for group in groups for rollout in group.rollouts),
        )

    def commit(self) -> None:
        """Record that the learner has trained on the batch: count its groups as trained, start the next version."""
        assert self.batch is not None
        assert self.batch_is_whole
        groups = self.leases.train(self.batch.numbers)
        self.last = batch_metrics(groups, version=self.version)
        for group in groups:
            self.settled.trained.add(group.rollouts)
        self.tokens_trained += sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
        self.step, self.batch = self.step + 1, None

"""Training tasks from dispatch to commit: admission, batches, versions.

version = base + step. It names the weights after `step` optimiser steps and never repeats: when a learner comes
back at an earlier step, `base` grows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sgpo_async.config.schema import Run
from sgpo_async.hub.admission import lowest_version, room
from sgpo_async.hub.balance import balance
from sgpo_async.hub.batch_metrics import figures
from sgpo_async.hub.leases import LeaseTable
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import Lease, Shard


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Groups handed to the ranks and not yet committed; they stay in the buffer until then."""

    step: int
    shares: tuple[tuple[int, ...], ...]  # task numbers of each rank, ascending

    @property
    def numbers(self) -> list[int]:
        """All task numbers, ascending."""
        return sorted(number for share in self.shares for number in share)


class Training:
    """What is trained, and by which rules."""

    def __init__(self, run: Run, task_sampler: TaskSampler, *, version: int = 0, first_attempt: int = 0) -> None:
        self.run, self.task_sampler = run, task_sampler
        self.leases = LeaseTable(first_attempt=first_attempt)
        self.step, self.position = 0, 0
        self.base = self.first_version = version  # the first: tokens of older weights belong to another past
        self.batch: Batch | None = None
        self.tokens_trained = 0
        self.last: dict[str, Any] = {}  # figures of the last committed batch

    @property
    def version(self) -> int:
        """Version of the weights after the steps committed so far."""
        return self.base + self.step

    def dispatched(self, number: int) -> bool:
        """Whether there ever was a training task of this number."""
        return 0 <= number < self.position

    def lowest_version(self) -> int | None:
        """The lowest version that may serve the next lease; None if there is nothing to lease."""
        leases, batch, max_lag = self.leases, self.run.learner.problems_per_step, self.run.hub.max_lag
        steps_left = self.run.steps - self.step
        if not leases.waiting and room(live=leases.live, batch=batch, max_lag=max_lag, steps_left=steps_left) <= 0:
            return None
        ahead = len(leases.running) + len(leases.complete)
        lowest = lowest_version(version=self.version, ahead=ahead, batch=batch, max_lag=max_lag)
        return max(lowest, self.first_version)

    def lease(self, member: bytes, *, min_version: int, now: float) -> Lease:
        """Lease the task that waits longest, or else the next of the stream, to `member`."""
        if not self.leases.waiting:
            self.leases.add(self.task_sampler.task(self.position))
            self.position += 1
        return self.leases.lease(member, min_version=min_version, now=now)

    def drop_stale(self) -> None:
        """Drop groups that hold a token too old for the next batch."""
        for number in self.stale(self.leases.complete):
            self.leases.drop(number, "stale")

    def stale(self, numbers: Iterable[int]) -> list[int]:
        """Those of `numbers` whose oldest token is older than the lag allows."""
        oldest = self.version - self.run.hub.max_lag
        return [number for number in numbers if self.leases.complete[number].oldest_version < oldest]

    def form(self, ranks: int) -> Batch | None:
        """Hand out the oldest complete groups, balanced over `ranks` by tokens; None if there are too few."""
        assert self.batch is None
        numbers = sorted(self.leases.complete)[: self.run.learner.problems_per_step]
        if len(numbers) < self.run.learner.problems_per_step:
            return None
        assert not self.stale(numbers)
        shares = balance([self.leases.complete[number].tokens for number in numbers], ranks)
        self.batch = Batch(step=self.step, shares=tuple(tuple(numbers[i] for i in share) for share in shares))
        return self.batch

    def shard(self, rank: int) -> Shard:
        """The part of the batch that `rank` trains."""
        assert self.batch is not None
        groups = [self.leases.complete[number] for number in self.batch.shares[rank]]
        return Shard(
            step=self.step,
            version=self.version,
            problems=len(self.batch.numbers),
            rollouts=tuple(rollout for group in groups for rollout in group.rollouts),
        )

    def commit(self) -> None:
        """The step on the batch is done: its groups are trained, and there is a new version."""
        assert self.batch is not None
        groups = self.leases.train(self.batch.numbers)
        self.last = figures(groups, version=self.version)
        self.tokens_trained += sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
        self.step, self.batch = self.step + 1, None

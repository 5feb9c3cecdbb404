"""An engine that generates whole groups when it is called, without hub or network.

Tasks, seeds, requests and verdicts are those of an actor (`sgpo_async.rollout`): with one slot the rollouts are the
same bits that an actor would send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgpo_async.config import Run
from sgpo_async.engines import Weights
from sgpo_async.engines.open import open_embedded
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.rollout.sampler import RolloutSampler, Unservable
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import Task, TaskSampler
from sgpo_async.weights import digest
from sgpo_async.wire.records import Rollout

VERDICT_S = 0.05  # to wait for a verdict while the engine has nothing to do


class SynchronousActor:
    """One embedded engine, its verifiers, and the run's own stream of training tasks."""

    def __init__(self, run: Run) -> None:
        folder = model_folder(run.model.path)
        self._tasks = TaskSampler(run, source_of(run))
        self.engine = open_embedded(run, folder)
        self._sampler = RolloutSampler(self.engine, load_tokenizer(folder), run.tasks)

    def load(self, version: int, tensors: dict[str, Any]) -> None:
        """Put these weights into service."""
        self.engine.load(Weights(version=version, digest=digest(tensors.items()), read=tensors.copy))

    def task(self, number: int) -> Task:
        """The task of this number."""
        return self._tasks.task(number)

    def roll_out(self, tasks: Sequence[Task]) -> list[Rollout]:
        """All rollouts of `tasks`, ordered by task and slot. Raises EngineError if one cannot be served."""
        for task in tasks:
            self._sampler.add(task.lease(attempt=0, min_version=0))
        rollouts: list[Rollout] = []
        while self._sampler.leases:
            status = self.engine.load_status()
            idle = status.running + status.waiting == 0
            for outcome in self._sampler.step(0.0, VERDICT_S if idle else 0.0):
                if isinstance(outcome, Unservable):
                    raise outcome.error
                rollouts.append(outcome.rollout)
        return sorted(rollouts, key=lambda rollout: (rollout.task, rollout.slot))

    def close(self) -> None:
        """End the verifiers."""
        self._sampler.close()

"""Groups of rollouts from one engine, without hub or network: what a synchronous system does.

The bookkeeping is the actors' own (`sgpo_async.rollout.group`), and so are tasks, seeds and verdicts: with one slot the
rollouts are the same bits that an actor would send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgpo_async.config import Run
from sgpo_async.engines import EmbeddedEngine, Weights
from sgpo_async.engines.base import Generated
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.rollout.group import RolloutGroup, group_of, task_of
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import Task, TaskSampler
from sgpo_async.tasks.verify import VERIFIERS
from sgpo_async.weights import digest
from sgpo_async.wire.records import Rollout


class RolloutSampler:
    """One engine and what it needs to make whole groups of training tasks."""

    def __init__(self, run: Run) -> None:
        folder = model_folder(run.model.path)
        self._run = run
        self._task_sampler = TaskSampler(run, source_of(run))
        self._tokenizer = load_tokenizer(folder)
        self.engine = EmbeddedEngine.from_pretrained(
            folder,
            digest=digest,
            slots=run.engine.slots,
            device=run.engine.device,
            dtype=run.model.dtype,
            deterministic=run.engine.deterministic,
        )

    def load(self, version: int, tensors: dict[str, Any]) -> None:
        """Put these weights in service."""
        self.engine.load(Weights(version=version, digest=digest(tensors.items()), read=tensors.copy))

    def task(self, number: int) -> Task:
        """The task of this number in the run's own stream of problems."""
        return self._task_sampler.task(number)

    def roll_out(self, tasks: Sequence[Task]) -> list[Rollout]:
        """All rollouts of these tasks, ordered by task and slot."""
        groups = {(task.number, 0): self._group(task) for task in tasks}
        for group in groups.values():
            for request in group.requests():
                self.engine.submit(request)
        rollouts: list[Rollout] = []
        while not all(group.done for group in groups.values()):
            for result in self.engine.step(0.0):
                group = groups[task_of(result.id)]
                if not isinstance(result, Generated):
                    rollouts.append(group.scored(result))
                    continue
                group.generated(result)
                text = self._tokenizer.decode(result.tokens, skip_special_tokens=True)
                verify = VERIFIERS[group.lease.verifier]
                outcome = group.judged(result.id, correct=verify(group.lease.answer, text))
                if isinstance(outcome, Rollout):
                    rollouts.append(outcome)
                else:
                    self.engine.submit(outcome)
        return sorted(rollouts, key=lambda rollout: (rollout.task, rollout.slot))

    def _group(self, task: Task) -> RolloutGroup:
        lease = task.lease(attempt=0, min_version=0)
        return group_of(lease, prompt=self._prompt)

    def _prompt(self, problem: str, strategy: str | None) -> list[int]:
        return build_prompt(problem, strategy, style=self._run.tasks.prompt, tokenizer=self._tokenizer)

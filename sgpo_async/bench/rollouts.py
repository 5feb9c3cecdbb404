"""Groups of rollouts from one engine, without hub or network: what a synchronous system does.

The bookkeeping is the actors' own (`sgpo_async.actor.group`), and so are tasks, seeds and verdicts: with one slot the
rollouts are the same bits that an actor would send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgpo_async.actor.group import Group, Sampling, group_of, task_of
from sgpo_async.config import Run
from sgpo_async.engines import EmbeddedEngine, Weights
from sgpo_async.engines.base import Generated
from sgpo_async.tasks.curriculum import Curriculum
from sgpo_async.tasks.models import load_tokenizer, model_folder
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.sources import VERIFIER_OF_SOURCE, source_of
from sgpo_async.tasks.verify import VERIFIERS
from sgpo_async.weights import digest
from sgpo_async.wire.records import Rollout


class Roller:
    """One engine and what it needs to make whole groups of training tasks."""

    def __init__(self, run: Run) -> None:
        folder = model_folder(run.model.path)
        self._run = run
        self._curriculum = Curriculum(run, source_of(run))
        self._tokenizer = load_tokenizer(folder)
        self._verify = VERIFIERS[VERIFIER_OF_SOURCE[run.tasks.source]]
        self._sampling = Sampling(temperature=run.rollout.temperature, max_new_tokens=run.rollout.max_new_tokens)
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

    def roll_out(self, tasks: Sequence[int]) -> list[Rollout]:
        """All rollouts of the training tasks with these numbers, ordered by task and slot."""
        groups = {(number, 0): self._group(number) for number in tasks}
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
                outcome = group.judged(result.id, correct=self._verify(group.lease.answer, text))
                if isinstance(outcome, Rollout):
                    rollouts.append(outcome)
                else:
                    self.engine.submit(outcome)
        return sorted(rollouts, key=lambda rollout: (rollout.task, rollout.slot))

    def _group(self, number: int) -> Group:
        lease = self._curriculum.task(number).lease(attempt=0, min_version=0)
        return group_of(lease, prompt=self._prompt, sampling=self._sampling)

    def _prompt(self, problem: str, strategy: str | None) -> list[int]:
        return build_prompt(problem, strategy, style=self._run.tasks.prompt, tokenizer=self._tokenizer)

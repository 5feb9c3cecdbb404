"""The prompts with which a teacher reads autonomous rollouts: the problem with its context (`tasks.context`).

For `sibling` the context is the completion of another rollout of the group, a correct one, or a wrong one for contrast.
For the others it is a text of the problem (`tasks.contexts`), and the contrast is the strategy of the next problem. The
source is the hub's, and a task is a function of its number, so no message contains these prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgpo_async.config.schema import Run
from sgpo_async.tasks.base import ProblemSource
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import Rollout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InContext:
    """The prompts of the teacher for one rollout, [L] int32 each."""

    right: np.ndarray
    wrong: tuple[np.ndarray, ...] = ()  # with contexts for contrast; none unless the objective compares with them


class Contexts:
    """Finds the teacher's prompts of a training task's rollouts."""

    def __init__(self, run: Run, source: ProblemSource, tokenizer: Any, *, longest: int = 2**31) -> None:
        """`longest`: the model's number of positions; prompts that leave no room for a completion are left out."""
        self._task_sampler, self._tokenizer, self._run = TaskSampler(run, source), tokenizer, run
        self._contrasts = run.algorithm.rlcsd.wrong if run.algorithm.objective == "rlcsd" else 0
        self._longest = longest
        self._too_long = 0

    def __call__(self, autonomous: Sequence[Rollout]) -> dict[int, InContext]:
        """Return the prompts for the rollouts of one group, by slot.

        A rollout is left out if it has no context, no contrast where one is needed, or one that is too long.
        """
        found = {}
        for index, rollout in enumerate(autonomous):
            others = [*autonomous[index + 1 :], *autonomous[:index]]  # so that a group uses many of its siblings
            right = self._prompts(rollout, others, right=True)[:1]
            wrong = self._prompts(rollout, others, right=False)[: self._contrasts] if self._contrasts else []
            if right and (wrong or not self._contrasts):
                found[rollout.slot] = InContext(right[0], tuple(wrong))
        return found

    def _prompts(self, rollout: Rollout, others: Sequence[Rollout], *, right: bool) -> list[np.ndarray]:
        """The possible prompts with a right or with a wrong context, the preferred one first."""
        problem = self._task_sampler.task(rollout.task).problem
        if self._run.tasks.context == "none":
            return [rollout.prompt]
        if self._run.tasks.context == "sibling":
            siblings = [one for one in others if one.correct == right and one.finish == "stop"]
            texts: list[str | None] = [self._tokenizer.decode(one.tokens, skip_special_tokens=True) for one in siblings]
        else:
            texts = [problem.strategy if right else self._task_sampler.task(rollout.task + 1).problem.strategy]
        prompts = [
            np.array(build_prompt(problem.problem, text, tasks=self._run.tasks, tokenizer=self._tokenizer), np.int32)
            for text in texts
            if text
        ]
        return [prompt for prompt in prompts if self._has_room(prompt, rollout)]

    def _has_room(self, prompt: np.ndarray, rollout: Rollout) -> bool:
        if len(prompt) + len(rollout.tokens) <= self._longest:
            return True
        self._too_long += 1
        if self._too_long & (self._too_long - 1) == 0:  # at 1, 2, 4, 8, ...
            log.warning(
                "task %d: prompt with context and completion have %d tokens, more than the model's %d positions: the "
                "rollout is not compared with the teacher (%d so far)",
                rollout.task, len(prompt) + len(rollout.tokens), self._longest, self._too_long,
            )  # fmt: skip
        return False

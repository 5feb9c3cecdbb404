"""The prompts with which a teacher reads autonomous rollouts: the problem with its context (`tasks.context`).

For `sibling` the context is the completion of another rollout of the group, a correct one, or a wrong one for contrast.
For the others it is a text of the problem (`tasks.contexts`), and the contrast is the text of a following problem. The
source is the hub's, and a task is a function of its number, so no message contains these prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np

from sgpo_async.config.schema import Run
from sgpo_async.tasks.base import ProblemSource
from sgpo_async.tasks.contexts import other_strategy
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import Rollout

log = logging.getLogger(__name__)

Texts = Callable[[int, bool], Iterable[tuple[str | None, int | None]]]
"""(index of a rollout in its group, right or for contrast) -> texts of possible contexts, the preferred one first, each
with the slot of the sibling that wrote it, if one did."""


@dataclass(frozen=True)
class InContext:
    """The prompts of the teacher for one rollout, [L] int32 each."""

    right: np.ndarray
    wrong: tuple[np.ndarray, ...] = ()  # with contexts for contrast; none unless the objective compares with them
    sibling: int | None = None  # slot of the rollout whose completion is the right context


class Contexts:
    """Finds the teacher's prompts of a training task's rollouts."""

    def __init__(self, run: Run, source: ProblemSource, tokenizer: Any, *, longest: int = 2**31) -> None:
        """`longest`: the model's number of positions; prompts that leave no room for a completion are left out."""
        self._task_sampler, self._tokenizer, self._tasks = TaskSampler(run, source), tokenizer, run.tasks
        self._contrasts = run.algorithm.rlcsd.wrong if run.algorithm.objective == "rlcsd" else 0
        self._longest = longest
        self._too_long = 0

    def __call__(self, autonomous: Sequence[Rollout]) -> dict[int, InContext]:
        """Return the prompts for the rollouts of one group, by slot.

        A rollout is left out if it has no context, no contrast where one is needed, or one that is too long.
        """
        if self._tasks.context == "none":
            return {rollout.slot: InContext(rollout.prompt) for rollout in autonomous}
        texts = self._siblings(autonomous) if self._tasks.context == "sibling" else self._own_text(autonomous[0].task)
        prompt = self._prompt_of(autonomous[0].task)

        def fitting(index: int, right: bool, count: int) -> list[tuple[np.ndarray, int | None]]:
            prompts = ((prompt(text), sibling) for text, sibling in texts(index, right) if text)
            return list(islice((one for one in prompts if self._has_room(one[0], autonomous[index])), count))

        found = {}
        for index, rollout in enumerate(autonomous):
            right = fitting(index, True, 1)
            wrong = fitting(index, False, self._contrasts) if right else []
            if right and (wrong or not self._contrasts):
                (read, sibling), contrasts = right[0], tuple(one for one, _ in wrong)
                found[rollout.slot] = InContext(read, contrasts, sibling)
        return found

    def _own_text(self, task: int) -> Texts:
        """The text of the task's context is that of all rollouts."""
        problem = self._task_sampler.task(task).problem
        if not self._contrasts:
            return lambda _, right: [(problem.strategy if right else None, None)]
        wrong = other_strategy(problem, lambda distance: self._task_sampler.task(task + distance).problem)
        return lambda _, right: [(problem.strategy if right else wrong, None)]

    def _siblings(self, autonomous: Sequence[Rollout]) -> Texts:
        """Completions of other rollouts; the search begins with the next one, so that a group uses many of them."""
        text = cache(lambda index: self._tokenizer.decode(autonomous[index].tokens, skip_special_tokens=True))

        def texts(index: int, right: bool) -> Iterable[tuple[str, int]]:
            others = ((index + distance) % len(autonomous) for distance in range(1, len(autonomous)))
            fit = (i for i in others if autonomous[i].correct == right and autonomous[i].finish == "stop")
            return ((text(i), autonomous[i].slot) for i in fit)

        return texts

    def _prompt_of(self, task: int) -> Callable[[str], np.ndarray]:
        """A function that builds the prompt of a task with a text; that of a text is built once."""
        problem = self._task_sampler.task(task).problem.problem
        return cache(
            lambda text: np.array(build_prompt(problem, text, tasks=self._tasks, tokenizer=self._tokenizer), np.int32)
        )

    def _has_room(self, prompt: np.ndarray, rollout: Rollout) -> bool:
        if len(prompt) + len(rollout.tokens) <= self._longest:
            return True
        self._too_long += 1
        if self._too_long & (self._too_long - 1) == 0:  # at 1, 2, 4, 8, ...
            log.warning(
                "task %d: a context was left out: its prompt and the completion have %d tokens, more than the model's "
                "%d positions; shorten the contexts or lower rollout.max_new_tokens (%d so far)",
                rollout.task, len(prompt) + len(rollout.tokens), self._longest, self._too_long,
            )  # fmt: skip
        return False

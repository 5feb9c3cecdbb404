"""The responses of the training problems as tokens, for objectives that train on them.

A task is a function of its number. Therefore the learner reads the responses from the same source as the hub reads the
problems, and rollouts need not contain them.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from sgpo_async.config.schema import Run
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import ProblemSource
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.task_sampler import TaskSampler

log = logging.getLogger(__name__)


class Demonstrations:
    """Looks up the response of a training task, tokenised in the same form as a sampled completion."""

    def __init__(self, run: Run, source: ProblemSource, tokenizer: Any, *, longest: int = 2**31) -> None:
        """`longest`: the model's number of positions. Raises DataError if the tokenizer has no end token."""
        if tokenizer.eos_token_id is None:
            raise DataError(f"model.path: {run.model.path}: the tokenizer has no end token; set its eos_token")
        self._task_sampler, self._tokenizer = TaskSampler(run, source), tokenizer
        self._tasks, self._longest = run.tasks, longest
        self._too_long: set[str] = set()  # problems whose response has been left out

    def tokens(self, task: int) -> np.ndarray | None:
        """Return the response of this training task with the end token, [T] int32, or None if it has no response.

        A response that has no room behind its prompt within the model's positions is left out, with a warning.
        """
        problem = self._task_sampler.task(task).problem
        if problem.response is None:
            return None
        prompt = build_prompt(problem.problem, None, tasks=self._tasks, tokenizer=self._tokenizer)
        tokens = self._tokenizer.encode(problem.response, add_special_tokens=False)
        length = len(prompt) + len(tokens) + 1
        if length <= self._longest:
            return np.array([*tokens, self._tokenizer.eos_token_id], np.int32)
        if problem.id not in self._too_long:
            self._too_long.add(problem.id)
            log.warning(
                "%s: prompt and response have %d tokens, more than the model's %d positions: the response is left out "
                "(%d so far)", problem.id, length, self._longest, len(self._too_long),
            )  # fmt: skip
        return None

"""The responses of the training problems as tokens, for objectives that train on them.

A task is a function of its number. Therefore the learner reads the responses from the same source as the hub reads the
problems, and rollouts need not contain them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgpo_async.config.schema import Run
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import ProblemSource
from sgpo_async.tasks.task_sampler import TaskSampler


class Demonstrations:
    """Looks up the response of a training task, tokenised in the same form as a sampled completion."""

    def __init__(self, run: Run, source: ProblemSource, tokenizer: Any) -> None:
        """Raises DataError if the tokenizer has no end token."""
        if tokenizer.eos_token_id is None:
            raise DataError(f"model.path: {run.model.path}: the tokenizer has no end token; set its eos_token")
        self._task_sampler, self._tokenizer = TaskSampler(run, source), tokenizer

    def tokens(self, task: int) -> np.ndarray | None:
        """Return the response of this training task with the end token, [T] int32, or None if it has no response."""
        response = self._task_sampler.task(task).problem.response
        if response is None:
            return None
        tokens = self._tokenizer.encode(response, add_special_tokens=False)
        return np.array([*tokens, self._tokenizer.eos_token_id], np.int32)

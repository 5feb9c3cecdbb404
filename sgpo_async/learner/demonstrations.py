"""The problems' own responses as tokens, for objectives that train on them.

A task is a function of its number, so the learner reads the responses where the hub reads the problems; no rollout
carries them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgpo_async.config.schema import Run
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import ProblemSource
from sgpo_async.tasks.task_sampler import TaskSampler


class Demonstrations:
    """Looks up the response of a training task: what an actor would have sampled had it written that."""

    def __init__(self, run: Run, source: ProblemSource, tokenizer: Any) -> None:
        """Raises DataError if the tokenizer has no end token."""
        if tokenizer.eos_token_id is None:
            raise DataError(f"model.path: {run.model.path}: the tokenizer has no end token, with which a response ends")
        self._task_sampler, self._tokenizer = TaskSampler(run, source), tokenizer

    def tokens(self, task: int) -> np.ndarray | None:
        """[T] int32, with the end token, to follow the plain prompt of this training task; None without a response."""
        response = self._task_sampler.task(task).problem.response
        if response is None:
            return None
        own = self._tokenizer.encode(response, add_special_tokens=False)
        return np.array([*own, self._tokenizer.eos_token_id], np.int32)

"""The problems' own responses as tokens, for objectives that train on them.

A task is a function of its number, so the learner reads the responses where the hub reads the problems; no rollout
carries them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgpo_async.config.schema import Run
from sgpo_async.errors import DataError
from sgpo_async.tasks.curriculum import Curriculum
from sgpo_async.tasks.sources import source_of


class Demonstrations:
    """Looks up the response of a training task: what an actor would have sampled had it written that."""

    def __init__(self, run: Run, tokenizer: Any) -> None:
        """Open the run's source. Raises DataError if it is not usable, or the tokenizer has no end token."""
        if tokenizer.eos_token_id is None:
            raise DataError(f"model.path: {run.model.path}: the tokenizer has no end token, with which a response ends")
        self._curriculum, self._tokenizer = Curriculum(run, source_of(run)), tokenizer

    def tokens(self, task: int) -> np.ndarray | None:
        """[T] int32, with the end token, to follow the plain prompt of this training task; None without a response."""
        response = self._curriculum.task(task).problem.response
        if response is None:
            return None
        own = self._tokenizer.encode(response, add_special_tokens=False)
        return np.array([*own, self._tokenizer.eos_token_id], np.int32)

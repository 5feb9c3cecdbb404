"""The teacher's values for the target tokens, if the behaviour policy is the teacher.

Its engine reported its k most likely tokens with the rollouts, so the comparison needs no forward and no copy. Other
teachers give hidden states, from a forward pass, and the whole vocabulary is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sgpo_async.algorithm import TopDivergence
from sgpo_async.errors import DataError
from sgpo_async.wire.records import Rollout


def top_k_targets(rollouts: Sequence[Rollout], *, k: int, kind: str, device: torch.device) -> TopDivergence:
    """Collect the top-k log-probabilities of these targets. Raises DataError if a rollout has another number than k."""
    for rollout in rollouts:
        reported = 0 if rollout.top_tokens is None else len(rollout.top_tokens) // len(rollout.tokens)
        if reported != k:
            raise DataError(
                f"task {rollout.task}: its guided rollouts must have the {k} most likely tokens at each position, "
                f"got {reported}; resume with the algorithm.teacher and algorithm.teacher_top_k of the run's start"
            )
    tokens, log_p = (
        _concatenate([getattr(rollout, name).reshape(-1, k)[rollout.sampled] for rollout in rollouts])
        for name in ("top_tokens", "top_logprobs")
    )
    log_targets = _concatenate([rollout.logprobs[rollout.sampled] for rollout in rollouts])
    return TopDivergence(tokens.to(device, torch.int64), log_p.to(device), log_targets.to(device), kind)


def _concatenate(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))

"""The teacher's values for the target tokens, and the divergence of the student from them.

The comparison runs inside the policy's forward, because only there is the output matrix gathered.

    HiddenStateTargets   hidden states of the teacher, from a forward over      compares the whole vocabulary
                         the guided prompts
    TopKTargets          the behaviour policy's most likely tokens, which the   compares k tokens and the rest;
                         engine reported with the rollouts                      needs no forward and no copy
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sgpo_async.algorithm import linear_divergence, linear_top_logprobs, top_divergence
from sgpo_async.errors import DataError
from sgpo_async.wire.records import Rollout


class TeacherTargets(Protocol):
    """The teacher's values for the K target tokens of a micro-batch."""

    def compare(self, states: Tensor, head: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Compute d [K] with gradient, and the teacher's log-probability [K] of the target tokens.

        Args:
            states: [K, H], the student's hidden states after the plain prompt.
            head: [V, H], the policy's output matrix.
            targets: [K] int64.
            temperature: the sampling temperature of the rollouts.
        """


class HiddenStateTargets(NamedTuple):
    """The hidden states of a teacher that read the targets after the guided prompt."""

    states: Tensor  # [K, H']
    matrix: Tensor | None  # its output matrix [V, H']; None for the matrix of the policy
    kind: str  # a key of DIVERGENCES

    def compare(self, states: Tensor, head: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """See `TeacherTargets`."""
        matrix = head.detach() if self.matrix is None else self.matrix
        teacher, student = (self.states, matrix), (states, head)
        return linear_divergence(teacher, student, targets, kind=self.kind, temperature=temperature)


class TopKTargets(NamedTuple):
    """The k most likely tokens of the behaviour policy at each position."""

    tokens: Tensor  # [K, k] int64
    log_p: Tensor  # [K, k]
    log_targets: Tensor  # [K], log-probabilities of the sampled tokens
    kind: str

    def compare(self, states: Tensor, head: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """See `TeacherTargets`. The prefix needs no correction, because the teacher itself sampled the rollout."""
        log_q = linear_top_logprobs(states, head, self.tokens, temperature=temperature)
        d = top_divergence(self.log_p.to(log_q.dtype), log_q, kind=self.kind)
        return d, self.log_targets.to(d.dtype)


def top_k_targets(rollouts: Sequence[Rollout], *, k: int, kind: str, device: torch.device) -> TopKTargets:
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
    return TopKTargets(tokens.to(device, torch.int64), log_p.to(device), log_targets.to(device), kind)


def _concatenate(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))

"""What a teacher says of the targets' tokens, and how the student is compared with it: inside the policy's own forward,
where its output matrix is whole.

    HiddenStateTargets   the teacher's hidden states, from a forward over the guided prompts     the whole vocabulary
    TopKTargets      what the engine told as it sampled: the behaviour policy's likeliest    k tokens and the rest
                  tokens, which came with the rollouts                                    no forward, no copy
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
    """The teacher of a micro-batch's K target tokens."""

    def compare(self, states: Tensor, head: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """d [K] with gradient, and the teacher's log-probability [K] of the target tokens.

        Args:
            states: [K, H], the student's hidden states after the plain prompt.
            head: [V, H], the policy's output matrix.
            targets: [K] int64.
            temperature: that of the rollouts.
        """


class HiddenStateTargets(NamedTuple):
    """A teacher that read the targets after the guided prompt."""

    states: Tensor  # [K, H']
    matrix: Tensor | None  # its output matrix [V, H']; None: the policy's own
    kind: str  # a key of DIVERGENCES

    def compare(self, states: Tensor, head: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """See `TeacherTargets`."""
        matrix = head.detach() if self.matrix is None else self.matrix
        teacher, student = (self.states, matrix), (states, head)
        return linear_divergence(teacher, student, targets, kind=self.kind, temperature=temperature)


class TopKTargets(NamedTuple):
    """The behaviour policy, of whom k tokens are known at each place."""

    tokens: Tensor  # [K, k] int64
    log_p: Tensor  # [K, k]
    log_targets: Tensor  # [K], of the tokens that were sampled
    kind: str

    def compare(self, states: Tensor, head: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """See `TeacherTargets`. No prefix needs a correction: what sampled the rollout is what teaches."""
        log_q = linear_top_logprobs(states, head, self.tokens, temperature=temperature)
        d = top_divergence(self.log_p.to(log_q.dtype), log_q, kind=self.kind)
        return d, self.log_targets.to(d.dtype)


def top_k_targets(rollouts: Sequence[Rollout], *, k: int, kind: str, device: torch.device) -> TopKTargets:
    """What the engine reported for these targets. Raises DataError if it was asked for another teacher."""
    for rollout in rollouts:
        told = 0 if rollout.top_tokens is None else len(rollout.top_tokens) // len(rollout.tokens)
        if told != k:
            raise DataError(
                f"task {rollout.task}: its guided rollouts came with {told} likely tokens at each place, and {k} "
                f"teach; go on with the algorithm.teacher and teacher_top_k that the run began with"
            )
    tokens, log_p = (
        _joined([getattr(rollout, name) for rollout in rollouts]) for name in ("top_tokens", "top_logprobs")
    )
    log_targets = _joined([rollout.logprobs for rollout in rollouts])
    return TopKTargets(
        tokens.view(-1, k).to(device, torch.int64), log_p.view(-1, k).to(device), log_targets.to(device), kind
    )


def _joined(arrays: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))

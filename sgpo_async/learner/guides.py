"""What a teacher says of the targets' tokens, and how the student is compared with it: inside the policy's own forward,
where its output matrix is whole.

    HiddenGuide   the teacher's hidden states, from a forward over the guided prompts     the whole vocabulary
    TopGuide      what the engine told as it sampled: the behaviour policy's likeliest    k tokens and the rest
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


class Guide(Protocol):
    """The teacher of a micro-batch's K target tokens."""

    def compare(self, states: Tensor, head: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """d [K] with gradient, and the teacher's log-probability [K] of the target tokens.

        Args:
            states: [K, H], the student's hidden states after the plain prompt.
            head: [V, H], the policy's output matrix.
            targets: [K] int64.
            temperature: that of the rollouts.
        """


class HiddenGuide(NamedTuple):
    """A teacher that read the targets after the guided prompt."""

    states: Tensor  # [K, H']
    matrix: Tensor | None  # its output matrix [V, H']; None: the policy's own
    kind: str  # a key of DIVERGENCES

    def compare(self, states: Tensor, head: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """See `Guide`."""
        matrix = head.detach() if self.matrix is None else self.matrix
        teacher, student = (self.states, matrix), (states, head)
        return linear_divergence(teacher, student, targets, kind=self.kind, temperature=temperature)


class TopGuide(NamedTuple):
    """The behaviour policy, of whom k tokens are known at each place."""

    tokens: Tensor  # [K, k] int64
    log_p: Tensor  # [K, k]
    log_targets: Tensor  # [K], of the tokens that were sampled
    kind: str

    def compare(self, states: Tensor, head: Tensor, targets: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """See `Guide`. No prefix needs a correction: what sampled the rollout is what teaches."""
        log_q = linear_top_logprobs(states, head, self.tokens, temperature=temperature)
        d = top_divergence(self.log_p.to(log_q.dtype), log_q, kind=self.kind)
        return d, self.log_targets.to(d.dtype)


def top_guide(rollouts: Sequence[Rollout], *, kind: str, device: torch.device) -> TopGuide:
    """The guide of these targets, one after another. Raises DataError if they were sampled for another teacher."""
    tokens, log_p = [], []
    for rollout in rollouts:
        if rollout.top_tokens is None or rollout.top_logprobs is None:
            raise DataError(
                f"task {rollout.task}: its guided rollouts came without likely tokens, so that algorithm.teacher="
                f"behaviour cannot be taken up in the middle of a run; go on with the teacher that it began with"
            )
        tokens.append(rollout.top_tokens.reshape(len(rollout.tokens), -1))
        log_p.append(rollout.top_logprobs.reshape(len(rollout.tokens), -1))
    return TopGuide(
        torch.from_numpy(np.concatenate(tokens)).to(device, torch.int64),
        torch.from_numpy(np.concatenate(log_p)).to(device),
        torch.from_numpy(np.concatenate([rollout.logprobs for rollout in rollouts])).to(device),
        kind,
    )

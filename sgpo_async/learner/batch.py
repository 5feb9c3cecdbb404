"""A rank's shard as the terms of Eq. 7: which sequences carry which loss, with which constant weight.

    autonomous i:  plain prompt + o_i              GRPO, weight 1/(P G1)
    target k:      plain prompt + o+  (student)    distillation, weight alpha(q)/P
                   guided prompt + o+ (teacher)    no gradient

The weights are fixed here, from the whole batch's P, before anything is packed: how sequences are then divided over
micro-batches and ranks cannot change the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from sgpo_async.algorithm import adaptive_weight, group_advantages, loss_weights, select_reachable
from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.packing import Tokens
from sgpo_async.wire.records import Rollout, Shard


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step: N autonomous rollouts, and K targets of which o+ is distilled."""

    version: int  # of the weights that are trained; lag of a token = this - its own
    autonomous: tuple[Rollout, ...]
    advantages: np.ndarray  # [N]
    weights: np.ndarray  # [N], 1/(P G1)
    targets: tuple[Rollout, ...]  # o+ of each problem that has one and alpha > 0
    plain_prompts: tuple[np.ndarray, ...]  # [K] of int32
    target_weights: np.ndarray  # [K], alpha/P

    @property
    def students(self) -> list[Tokens]:
        """All sequences with gradient: the N autonomous ones, then the K targets after the plain prompt."""
        own = [Tokens(rollout.prompt, rollout.tokens) for rollout in self.autonomous]
        return own + [Tokens(q, o.tokens) for q, o in zip(self.plain_prompts, self.targets, strict=True)]

    @property
    def teachers(self) -> list[Tokens]:
        """The K targets after the guided prompt that they were sampled from."""
        return [Tokens(rollout.prompt, rollout.tokens) for rollout in self.targets]

    def lags(self, rollout: Rollout) -> np.ndarray:
        """Versions behind, per token: [T]."""
        return self.version - rollout.token_versions()


def from_shard(shard: Shard, algorithm: Algorithm) -> Batch:
    """Advantages (Eq. 1), targets (Eq. 4) and weights (Eq. 6, 7) of a shard's groups."""
    groups = [list(group) for _, group in groupby(shard.rollouts, key=lambda rollout: rollout.task)]
    terms = [_terms(group, problems=shard.problems, algorithm=algorithm) for group in groups]
    distilled = [term for term in terms if term.target is not None]
    return Batch(
        version=shard.version,
        autonomous=tuple(rollout for term in terms for rollout in term.autonomous),
        advantages=np.array([advantage for term in terms for advantage in term.advantages]),
        weights=np.array([term.weight for term in terms for _ in term.autonomous]),
        targets=tuple(term.target for term in distilled if term.target is not None),
        plain_prompts=tuple(term.autonomous[0].prompt for term in distilled),
        target_weights=np.array([term.target_weight for term in distilled]),
    )


@dataclass(frozen=True)
class _Terms:
    autonomous: list[Rollout]
    advantages: list[float]
    weight: float
    target: Rollout | None
    target_weight: float


def _terms(group: list[Rollout], *, problems: int, algorithm: Algorithm) -> _Terms:
    autonomous = [rollout for rollout in group if not rollout.guided]
    guided = [rollout for rollout in group if rollout.guided]
    assert autonomous, f"task {group[0].task} has no autonomous rollout"
    rewards = torch.tensor([rollout.reward for rollout in autonomous], dtype=torch.float64)
    target, alpha = _target(rewards, guided, algorithm)
    weights = loss_weights(alpha, torch.tensor([target is not None]), problems=problems, group_size=len(autonomous))
    weight = float(weights.guided)
    return _Terms(
        autonomous, group_advantages(rewards).tolist(), weights.autonomous, target if weight else None, weight
    )


def _target(rewards: torch.Tensor, guided: list[Rollout], algorithm: Algorithm) -> tuple[Rollout | None, torch.Tensor]:
    """o+ (Eq. 4) and alpha(q) [1] (Eq. 6) of one problem; GRPO has neither."""
    if algorithm.objective == "grpo" or not guided:
        return None, torch.zeros(1, dtype=torch.float64)
    correct = torch.tensor([[rollout.unguided_logprob is not None for rollout in guided]])
    sums = torch.tensor([[rollout.unguided_logprob or 0.0 for rollout in guided]], dtype=torch.float64)
    index, found = select_reachable(sums, correct)
    p_guide = torch.tensor([rollout.reward for rollout in guided], dtype=torch.float64).mean()
    alpha = adaptive_weight(
        rewards.mean()[None],
        p_guide[None],
        alpha0=algorithm.alpha0,
        gamma=algorithm.gamma,
        alpha_max=algorithm.alpha_max,
    )
    return guided[int(index)] if found else None, alpha

"""LUFFY: the demonstration is an additional member of the group, with policy shaping.

Source: Yan et al., "Learning to Reason under Off-Policy Guidance", https://arxiv.org/abs/2504.14945v1. Its mixed-policy
GRPO (Eq. 4) with policy shaping (Eq. 5), as a loss:

    L = -1/Z ( sum_t f(pi(y_t)) A_y + sum_i sum_t clipped(r_it, A_i) )     f(p) = p/(p + gamma), Z = |y| + sum_i |o_i|

Advantages are standardised over the rollouts and the demonstration y together, with R(y) = 1 (with other rewards than 0
and 1: `tasks.solved_at`, the least reward of a correct rollout). The behaviour probability of y is taken as 1, and its
ratio is not clipped. The sum over all tokens of the group is divided by one Z, so a long sequence has a larger weight
than in GRPO: the weight of a sequence, whose loss is a mean over its tokens, is |o|/Z. This module implements the
equation of the paper. The authors' training script instead drops std and Z, like Dr. GRPO, and the clip of rollouts,
which has no effect with one optimiser step per batch.
"""

from __future__ import annotations

import torch

from sgpo_async.algorithm import group_advantages
from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import Likelihood, PolicyGradient, TaskGroup, Trained, rewards_of
from sgpo_async.learner.objectives.grpo import grpo
from sgpo_async.learner.packing import Tokens


def luffy(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Use the loss above, averaged over problems; for a problem without a demonstration use GRPO."""
    if group.demonstration is None:
        return grpo(group, algorithm)
    solved = torch.full((1, 1), group.autonomous[0].solved_at, dtype=torch.float64)
    *advantages, own = group_advantages(torch.cat((rewards_of(group.counted), solved), dim=-1))[0].tolist()
    tokens = len(group.demonstration) + sum(int(rollout.sampled.sum()) for rollout in group.counted)
    rollouts = zip(group.counted, advantages, strict=True)
    return Trained(
        policy_gradient=[
            PolicyGradient(rollout, advantage, int(rollout.sampled.sum()) / tokens / group.problems)
            for rollout, advantage in rollouts
        ],
        likelihood=[_shaped(group, own * len(group.demonstration) / tokens / group.problems)] if own else [],
    )


def _shaped(group: TaskGroup, weight: float) -> Likelihood:
    assert group.demonstration is not None
    return Likelihood(Tokens(group.plain_prompt, group.demonstration), weight, shaped=True)

"""LUFFY: the demonstration as one more member of the group, its policy gradient shaped.

Source: Yan et al., "Learning to Reason under Off-Policy Guidance", https://arxiv.org/abs/2504.14945v1. Its mixed-policy
GRPO (Eq. 4) with policy shaping (Eq. 5), as a loss:

    L = -1/Z ( sum_t f(pi(y_t)) A_y + sum_i sum_t clipped(r_it, A_i) )     f(p) = p/(p + gamma), Z = |y| + sum_i |o_i|

Advantages are standardised over the rollouts and the demonstration y together, R(y) = 1; the behaviour probability of y
is taken as 1, and its ratio is not clipped. One Z divides all tokens of the group, so a long sequence weighs more than
in GRPO: of a sequence whose loss is a mean over its tokens the weight is |o|/Z. The authors' training script drops std
and Z, as Dr. GRPO does, and the clip of rollouts, which one optimiser step per batch never reaches; this is the paper's
equation.
"""

from __future__ import annotations

import torch

from sgpo_async.algorithm import group_advantages
from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import Likelihood, PolicyGradient, TaskGroup, Trained
from sgpo_async.learner.objectives.grpo import grpo
from sgpo_async.learner.packing import Tokens


def luffy(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """The loss above, averaged over problems; of a problem without a demonstration, GRPO's."""
    if group.demonstration is None:
        return grpo(group, algorithm)
    rewards = torch.cat((group.rewards(guided=False), torch.ones(1, 1, dtype=torch.float64)), dim=-1)
    *advantages, own = group_advantages(rewards)[0].tolist()
    tokens = len(group.demonstration) + sum(len(rollout.tokens) for rollout in group.autonomous)
    rollouts = zip(group.autonomous, advantages, strict=True)
    return Trained(
        policy_gradient=[
            PolicyGradient(rollout, advantage, len(rollout.tokens) / tokens / group.problems)
            for rollout, advantage in rollouts
        ],
        likelihood=[_shaped(group, own * len(group.demonstration) / tokens / group.problems)] if own else [],
    )


def _shaped(group: TaskGroup, weight: float) -> Likelihood:
    assert group.demonstration is not None
    return Likelihood(Tokens(group.plain_prompt, group.demonstration), weight, shaped=True)

"""POPE, privileged on-policy exploration: GRPO on the plain prompts and on the guided ones, side by side.

Source: https://arxiv.org/abs/2601.18779, read second-hand. The guidance is the beginning of a solution in the prompt
(`tasks.context=partial-response`); nothing is distilled: what is learned with guidance has to carry over by itself. The
paper mixes both kinds of prompts one to one and keeps guided prompts to problems that the policy fails.
"""

from __future__ import annotations

import torch

from sgpo_async.algorithm import group_advantages
from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import PolicyGradient, TaskGroup, Trained
from sgpo_async.learner.objectives.grpo import grpo
from sgpo_async.wire.records import Rollout


def pope(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Train each rollout with weight 1/(P G), G = G1 + G2; advantages compare rollouts of one prompt."""
    weight = 1 / (group.problems * (len(group.autonomous) + len(group.guided)))
    guided = [PolicyGradient(rollout, advantage, weight) for rollout, advantage in guided_advantages(group, algorithm)]
    plain = [PolicyGradient(item.rollout, item.advantage, weight) for item in grpo(group, algorithm).policy_gradient]
    return Trained(policy_gradient=plain + guided)


def guided_advantages(group: TaskGroup, algorithm: Algorithm) -> list[tuple[Rollout, float]]:
    """The guided rollouts in the policy gradient, with advantages within their own group."""
    taken = [rollout for rollout in group.guided if rollout.finish == "stop" or not group.mask_cut]
    if not taken:
        return []
    rewards = torch.tensor([[rollout.reward for rollout in taken]], dtype=torch.float64)
    return list(zip(taken, group_advantages(rewards, algorithm.advantage)[0].tolist(), strict=True))

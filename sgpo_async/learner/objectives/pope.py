"""POPE, privileged on-policy exploration: GRPO on the plain prompts and on the guided ones, side by side.

Source: https://arxiv.org/abs/2601.18779, read second-hand. The guidance is the beginning of a solution in the prompt
(`tasks.context=partial-response`); nothing is distilled: what is learned with guidance has to carry over by itself. The
paper mixes both kinds of prompts one to one and keeps guided prompts to problems that the policy fails.
"""

from __future__ import annotations

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import PolicyGradient, TaskGroup, Trained


def pope(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Train each rollout with weight 1/(P G), G = G1 + G2; advantages compare rollouts of one prompt."""
    weight = 1 / (group.problems * (len(group.autonomous) + len(group.guided)))
    pairs = group.with_advantages(algorithm) + group.with_advantages(algorithm, guided=True)
    return Trained(policy_gradient=[PolicyGradient(rollout, advantage, weight) for rollout, advantage in pairs])

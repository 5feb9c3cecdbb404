"""GRPO on the autonomous rollouts (Eq. 1 of arXiv 2606.24064): the mean loss over tokens, rollouts and problems."""

from __future__ import annotations

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import PolicyGradient, TaskGroup, Trained


def grpo(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Train the autonomous rollouts with weight 1/(P G1), also if some of the G1 are masked.

    Guided rollouts never enter the group.
    """
    weight = 1 / (group.problems * len(group.autonomous))
    pairs = group.with_advantages(algorithm)
    return Trained(policy_gradient=[PolicyGradient(rollout, advantage, weight) for rollout, advantage in pairs])

"""SDPO, self-distilled policy optimisation: the context is a success of the same group.

Source: "Reinforcement Learning via Self-Distillation", https://arxiv.org/abs/2601.20802, and its authors' code:

    L = (1 - alpha) L_GRPO + alpha L_KD,   L_KD = 1/|o| sum_t D( sg[p(.|q,c,o_<t)], pi(.|q,o_<t) )

on every rollout that has a context c. D is the divergence that `divergence` names: the Jensen-Shannon divergence in the
authors' setting for rewards alone, KL(pi || p) in the paper's equation. Their default is alpha = 1, their teacher p a
moving average with decay 0.95.
The authors divide by all tokens of the batch; here, as in every objective, each rollout has its own mean.
"""

from __future__ import annotations

from dataclasses import replace

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import TaskGroup, Trained
from sgpo_async.learner.objectives.grpo import grpo


def sdpo(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Train the autonomous rollouts with weights (1 - alpha)/(P G1) and alpha/(P G1)."""
    alpha, weight = algorithm.alpha, 1 / (group.problems * len(group.autonomous))
    by_reward = grpo(group, algorithm).policy_gradient if alpha < 1 else []
    distilled = group.distilled(group.autonomous, alpha * weight, skip=algorithm.distil_skip)
    return Trained(
        policy_gradient=[replace(item, weight=(1 - alpha) * item.weight) for item in by_reward],
        distillation=distilled,
        metrics={"alpha": alpha if distilled else 0.0},
    )

"""RLSD and RLCSD: GRPO, in which a teacher with a context says which tokens of a rollout earned the reward.

Sources: https://arxiv.org/abs/2604.03128 and https://arxiv.org/abs/2606.11709, with their authors' code.
`algorithm.credit` computes the advantages of the tokens: RLSD's from one context, RLCSD's from a right one and up to
four wrong ones.
"""

from __future__ import annotations

from dataclasses import replace

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import TaskGroup, Trained
from sgpo_async.learner.objectives.grpo import grpo


def rlsd(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Train like GRPO; a rollout without a context keeps one advantage for all of its tokens."""
    return Trained(
        policy_gradient=[
            replace(item, context=group.contexts.get(item.rollout.slot)) if item.advantage else item
            for item in grpo(group, algorithm).policy_gradient
        ]
    )


def rlcsd(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Train like GRPO the rollouts that have a right and a wrong context, and no others."""
    return Trained(policy_gradient=[item for item in rlsd(group, algorithm).policy_gradient if item.context])

"""KDRL and SDPG: GRPO, and distillation of a teacher on the same rollouts.

    L = L_GRPO + alpha L_KD,   L_KD = 1/|o| sum_t KL( pi(.|q,o_<t) || sg[p(.|q,c,o_<t)] )

KDRL (https://arxiv.org/abs/2506.02208, read second-hand) has a larger model as the teacher, without a context, and
estimates the KL by (log pi/p)^2 / 2 on the sampled tokens; here the teacher is the policy itself with the context, and
the KL is the exact sum over the vocabulary, of which that estimate has the gradient in the mean. It may distil wrong
rollouts only (`distilled=wrong`). SDPG (https://arxiv.org/abs/2606.04036, its authors' page and code) distils those of
positive advantage (`distilled=advantage`) and adds a KL to the initial weights (`reference_kl`).
"""

from __future__ import annotations

from dataclasses import replace

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import TaskGroup, Trained
from sgpo_async.learner.objectives.grpo import grpo
from sgpo_async.learner.objectives.opsd import opsd


def kdrl(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Train the autonomous rollouts like GRPO, and distil on those that `distilled` names with weight alpha/(P G1)."""
    return replace(opsd(group, algorithm), policy_gradient=grpo(group, algorithm).policy_gradient)

"""HPT, hybrid post-training: SFT on problems where the policy fails, GRPO on the others.

Source: Lv et al., "Towards a Unified View of Large Language Model Post-Training", https://arxiv.org/abs/2509.04419:
L = a L_RL + b L_SFT per problem, where (a, b) = (0, 1) if the share of correct rollouts is at most a gate, else (1, 0).
L_SFT is the mean over the tokens of the demonstration. In the paper the gate is 0, and 2 of 8 for weaker models.
"""

from __future__ import annotations

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import TaskGroup, Trained
from sgpo_async.learner.objectives.grpo import grpo
from sgpo_async.learner.objectives.sft import sft


def hpt(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Use SFT if there is a demonstration and at most `hpt_gate` autonomous rollouts are correct, else GRPO."""
    correct = int(group.correct(guided=False).sum())
    supervised = group.demonstration is not None and correct <= algorithm.hpt_gate
    return sft(group, algorithm) if supervised else grpo(group, algorithm)

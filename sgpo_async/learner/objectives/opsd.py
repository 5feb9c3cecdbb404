"""OPSD and SDFT, on-policy self-distillation: the policy's own rollouts, read by a teacher that knows the solution.

    L = 1/|o| sum_t KL( p(.|q,c,o_<t) || pi(.|q,o_<t) ),   o ~ pi(.|q),   without rewards

OPSD ("Self-Distilled Reasoner", https://arxiv.org/abs/2601.18734: its authors' code, and notes on its third version):
the context c is the solution, the teacher p the initial weights, and a term of the sum over the vocabulary counts at
most 0.05 (`kl_clip`).

SDFT ("Self-Distillation Enables Continual Learning", https://arxiv.org/abs/2601.19897, and a copy of its authors'
code): c is a demonstration, p a moving average, and the first three tokens are not distilled (`distil_skip`), because a
teacher that sees a demonstration begins by speaking of it. The paper writes the reverse KL, the code computes the
forward one.
"""

from __future__ import annotations

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import TaskGroup, Trained
from sgpo_async.wire.records import Rollout


def opsd(group: TaskGroup, algorithm: Algorithm) -> Trained:
    """Distil on the autonomous rollouts that `distilled` names, with weight alpha/(P G1) each."""
    weight = algorithm.alpha / (group.problems * len(group.autonomous))
    found = group.distilled(chosen(group, algorithm), weight, skip=algorithm.distil_skip)
    return Trained(distillation=found, metrics={"alpha": algorithm.alpha if found else 0.0})


def chosen(group: TaskGroup, algorithm: Algorithm) -> list[Rollout]:
    """The autonomous rollouts that `algorithm.distilled` names."""
    if algorithm.distilled == "wrong":
        return [rollout for rollout in group.autonomous if not rollout.correct]
    if algorithm.distilled == "advantage":
        return [rollout for rollout, advantage in group.with_advantages(algorithm) if advantage > 0]
    return list(group.autonomous)

"""IW-OPD, importance-weighted on-policy distillation: a token weighs less if policy and teacher differed before it.

Source: https://arxiv.org/abs/2606.22600 and its authors' code. The advantage of each token is its weighted log-ratio to
the teacher (`algorithm.credit`); rewards are not used. The authors' teacher is a larger model without a context.
"""

from __future__ import annotations

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import PolicyGradient, TaskGroup, Trained


def iw_opd(group: TaskGroup, _algorithm: Algorithm) -> Trained:
    """Train every autonomous rollout that has a context with weight 1/(P G1)."""
    weight = 1 / (group.problems * len(group.autonomous))
    pairs = ((rollout, group.contexts.get(rollout.slot)) for rollout in group.counted)
    return Trained(
        policy_gradient=[PolicyGradient(rollout, 1.0, weight, context=context) for rollout, context in pairs if context]
    )

"""Supervised fine-tuning on the response of the problem: -1/(P |y|) sum_t log pi(y_t|q,y_<t)."""

from __future__ import annotations

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives.base import Likelihood, TaskGroup, Trained
from sgpo_async.learner.packing import Tokens


def sft(group: TaskGroup, _algorithm: Algorithm) -> Trained:
    """Train the demonstration with weight 1/P. A problem without one is not trained but still counts in P."""
    if group.demonstration is None:
        return Trained()
    return Trained(likelihood=[Likelihood(Tokens(group.plain_prompt, group.demonstration), 1 / group.problems)])

"""A rank's shard as weighted sequences: which carries which loss, with which constant weight.

The objective sets the weights, from the whole batch's P, before anything is packed: how sequences are then divided over
micro-batches and ranks cannot change the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives import OBJECTIVES
from sgpo_async.learner.objectives.base import Distillation, Likelihood, PolicyGradient, TaskGroup
from sgpo_async.learner.packing import Tokens
from sgpo_async.wire.records import Rollout, Shard

Responses = Callable[[int], np.ndarray | None]
"""Task number -> the tokens of its problem's own response; None without one."""


class Sequences(NamedTuple):
    """Sequences with gradient, kind by kind. Any two parts of a batch together have the loss of both."""

    policy_gradient: list[PolicyGradient]
    distillation: list[Distillation]
    likelihood: list[Likelihood]

    @property
    def students(self) -> list[Tokens]:
        """All of them, in the order of the kinds."""
        return [item.student for kind in self for item in kind]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Completion tokens of each kind."""
        a, k, n = (sum(len(item.student.completion) for item in kind) for kind in self)
        return a, k, n

    def part(self, order: Iterable[int]) -> Sequences:
        """Those at these places, ascending, among `students`."""
        first, second = len(self.policy_gradient), len(self.policy_gradient) + len(self.distillation)
        order = list(order)
        return Sequences(
            [self.policy_gradient[i] for i in order if i < first],
            [self.distillation[i - first] for i in order if first <= i < second],
            [self.likelihood[i - second] for i in order if i >= second],
        )


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step."""

    version: int  # of the weights that are trained; lag of a token = this - its own
    sequences: Sequences
    figures: tuple[Mapping[str, float], ...]  # of each task, some of FIGURES
    teachers: list[Tokens]  # the targets after their guided prompts; none if the behaviour policy teaches
    forward_only: int  # tokens that run through a forward without gradient: the teacher's, corrected pass rates'


def lags(rollout: Rollout, version: int) -> np.ndarray:
    """Versions behind `version`, per token: [T]."""
    return version - rollout.token_versions()


def from_shard(
    shard: Shard,
    algorithm: Algorithm,
    *,
    responses: Responses | None = None,
    log_rho: Iterable[float] | None = None,
    skip_uniform: bool = False,
) -> Batch:
    """The sequences of a shard's groups, as `algorithm.objective` weighs them.

    Args:
        responses: of the problems, for objectives that train on them.
        log_rho: log pi/mu of each whole rollout in the shard's order, for corrected pass rates.
        skip_uniform: leave rollouts of advantage 0 out, whose gradient is 0.
    """
    objective = OBJECTIVES[algorithm.objective]
    places = [(rollout.task, rollout.slot) for rollout in shard.rollouts]
    ratios = dict(zip(places, log_rho, strict=True)) if log_rho is not None else None
    trained = []
    for task, group in groupby(shard.rollouts, key=lambda rollout: rollout.task):
        rollouts = tuple(group)
        autonomous = tuple(rollout for rollout in rollouts if not rollout.guided)
        assert autonomous, f"task {task} has no autonomous rollout"
        known = TaskGroup(
            autonomous=autonomous,
            guided=tuple(rollout for rollout in rollouts if rollout.guided),
            demonstration=responses(task) if responses else None,
            log_rho={rollout.slot: ratios[task, rollout.slot] for rollout in rollouts} if ratios else None,
            problems=shard.problems,
        )
        trained.append(objective(known, algorithm))
    targets = [item for task in trained for item in task.distillation]
    teachers = [] if algorithm.teacher == "behaviour" else [item.teacher for item in targets]
    rated = [Tokens(rollout.prompt, rollout.tokens) for rollout in shard.rollouts] if ratios else []
    return Batch(
        version=shard.version,
        sequences=Sequences(
            [item for task in trained for item in task.policy_gradient if item.advantage or not skip_uniform],
            targets,
            [item for task in trained for item in task.likelihood],
        ),
        figures=tuple(task.figures for task in trained),
        teachers=teachers,
        forward_only=sum(tokens.length for tokens in teachers + rated),
    )

"""Turn a rank's shard into weighted sequences: each sequence has a kind of loss and a constant weight.

The objective sets the weights from P, the number of problems in the whole batch, before the sequences are packed.
Therefore the division of sequences over micro-batches and ranks cannot change the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives import OBJECTIVES
from sgpo_async.learner.objectives.base import Distillation, Likelihood, PolicyGradient, TaskGroup, rollout_after
from sgpo_async.learner.packing import Tokens
from sgpo_async.wire.records import Rollout, Shard

Responses = Callable[[int], np.ndarray | None]
"""Task number -> the tokens of the response of its problem, or None if the problem has no response."""


class Sequences(NamedTuple):
    """The sequences that are trained, grouped by kind. The loss of a batch is the sum of the losses of its parts."""

    policy_gradient: list[PolicyGradient]
    distillation: list[Distillation]
    likelihood: list[Likelihood]

    @property
    def students(self) -> list[Tokens]:
        """The tokens of all sequences, in the order of the kinds."""
        return [item.student for kind in self for item in kind]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number of trained tokens of each kind."""
        a, k, n = (sum(len(item.student.targets) for item in kind) for kind in self)
        return a, k, n

    def part(self, order: Iterable[int]) -> Sequences:
        """Return the sequences at these ascending indices of `students`."""
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

    version: int  # of the weights that are trained; the lag of a token is this minus the version that sampled it
    sequences: Sequences
    metrics: tuple[Mapping[str, float], ...]  # one mapping for each task, with keys from PROBLEM_METRICS
    teachers: list[Tokens]  # the targets after their guided prompts; empty for the teacher `behaviour`
    forward_only: int  # tokens in forwards without gradient: for the teacher and for corrected pass rates


def lags(rollout: Rollout, version: int) -> np.ndarray:
    """Compute the lag of each sampled token, the number of versions that it is behind `version`: [C]."""
    return version - rollout.token_versions()[rollout.sampled]


def from_shard(
    shard: Shard,
    algorithm: Algorithm,
    *,
    responses: Responses | None = None,
    log_rho: Iterable[float] | None = None,
    skip_uniform: bool = False,
) -> Batch:
    """Build the sequences of a shard's groups, with the weights that `algorithm.objective` gives them.

    Args:
        responses: looks up the response of a task, for objectives that train on responses.
        log_rho: log pi/mu of each whole rollout in the shard's order, for corrected pass rates.
        skip_uniform: leave out rollouts with advantage 0, because their gradient is 0.
    """
    objective = OBJECTIVES[algorithm.objective]
    keys = [(rollout.task, rollout.slot) for rollout in shard.rollouts]
    ratios = dict(zip(keys, log_rho, strict=True)) if log_rho is not None else None
    trained = []
    for task, group in groupby(shard.rollouts, key=lambda rollout: rollout.task):
        rollouts = tuple(group)
        autonomous = tuple(rollout for rollout in rollouts if not rollout.guided)
        assert autonomous, f"task {task} has no autonomous rollout"
        task_group = TaskGroup(
            autonomous=autonomous,
            guided=tuple(rollout for rollout in rollouts if rollout.guided),
            demonstration=responses(task) if responses else None,
            log_rho={rollout.slot: ratios[task, rollout.slot] for rollout in rollouts} if ratios else None,
            problems=shard.problems,
        )
        trained.append(objective(task_group, algorithm))
    targets = [item for task in trained for item in task.distillation]
    teachers = [] if algorithm.teacher == "behaviour" else [item.teacher for item in targets]
    rescored = [rollout_after(rollout.prompt, rollout) for rollout in shard.rollouts] if ratios else []
    return Batch(
        version=shard.version,
        sequences=Sequences(
            [item for task in trained for item in task.policy_gradient if item.advantage or not skip_uniform],
            targets,
            [item for task in trained for item in task.likelihood],
        ),
        metrics=tuple(task.metrics for task in trained),
        teachers=teachers,
        forward_only=sum(tokens.length for tokens in teachers + rescored),
    )

"""Turn a rank's shard into weighted sequences: each sequence has a kind of loss and a constant weight.

The objective sets the weights from P, the number of problems in the whole batch, before the sequences are packed.
Therefore the division of sequences over micro-batches and ranks cannot change the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.objectives import OBJECTIVES
from sgpo_async.learner.objectives.base import Distillation, Likelihood, PolicyGradient, TaskGroup, rollout_after
from sgpo_async.learner.packing import Tokens, repeated_tokens
from sgpo_async.wire.records import Rollout, Shard

Item = PolicyGradient | Distillation | Likelihood
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
        return [item.student for item in self.items]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number of trained tokens of each kind."""
        a, k, n = (sum(len(item.student.targets) for item in kind) for kind in self)
        return a, k, n

    @property
    def items(self) -> list[Item]:
        """All sequences, in the order of the kinds."""
        return [*self.policy_gradient, *self.distillation, *self.likelihood]

    def bundles(self, row_tokens: int) -> list[list[Item]]:
        """The units of the division: sequences of one prompt if it pays to compute the prompt once, else single ones.

        A bundle has at most `row_tokens` tokens, so that it fits into a micro-batch.
        """
        by_prompt: dict[bytes, list[Item]] = {}
        for item in self.items:
            by_prompt.setdefault(item.student.prompt.tobytes(), []).append(item)
        found: list[list[Item]] = []
        for group in by_prompt.values():
            if not repeated_tokens([item.student for item in group], row_tokens):
                found += [[item] for item in group]
                continue
            free = -1
            for item in group:
                rest = item.student.length - len(item.student.prompt)
                if rest > free:
                    found.append([])
                    free = row_tokens - len(item.student.prompt)
                found[-1].append(item)
                free -= rest
        return found

    @classmethod
    def of(cls, items: Sequence[Item]) -> Sequences:
        """Group sequences by kind."""
        return cls(
            [item for item in items if isinstance(item, PolicyGradient)],
            [item for item in items if isinstance(item, Distillation)],
            [item for item in items if isinstance(item, Likelihood)],
        )


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step."""

    version: int  # of the weights that are trained; the lag of a token is this minus the version that sampled it
    sequences: Sequences
    metrics: tuple[Mapping[str, float], ...]  # one mapping for each task, with keys from PROBLEM_METRICS
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
    mask_cut: bool = False,
) -> Batch:
    """Build the sequences of a shard's groups, with the weights that `algorithm.objective` gives them.

    Args:
        responses: looks up the response of a task, for objectives that train on responses.
        log_rho: log pi/mu of each whole rollout in the shard's order, for corrected pass rates.
        skip_uniform: of a group in which every advantage is 0, and so is its gradient, keep one rollout.
        mask_cut: leave rollouts that max_new_tokens has cut out of the policy gradient.
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
            mask_cut=mask_cut,
        )
        trained.append(objective(task_group, algorithm))
    targets = [item for task in trained for item in task.distillation]
    teachers = [item.teacher for item in targets] if algorithm.teacher != "behaviour" else []
    rescored = [rollout_after(rollout.prompt, rollout) for rollout in shard.rollouts] if ratios else []
    return Batch(
        version=shard.version,
        sequences=Sequences(
            [item for task in trained for item in (_without_uniform if skip_uniform else list)(task.policy_gradient)],
            targets,
            [item for task in trained for item in task.likelihood],
        ),
        metrics=tuple(task.metrics for task in trained),
        forward_only=sum(tokens.length for tokens in teachers + rescored),
    )


def _without_uniform(group: list[PolicyGradient]) -> list[PolicyGradient]:
    """Of a group that teaches nothing, keep one rollout, which stands for all in the statistics; chosen by its task."""
    if not group or any(item.advantage for item in group):
        return group
    return [replace(group[group[0].rollout.task % len(group)], stands_for=len(group))]

"""Turn a rank's shard into weighted sequences: each sequence has a kind of loss and a constant weight.

The objective sets the weights from P, the number of problems in the whole batch, before the sequences are packed.
Therefore the division of sequences over micro-batches and ranks cannot change the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple, TypeVar

import numpy as np

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.contexts import Contexts
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
        """Group sequences by kind, and distillation by its divergence."""
        return cls(
            [item for item in items if isinstance(item, PolicyGradient)],
            sorted((item for item in items if isinstance(item, Distillation)), key=lambda item: item.divergence),
            [item for item in items if isinstance(item, Likelihood)],
        )


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step."""

    version: int  # of the weights that are trained; the lag of a token is this minus the version that sampled it
    step: int  # of the run, which a resumed run repeats; a version is never repeated
    sequences: Sequences
    metrics: tuple[Mapping[str, float], ...]  # one mapping for each task, with keys from PROBLEM_METRICS
    forward_only: int  # tokens in forwards without gradient: for the teacher and for corrected pass rates
    stale: int = 0  # tokens of the chosen rollouts that are not trained because they are too old
    # By task and slot of a rollout that the teacher reads after the completion of a sibling: the slot of that sibling.
    siblings: Mapping[tuple[int, int], int] = field(default_factory=dict)


class LeftOut(NamedTuple):
    """What a step does not train."""

    uniform: bool = False  # all but one of the rollouts of one prompt whose rewards are all equal
    cut: bool = False  # rollouts that max_new_tokens has cut
    older: int = 0  # tokens of versions below this one; the others keep their weights in the mean over all tokens


def lags(rollout: Rollout, version: int) -> np.ndarray:
    """Compute the lag of each sampled token, the number of versions that it is behind `version`: [C]."""
    return version - rollout.token_versions()[rollout.sampled]


def from_shard(
    shard: Shard,
    algorithm: Algorithm,
    *,
    responses: Responses | None = None,
    contexts: Contexts | None = None,
    log_rho: Iterable[float] | None = None,
    left_out: LeftOut | None = None,
) -> Batch:
    """Build the sequences of a shard's groups, with the weights that `algorithm.objective` gives them.

    Args:
        responses: looks up the response of a task, for objectives that train on responses.
        contexts: finds the teacher's prompts for autonomous rollouts, for objectives that need them.
        log_rho: log pi/mu of each whole rollout in the shard's order, for corrected pass rates.
        left_out: what is not trained; by default all is.
    """
    left_out = left_out or LeftOut()
    objective = OBJECTIVES[algorithm.objective]
    keys = [(rollout.task, rollout.slot) for rollout in shard.rollouts]
    ratios = dict(zip(keys, log_rho, strict=True)) if log_rho is not None else None
    trained = []
    siblings: dict[tuple[int, int], int] = {}
    for task, group in groupby(shard.rollouts, key=lambda rollout: rollout.task):
        rollouts = tuple(group)
        autonomous = tuple(rollout for rollout in rollouts if not rollout.guided)
        assert autonomous, f"task {task} has no autonomous rollout"
        task_group = TaskGroup(
            autonomous=autonomous,
            guided=tuple(rollout for rollout in rollouts if rollout.guided),
            demonstration=responses(task) if responses else None,
            contexts=contexts(autonomous) if contexts else {},
            log_rho={rollout.slot: ratios[task, rollout.slot] for rollout in rollouts} if ratios else None,
            problems=shard.problems,
            mask_cut=left_out.cut,
        )
        trained.append(objective(task_group, algorithm))
        own = {slot: context.sibling for slot, context in task_group.contexts.items()}
        siblings |= {(task, slot): sibling for slot, sibling in own.items() if sibling is not None}
    chosen = [
        item for task in trained for item in (_without_uniform if left_out.uniform else list)(task.policy_gradient)
    ]
    distilled = [item for task in trained for item in task.distillation]
    items: list[PolicyGradient | Distillation] = [*chosen, *distilled]
    taken = {(item.rollout.task, item.rollout.slot): item.rollout for item in items}  # each once
    policy_gradient, targets = _fresh(chosen, left_out.older), _fresh(distilled, left_out.older)
    read = [item.rollout for item in targets] + [item.rollout for item in policy_gradient if item.context]
    teachers = [item.teacher for item in targets] if algorithm.teacher != "behaviour" else []
    rescored = [rollout_after(rollout.prompt, rollout) for rollout in shard.rollouts] if ratios else []
    return Batch(
        version=shard.version,
        step=shard.step,
        sequences=Sequences(
            policy_gradient,
            targets,
            [item for task in trained for item in task.likelihood],
        ),
        metrics=tuple(task.metrics for task in trained),
        forward_only=sum(tokens.length for tokens in teachers + rescored),
        stale=sum(_stale_tokens(rollout, left_out.older) for rollout in taken.values()),
        siblings={key: siblings[key] for rollout in read if (key := (rollout.task, rollout.slot)) in siblings},
    )


Sampled = TypeVar("Sampled", PolicyGradient, Distillation)


def _fresh(items: Sequence[Sampled], oldest: int) -> list[Sampled]:
    """The same sequences without their stale tokens, which leave the weights of the others as they are.

    The loss of a sequence is a mean over its trained tokens, so its weight shrinks by the share of the others.
    """
    found = []
    for item in items:
        stale, all_tokens = _stale_tokens(item.rollout, oldest), int(item.rollout.sampled.sum())
        if stale < all_tokens:
            weight = item.weight * (1 - stale / all_tokens)
            found.append(replace(item, rollout=item.rollout.without_older(oldest), weight=weight) if stale else item)
    return found


def _stale_tokens(rollout: Rollout, oldest: int) -> int:
    """How many tokens of a rollout older versions than `oldest` have sampled."""
    if rollout.oldest_version >= oldest:
        return 0
    return int((rollout.token_versions()[rollout.sampled] < oldest).sum())


def _without_uniform(items: list[PolicyGradient]) -> list[PolicyGradient]:
    """Of rollouts of one prompt that teach nothing, keep one, which stands for all in the statistics.

    Which one it is depends on the task.
    """
    by_prompt: dict[bytes, list[PolicyGradient]] = {}
    for item in items:
        by_prompt.setdefault(item.student.prompt.tobytes(), []).append(item)
    found = []
    for group in by_prompt.values():
        uniform = not any(item.advantage for item in group)
        found += [replace(group[group[0].rollout.task % len(group)], stands_for=len(group))] if uniform else group
    return found

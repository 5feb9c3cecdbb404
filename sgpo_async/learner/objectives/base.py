"""The input of an objective, the group of one task, and its output, weighted sequences of three kinds.

    policy gradient   a rollout, with an advantage                              terms.PolicyGradientTerm   Eq. 1
    distillation      a rollout, which the teacher reads after another prompt   terms.DistillationTerm     Eq. 3, 5
    likelihood        a given text after the plain prompt                       terms.LikelihoodTerm       NLL, LUFFY

The loss of a step is the sum over all sequences of weight times the mean loss over the sequence's tokens. An objective
computes constant weights from its task and from the number of problems in the whole batch. Therefore the division of
sequences over rows, micro-batches and ranks cannot change the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sgpo_async.algorithm import group_advantages
from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.contexts import InContext
from sgpo_async.learner.packing import Tokens
from sgpo_async.wire.records import Rollout

PROBLEM_METRICS = ("alpha", "alpha_observed", "p_auto_corrected", "p_guide_corrected")
"""Metrics that an objective may report for a problem; the step's metric is the mean over the problems that report it.

`alpha` is the weight in use, 0 if nothing is distilled. The others are reported only with corrected pass rates: these
rates themselves, and `alpha_observed`, the weight that the observed pass rates would give.
"""


def rollout_after(prompt: np.ndarray, rollout: Rollout) -> Tokens:
    """The tokens of a rollout after `prompt`; those that the policy has sampled are trained."""
    return Tokens(prompt, rollout.tokens, rollout.sampled, rollout.kept, rollout.kept_sizes)


def rewards_of(rollouts: Iterable[Rollout]) -> Tensor:
    """The rewards of these rollouts: [1, n] float64."""
    return torch.tensor([[rollout.reward for rollout in rollouts]], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class TaskGroup:
    """The rollouts and the other data of one task, for training."""

    autonomous: tuple[Rollout, ...]  # at least one
    guided: tuple[Rollout, ...]
    demonstration: np.ndarray | None = None  # response with end token, [T] int32; None if unavailable or not needed
    log_rho: Mapping[int, float] | None = None  # log pi/mu of the whole rollout, by slot; None if not computed
    contexts: Mapping[int, InContext] = field(default_factory=dict)  # the teacher's prompts, by autonomous slot
    problems: int  # P, number of problems in the whole batch over all ranks
    mask_cut: bool = False  # rollouts that max_new_tokens has cut do not count

    @property
    def counted(self) -> tuple[Rollout, ...]:
        """The autonomous rollouts whose rewards and tokens count."""
        return self.counted_of(self.autonomous)

    def counted_of(self, rollouts: Iterable[Rollout]) -> tuple[Rollout, ...]:
        """Those of these rollouts whose rewards and tokens count."""
        return tuple(rollout for rollout in rollouts if rollout.finish == "stop" or not self.mask_cut)

    @property
    def plain_prompt(self) -> np.ndarray:
        """The prompt of the problem without a strategy, [L] int32."""
        return self.autonomous[0].prompt

    def with_advantages(self, algorithm: Algorithm, *, guided: bool = False) -> list[tuple[Rollout, float]]:
        """Return the counted rollouts of the autonomous or of the guided group, each with its advantage (Eq. 1)."""
        counted = self.counted_of(self.guided if guided else self.autonomous)
        advantages = group_advantages(rewards_of(counted), algorithm.advantage)[0].tolist() if counted else []
        return list(zip(counted, advantages, strict=True))

    def distilled(self, rollouts: Iterable[Rollout], weight: float, *, skip: int) -> list[Distillation]:
        """Distil the teacher, which has read the context, on these autonomous rollouts, with `weight` for each.

        Those without a context, without tokens after the first `skip`, or that do not count, are left out; the others
        keep their weights.
        """
        counted = self.counted_of(rollouts)
        pairs = ((rollout.without_first(skip), self.contexts.get(rollout.slot)) for rollout in counted)
        return [
            Distillation(own, own.prompt, context.right, weight)
            for own, context in pairs
            if context and weight and own.sampled.any()
        ]

    def correct(self, *, guided: bool) -> Tensor:
        """Return which of the guided or of the autonomous rollouts are correct: [1, G] float64, 1 or 0."""
        rollouts = self.guided if guided else self.autonomous
        return torch.tensor([[float(rollout.correct) for rollout in rollouts]], dtype=torch.float64)


@dataclass(frozen=True)
class PolicyGradient:
    """One rollout that is trained with the clipped policy gradient."""

    rollout: Rollout
    advantage: float
    weight: float
    # As how many rollouts it counts in the mean entropy: with learner.skip_uniform, one rollout is trained of a group
    # whose advantages are all 0.
    stands_for: int = 1
    prompt: np.ndarray | None = None  # it is trained after this prompt; None: after that with which it was sampled
    context: InContext | None = None  # with which a teacher gives each token an advantage of its own
    # What the learner adds before the forward pass (`learner.scores`), [T] each: what the teacher says of the tokens,
    # for `algorithm.credit`; their log pi_0, with `reference_kl`.
    evidence: np.ndarray | None = None
    log_reference: np.ndarray | None = None

    @cached_property
    def student(self) -> Tokens:
        """The sequence that is trained."""
        return rollout_after(self.rollout.prompt if self.prompt is None else self.prompt, self.rollout)


@dataclass(frozen=True)
class Distillation:
    """One rollout, whose distributions after one prompt are drawn to those after the other."""

    rollout: Rollout
    student_prompt: np.ndarray
    teacher_prompt: np.ndarray
    weight: float
    divergence: str = ""  # a key of DIVERGENCES; "": that of the configuration

    @cached_property
    def student(self) -> Tokens:
        """The sequence that is trained."""
        return rollout_after(self.student_prompt, self.rollout)

    @cached_property
    def teacher(self) -> Tokens:
        """The same tokens, as the teacher reads them."""
        return rollout_after(self.teacher_prompt, self.rollout)


@dataclass(frozen=True)
class Likelihood:
    """A given text after the plain prompt."""

    student: Tokens
    weight: float
    shaped: bool = False  # use LUFFY's f(p) instead of log p


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The sequences and metrics of one task; if all lists are empty, the task does not contribute to the loss."""

    policy_gradient: list[PolicyGradient] = field(default_factory=list)
    distillation: list[Distillation] = field(default_factory=list)
    likelihood: list[Likelihood] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=lambda: {"alpha": 0.0})  # keys from PROBLEM_METRICS


Objective = Callable[[TaskGroup, Algorithm], Trained]

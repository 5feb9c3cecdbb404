"""What an objective is given and what it gives back: a task's group, and weighted sequences of three kinds.

    policy gradient   an autonomous rollout, with an advantage        terms.policy_gradient_term    Eq. 1
    distillation      a guided rollout after the plain prompt         terms.distillation_term       Eq. 3, 5
    likelihood        a given text after the plain prompt             terms.likelihood_term         NLL, or LUFFY's

The loss of a step is the sum over all sequences of weight times the mean over the sequence's tokens. An objective sets
the weights for good, from its own task and the number of problems in the whole batch: how sequences are then divided
over rows, micro-batches and ranks cannot change the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.packing import Tokens
from sgpo_async.wire.records import Rollout

FIGURES = ("alpha", "alpha_observed", "p_auto_corrected", "p_guide_corrected")
"""What an objective may tell of a problem besides; the step's metrics are means over the problems that have them.

`alpha` is the weight in use, 0 where nothing is distilled. With corrected pass rates these are told, too, and what
alpha would be with the observed ones.
"""


@dataclass(frozen=True, kw_only=True)
class TaskGroup:
    """What is known of one task when it is trained."""

    autonomous: tuple[Rollout, ...]  # at least one
    guided: tuple[Rollout, ...]
    demonstration: np.ndarray | None = None  # [T] int32, with the end token; None: there is none, or none is asked for
    log_rho: Mapping[int, float] | None = None  # by slot, log pi/mu of the whole rollout; None: not measured
    problems: int  # P, of the whole batch over all ranks

    @property
    def plain_prompt(self) -> np.ndarray:
        """That of the problem alone, [L] int32."""
        return self.autonomous[0].prompt

    def rewards(self, *, guided: bool) -> Tensor:
        """[1, G] float64, of the guided or of the autonomous rollouts."""
        rollouts = self.guided if guided else self.autonomous
        return torch.tensor([[rollout.reward for rollout in rollouts]], dtype=torch.float64)


@dataclass(frozen=True)
class PolicyGradient:
    """One autonomous rollout of the clipped policy gradient."""

    rollout: Rollout
    advantage: float
    weight: float

    @property
    def student(self) -> Tokens:
        """What is trained."""
        return Tokens(self.rollout.prompt, self.rollout.tokens)


@dataclass(frozen=True)
class Distillation:
    """One guided rollout, o+, which the student learns after the plain prompt."""

    rollout: Rollout
    plain_prompt: np.ndarray
    weight: float

    @property
    def student(self) -> Tokens:
        """What is trained."""
        return Tokens(self.plain_prompt, self.rollout.tokens)

    @property
    def teacher(self) -> Tokens:
        """The same tokens after the guided prompt that they were sampled from."""
        return Tokens(self.rollout.prompt, self.rollout.tokens)


@dataclass(frozen=True)
class Likelihood:
    """A text after the plain prompt, whoever wrote it."""

    student: Tokens
    weight: float
    shaped: bool = False  # LUFFY's f(p) instead of log p


@dataclass(frozen=True, kw_only=True)
class Trained:
    """All that one task contributes to the loss; nothing, if all are empty."""

    policy_gradient: list[PolicyGradient] = field(default_factory=list)
    distillation: list[Distillation] = field(default_factory=list)
    likelihood: list[Likelihood] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=lambda: {"alpha": 0.0})  # some of FIGURES


Objective = Callable[[TaskGroup, Algorithm], Trained]

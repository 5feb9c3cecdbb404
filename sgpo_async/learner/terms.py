"""The three terms of the loss for the sequences of one micro-batch.

Each term is a `Part` of the fused loss, and records its results. Its loss is a function of the flat values of all of
its tokens. The fused loss calls and differentiates it while later values are still missing (NaN), so it has no side
effects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sgpo_async.algorithm import (
    WHOLE_SEQUENCE_LIMITERS,
    WHOLE_SEQUENCE_MODES,
    Clip,
    Found,
    LogProbability,
    Part,
    TeacherDivergence,
    TopDivergence,
    correction_weights,
    distillation_loss,
    grpo_loss,
    is_clipped,
    iw_opd_advantages,
    limit,
    nll_loss,
    reference_loss,
    rlcsd_advantages,
    rlcsd_shift,
    rlsd_advantages,
    shaped_loss,
)
from sgpo_async.config.algorithm import CLIP
from sgpo_async.config.schema import Algorithm, Correction
from sgpo_async.learner.batch import Batch, lags
from sgpo_async.learner.objectives.base import Distillation, Likelihood, PolicyGradient
from sgpo_async.learner.packing import kept_of, pad
from sgpo_async.learner.step_metrics import StepMetrics
from sgpo_async.wire.records import OBSERVED, Rollout


class Term(Protocol):
    """One term of the loss."""

    part: Part

    def record(self, found: Found, statistics: StepMetrics) -> None:
        """Add the results of the part to the statistics."""


class PolicyGradientTerm:
    """The sum of weight times the clipped loss (Eq. 1) over these rollouts, from log pi [A] of all their tokens.

    `like` has the type and device of log pi.
    """

    def __init__(
        self, items: Sequence[PolicyGradient], batch: Batch, targets: Tensor, *, algorithm: Algorithm, like: Tensor
    ) -> None:
        self._algorithm, self._step, self._rollouts = algorithm, batch.step, [item.rollout for item in items]
        rule = algorithm.grpo_correction
        self._clips = rule.mode == CLIP
        # The clipped ratio is in the loss itself. The KL to the initial weights has no advantage, so it is not clipped.
        self._mode, self._drift_mode = ("none", "token") if self._clips else (rule.mode, rule.mode)
        self._clip = Clip(algorithm.eps_low, algorithm.eps_high, rule.bound if self._clips else math.inf)
        self._log_mu, self._age = _behaviour(self._rollouts, batch.version, like)
        self._mask = self._age >= 0
        self._advantages, self._weights, self._stand_for = (
            _like(like, [getattr(item, name) for item in items]) for name in ("advantage", "weight", "stands_for")
        )
        self._evidence, self._log_reference = (
            _per_token([(item.rollout, getattr(item, name)) for item in items], like)
            for name in ("evidence", "log_reference")
        )
        self._own_prompt = torch.tensor([[item.prompt is None] for item in items], device=like.device)
        whole = rule.mode in WHOLE_SEQUENCE_MODES or algorithm.objective == "iw-opd"
        self._kept = kept_of([item.student for item in items])
        self.part = Part(LogProbability(targets, self._kept), self._loss, whole)

    def record(self, found: Found, statistics: StepMetrics) -> None:
        """See `Term`."""
        log_pi = _unflatten(found.value, self._mask)
        log_rho = log_pi - self._log_mu
        rule = self._algorithm.grpo_correction
        statistics.add(grpo_loss=found.loss, tokens_policy_gradient=self._mask)
        if self._kept:
            statistics.add(kept=self._mask.sum() + int(self._kept.sizes.sum()))
        share = self._stand_for[:, None] * self._mask
        statistics.add(entropy=_unflatten(found.aside, self._mask) * share, entropy_tokens=share)
        if self._clips:
            clipped = is_clipped(log_rho, self._token_advantages(log_pi), self._clip)
            weights = log_rho.exp().masked_fill(clipped, 0)
        else:
            weights = self._correction(log_pi, self._mode)
            clipped = _is_bounded(weights, log_rho, self._mask, rule)
        statistics.add_correction("correction", weights, clipped, self._age)
        # After another prompt than the engine's, the two differ by more than the engine.
        comparable_lags = torch.where(self._own_prompt, self._age, -1)
        statistics.mismatch.add(log_rho, comparable_lags, _later(self._rollouts, self._mask))

    def _loss(self, log_pi: Tensor, _entropy: Tensor) -> Tensor:
        log_pi = _unflatten(log_pi, self._mask)
        losses = grpo_loss(
            log_pi,
            self._mask,
            self._token_advantages(log_pi),
            correction=self._correction(log_pi, self._mode),
            log_prox=self._log_mu if self._clips else None,
            clip=self._clip,
        )
        if self._log_reference is not None:
            weights = self._correction(log_pi, self._drift_mode)
            drift = reference_loss(log_pi, self._log_reference, self._mask, weights)
            losses = losses + self._algorithm.reference_kl * drift
        return (losses * self._weights).sum()

    def _token_advantages(self, log_pi: Tensor) -> Tensor:
        """The advantages, [N], or [N, T] where a teacher has given evidence."""
        if self._evidence is None:
            return self._advantages
        algorithm, found = self._algorithm, self._advantages[:, None].expand_as(log_pi)
        known = ~self._evidence[:, :1].isnan()
        evidence = self._evidence.nan_to_num()
        if algorithm.objective == "rlsd":
            rule = algorithm.rlsd
            weight = rule.weight * max(1 - self._step / rule.steps, 0) if rule.steps else rule.weight
            credited = rlsd_advantages(self._advantages, evidence, log_pi, clip=rule.clip, weight=weight)
        elif algorithm.objective == "rlcsd":
            own = algorithm.rlcsd
            shift = rlcsd_shift(evidence, scale=own.scale, tau=own.tau)
            credited = rlcsd_advantages(
                self._advantages, shift, self._mask, threshold=own.threshold, selected_weight=own.weight
            )
        else:
            credited = iw_opd_advantages(evidence, log_pi, self._mask, gamma=algorithm.iw_gamma)
        return torch.where(known, credited, found)

    def _correction(self, log_pi: Tensor, mode: str) -> Tensor:
        bound = self._algorithm.grpo_correction.bound
        return correction_weights(log_pi, self._log_mu, self._mask, mode=mode, bound=bound)


class DistillationTerm:
    """The sum of weight times L_KD (Eq. 5) over these targets, from d [K] of all their tokens.

    The prefix is corrected towards the teacher's distribution, because Eq. 3 is an expectation over it. `like` has the
    type and device of d.
    """

    def __init__(
        self,
        items: Sequence[Distillation],
        version: int,
        measure: TeacherDivergence | TopDivergence,
        *,
        algorithm: Algorithm,
        like: Tensor,
    ) -> None:
        self._algorithm, self._rollouts = algorithm, [item.rollout for item in items]
        self._log_mu, self._age = _behaviour(self._rollouts, version, like)
        self._mask = self._age >= 0
        self._weights = _like(like, [item.weight for item in items])
        modes, limiters = WHOLE_SEQUENCE_MODES, WHOLE_SEQUENCE_LIMITERS
        whole = algorithm.kl_correction.mode in modes or algorithm.limiter in limiters
        self.part = Part(measure, self._loss, whole)

    def record(self, found: Found, statistics: StepMetrics) -> None:
        """See `Term`."""
        d, log_teacher = (_unflatten(flat, self._mask) for flat in (found.value, found.aside))
        correction, rule = self._correction(log_teacher), self._algorithm.kl_correction
        statistics.add(kd_loss=found.loss)
        bounded = _is_bounded(correction, log_teacher - self._log_mu, self._mask, rule)
        statistics.add_correction("kl_correction", correction, bounded, self._age)
        algorithm, d = self._algorithm, d.detach()
        limited = limit(d, self._mask, limiter=algorithm.limiter, delta=algorithm.delta, quantile=algorithm.quantile)
        statistics.add_kl(d, self._mask, limited, delta=algorithm.delta)
        removed = (correction == 0) | ((limited == 0) & (d != 0))  # d_t = 0 alone is no removal
        statistics.keep_kl(self._rollouts, d, removed)

    def _loss(self, d: Tensor, log_teacher: Tensor) -> Tensor:
        d, log_teacher = (_unflatten(flat, self._mask) for flat in (d, log_teacher))
        algorithm = self._algorithm
        losses = distillation_loss(
            d,
            self._mask,
            self._correction(log_teacher),
            delta=algorithm.delta,
            limiter=algorithm.limiter,
            quantile=algorithm.quantile,
        )
        return (losses * self._weights).sum()

    def _correction(self, log_teacher: Tensor) -> Tensor:
        rule = self._algorithm.kl_correction
        return correction_weights(log_teacher, self._log_mu, self._mask, mode=rule.mode, bound=rule.bound)


class LikelihoodTerm:
    """The sum of weight times the plain or shaped (LUFFY) loss over these texts, from log pi [L] of all their tokens.

    `like` has the type and device of log pi.
    """

    def __init__(self, items: Sequence[Likelihood], targets: Tensor, *, algorithm: Algorithm, like: Tensor) -> None:
        self._gamma = algorithm.luffy_gamma
        self._mask = torch.from_numpy(pad([item.student.targets for item in items])[1]).to(like.device)
        self._shaped = torch.tensor([item.shaped for item in items], device=like.device)
        self._weights = _like(like, [item.weight for item in items])
        self.part = Part(LogProbability(targets), self._loss)

    def record(self, found: Found, statistics: StepMetrics) -> None:
        """See `Term`."""
        statistics.add(likelihood_loss=found.loss, tokens_likelihood=self._mask)

    def _loss(self, log_pi: Tensor, _entropy: Tensor) -> Tensor:
        log_pi = _unflatten(log_pi, self._mask)
        shaped, plain = shaped_loss(log_pi, self._mask, gamma=self._gamma), nll_loss(log_pi, self._mask)
        return (torch.where(self._shaped, shaped, plain) * self._weights).sum()


def _behaviour(rollouts: Sequence[Rollout], version: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return log mu [N, T] and lags [N, T], with lag -1 in the padding."""
    log_mu, mask = pad([rollout.logprobs[rollout.sampled] for rollout in rollouts])
    age, _ = pad([lags(rollout, version) for rollout in rollouts])
    assert (age >= 0).all(), "the lag of every token must be >= 0: a rollout is newer than the weights that it trains"
    return _like(like, log_mu), torch.from_numpy(np.where(mask, age, -1).astype(np.int64)).to(like.device)


def _per_token(items: Sequence[tuple[Rollout, np.ndarray | None]], like: Tensor) -> Tensor | None:
    """Pad what is known of each trained token: [N, T], NaN for a rollout of which nothing is known; None for all."""
    if all(values is None for _, values in items):
        return None
    missing = np.float64(np.nan)
    padded, _ = pad(
        [
            np.full(int(rollout.sampled.sum()), missing) if values is None else values[rollout.sampled]
            for rollout, values in items
        ]
    )
    return _like(like, padded)


def _later(rollouts: Sequence[Rollout], mask: Tensor) -> Tensor:
    """Return whether each trained token is after the first span of its rollout: [N, T] bool."""
    first_ends = torch.tensor(
        [[int(rollout.ends[0]) * (rollout.versions[0] != OBSERVED)] for rollout in rollouts], device=mask.device
    )
    return torch.arange(mask.shape[1], device=mask.device) >= first_ends


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """Distribute the values of all sequences, one after another, into padded rows [N, T], 0 in the padding."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def _like(tensor: Tensor, values: np.ndarray | list[float]) -> Tensor:
    return torch.as_tensor(np.asarray(values)).to(tensor.device, tensor.dtype)


def _is_bounded(weights: Tensor, log_rho: Tensor, mask: Tensor, rule: Correction) -> Tensor:
    """Whether the correction weight of each token [N, T] would differ without the bound."""
    free = correction_weights(log_rho, torch.zeros_like(log_rho), mask, mode=rule.mode, bound=math.inf)
    return weights != free

"""The three terms of the loss for the sequences of one micro-batch, computed from the policy's flat outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sgpo_async.algorithm import correction_weights, distillation_loss, grpo_loss, nll_loss, shaped_loss
from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.batch import lags
from sgpo_async.learner.objectives.base import Distillation, Likelihood, PolicyGradient
from sgpo_async.learner.packing import pad
from sgpo_async.learner.step_metrics import StepMetrics
from sgpo_async.wire.records import Rollout


def policy_gradient_term(
    items: Sequence[PolicyGradient], version: int, log_pi: Tensor, *, algorithm: Algorithm, statistics: StepMetrics
) -> Tensor:
    """Sum weight times the clipped loss (Eq. 1) over these rollouts, from log_pi [A] of all their tokens."""
    rule = algorithm.grpo_correction
    rollouts = [item.rollout for item in items]
    log_mu, age = _behaviour(rollouts, version, log_pi)
    mask = age >= 0
    log_pi = _unflatten(log_pi, mask)
    correction = correction_weights(log_pi, log_mu, mask, mode=rule.mode, bound=rule.bound)
    log_rho = (log_pi - log_mu).detach()
    statistics.add_correction("correction", correction, log_rho, age, rule)
    statistics.mismatch.add(log_rho, age, _later(rollouts, mask))
    losses = grpo_loss(
        log_pi,
        mask,
        _like(log_pi, [item.advantage for item in items]),
        correction=correction,
        clip=(algorithm.eps_low, algorithm.eps_high),
    )
    term = (losses * _like(losses, [item.weight for item in items])).sum()
    statistics.add(grpo_loss=term)
    return term


def distillation_term(
    items: Sequence[Distillation],
    version: int,
    distance: tuple[Tensor, Tensor],
    *,
    algorithm: Algorithm,
    statistics: StepMetrics,
) -> Tensor:
    """Sum weight times L_KD (Eq. 5) over these targets.

    The prefix is corrected towards the teacher's distribution, because Eq. 3 is an expectation over it.

    Args:
        distance: d [K] and the teacher's log-probability [K] of all the targets' tokens.
    """
    rule = algorithm.kl_correction
    rollouts = [item.rollout for item in items]
    log_mu, age = _behaviour(rollouts, version, distance[0])
    mask = age >= 0
    d, log_teacher = (_unflatten(flat, mask) for flat in distance)
    correction = correction_weights(log_teacher, log_mu, mask, mode=rule.mode, bound=rule.bound)
    statistics.add_correction("kl_correction", correction, log_teacher - log_mu, age, rule)
    statistics.add_kl(d, mask, algorithm)
    statistics.keep_kl(rollouts, d)
    losses = distillation_loss(
        d, mask, correction, delta=algorithm.delta, limiter=algorithm.limiter, quantile=algorithm.quantile
    )
    term = (losses * _like(losses, [item.weight for item in items])).sum()
    statistics.add(kd_loss=term)
    return term


def likelihood_term(
    items: Sequence[Likelihood], log_pi: Tensor, *, algorithm: Algorithm, statistics: StepMetrics
) -> Tensor:
    """Sum weight times the plain or shaped (LUFFY) loss over these texts, from log_pi [L] of all their tokens."""
    _, known = pad([item.student.targets for item in items])
    mask = torch.from_numpy(known).to(log_pi.device)
    log_pi = _unflatten(log_pi, mask)
    shaped = torch.tensor([item.shaped for item in items], device=mask.device)
    losses = torch.where(shaped, shaped_loss(log_pi, mask, gamma=algorithm.luffy_gamma), nll_loss(log_pi, mask))
    term = (losses * _like(losses, [item.weight for item in items])).sum()
    statistics.add(likelihood_loss=term, tokens_likelihood=mask)
    return term


def _behaviour(rollouts: Sequence[Rollout], version: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return log mu [N, T] and lags [N, T], with lag -1 in the padding."""
    log_mu, mask = pad([rollout.logprobs[rollout.sampled] for rollout in rollouts])
    age, _ = pad([lags(rollout, version) for rollout in rollouts])
    assert (age >= 0).all(), "the lag of every token must be >= 0: a rollout is newer than the weights that it trains"
    return _like(like, log_mu), torch.from_numpy(np.where(mask, age, -1).astype(np.int64)).to(like.device)


def _later(rollouts: Sequence[Rollout], mask: Tensor) -> Tensor:
    """Return whether each token is after the first span of its rollout, which is always sampled: [N, T] bool."""
    first_ends = torch.tensor([[int(rollout.ends[0])] for rollout in rollouts], device=mask.device)
    return torch.arange(mask.shape[1], device=mask.device) >= first_ends


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """Distribute the values of all sequences, one after another, into padded rows [N, T], 0 in the padding."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def _like(tensor: Tensor, values: np.ndarray | list[float]) -> Tensor:
    return torch.as_tensor(np.asarray(values)).to(tensor.device, tensor.dtype)

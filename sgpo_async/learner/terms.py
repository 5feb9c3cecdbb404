"""The two terms of Eq. 7 for the sequences of one micro-batch, from the policy's flat outputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sgpo_async.algorithm import correction_weights, distillation_loss, grpo_loss
from sgpo_async.config.schema import Algorithm
from sgpo_async.learner.batch import Batch
from sgpo_async.learner.packing import pad
from sgpo_async.learner.statistics import Statistics
from sgpo_async.wire.records import Rollout


def grpo_term(
    batch: Batch, which: list[int], log_pi: Tensor, *, algorithm: Algorithm, statistics: Statistics
) -> Tensor:
    """sum of 1/(P G1) L_GRPO over the autonomous rollouts `which` (Eq. 1), from log_pi [A] of all their tokens."""
    rule = algorithm.grpo_correction
    log_mu, lags = _behaviour(batch, [batch.autonomous[i] for i in which], log_pi)
    mask = lags >= 0
    log_pi = _unflatten(log_pi, mask)
    correction = correction_weights(log_pi, log_mu, mask, mode=rule.mode, bound=rule.bound)
    log_rho = (log_pi - log_mu).detach()
    statistics.add_correction("correction", correction, log_rho, lags, rule)
    statistics.mismatch.add(log_rho, lags, _later(batch, which, mask))
    losses = grpo_loss(
        log_pi,
        mask,
        _like(log_pi, batch.advantages[which]),
        correction=correction,
        clip=(algorithm.eps_low, algorithm.eps_high),
    )
    term = (losses * _like(losses, batch.weights[which])).sum()
    statistics.add(grpo_loss=term)
    return term


def distillation_term(
    batch: Batch, which: list[int], kl: tuple[Tensor, Tensor], *, algorithm: Algorithm, statistics: Statistics
) -> Tensor:
    """sum of alpha(q)/P L_KD over the targets `which` (Eq. 5).

    The prefix is corrected towards the teacher's distribution, over which Eq. 3 takes its expectation.

    Args:
        kl: d [K] and the teacher's log-probability [K] of all the targets' tokens.
    """
    rule = algorithm.kl_correction
    log_mu, lags = _behaviour(batch, [batch.targets[k] for k in which], kl[0])
    mask = lags >= 0
    d, log_teacher = (_unflatten(flat, mask) for flat in kl)
    correction = correction_weights(log_teacher, log_mu, mask, mode=rule.mode, bound=rule.bound)
    statistics.add_correction("kl_correction", correction, log_teacher - log_mu, lags, rule)
    statistics.add_kl(d, mask, delta=algorithm.delta)
    losses = distillation_loss(d, mask, correction, delta=algorithm.delta, limiter=algorithm.limiter)
    term = (losses * _like(losses, batch.target_weights[which])).sum()
    statistics.add(kd_loss=term)
    return term


def _behaviour(batch: Batch, rollouts: list[Rollout], like: Tensor) -> tuple[Tensor, Tensor]:
    """log mu [N, T], and lags [N, T] with -1 in the padding."""
    log_mu, mask = pad([rollout.logprobs for rollout in rollouts])
    lags, _ = pad([batch.lags(rollout) for rollout in rollouts])
    assert (lags >= 0).all(), "a token of weights that are newer than those that it trains"
    return _like(like, log_mu), torch.from_numpy(np.where(mask, lags, -1).astype(np.int64)).to(like.device)


def _later(batch: Batch, which: list[int], mask: Tensor) -> Tensor:
    """Whether a token of the autonomous rollouts `which` lies beyond the first span of its rollout: [N, T] bool."""
    first_ends = torch.tensor([[int(batch.autonomous[i].ends[0])] for i in which], device=mask.device)
    return torch.arange(mask.shape[1], device=mask.device) >= first_ends


def _unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """The tokens of all sequences, one after another, into padded rows [N, T]; 0 in the padding."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def _like(tensor: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(tensor.device, tensor.dtype)

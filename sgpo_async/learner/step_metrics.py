"""The metrics of one step, accumulated over micro-batches and reduced over ranks with one collective.

A rank accumulates sums and minima over its micro-batches; `reduce` gathers the values of all ranks once and divides.
Correction weights are reported separately for lag 0 and for stale tokens, because for stale tokens they also show how
far the policy has changed. The mismatch between engine and learner is measured only on the tokens of the policy
gradient, because a frozen teacher differs from the behaviour policy at every lag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sgpo_async.algorithm import kl_mass
from sgpo_async.learner import mismatch
from sgpo_async.learner.batch import Batch
from sgpo_async.learner.mismatch import AGES, Mismatch
from sgpo_async.learner.objectives.base import PROBLEM_METRICS
from sgpo_async.wire.records import Rollout

TERMS = ("correction", "kl_correction")
SUMS = (
    *("grpo_loss", "kd_loss", "likelihood_loss", "entropy", "entropy_tokens"),
    *(
        "tokens_policy_gradient",
        "kept",
        "tokens_kd",
        "tokens_likelihood",
        "tokens_forward_only",
        "tokens_stale",
        "targets",
    ),
    *("kl", "masked_tokens", "masked_kl", "limited_kl"),
    *(f"{metric}_{part}" for metric in PROBLEM_METRICS for part in ("sum", "problems")),
    *(f"{term}_{part}_{age}" for term in TERMS for part in ("sum", "clipped", "tokens") for age in AGES),
)
MINIMA = tuple(f"{term}_min_{age}" for term in TERMS for age in AGES)


class Distilled(NamedTuple):
    """A distilled rollout, once for each divergence."""

    rollout: Rollout
    d: Tensor  # d_t [T], NaN for tokens that are not trained
    left_out: Tensor  # [T] bool: tokens without a part in the loss: not trained, or removed from the loss


class StepMetrics:
    """Sums over one step on one rank."""

    def __init__(self, *, max_lag: int, device: torch.device) -> None:
        self.device = device
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in SUMS}
        self.minima = {name: torch.full((), math.inf, dtype=torch.float64, device=device) for name in MINIMA}
        self.tokens_by_lag = torch.zeros(max_lag + 1, dtype=torch.float64, device=device)
        self.mismatch = Mismatch(max_lag=max_lag, device=device)
        self.imbalances: list[float] = []  # of each part of the batch, see `division.imbalance`; equal on every rank
        self.problems: Sequence[Mapping[str, float]] = ()  # the metrics of each problem, in the order of the shard
        self.distilled: list[Distilled] = []
        self.siblings: dict[tuple[int, int], int] = {}  # see `Batch.siblings`

    def add(self, **values: Tensor) -> None:
        """Add the sum of each tensor to the sum of that name."""
        for name, value in values.items():
            self.sums[name] += value.detach().sum()

    def add_correction(self, term: str, weights: Tensor, clipped: Tensor, lags: Tensor) -> None:
        """Add the correction weights of one loss term.

        Args:
            term: one of TERMS.
            weights: [N, T], the factor of each token in the gradient that the correction determines.
            clipped: [N, T] bool, whether the rule's bound has changed it.
            lags: [N, T], lag of each token in versions; -1 in the padding.
        """
        mask = lags >= 0
        for age, tokens in zip(AGES, (lags == 0, lags > 0), strict=True):
            self.sums[f"{term}_sum_{age}"] += weights.masked_fill(~tokens, 0).sum()
            self.sums[f"{term}_clipped_{age}"] += (clipped & tokens).sum()
            self.sums[f"{term}_tokens_{age}"] += tokens.sum()
            least = self.minima[f"{term}_min_{age}"]
            torch.minimum(least, weights.masked_fill(~tokens, math.inf).amin().double(), out=least)
        bins = lags.clamp(0, len(self.tokens_by_lag) - 1).flatten()
        self.tokens_by_lag.index_add_(0, bins, mask.double().flatten())

    def add_kl(self, d: Tensor, mask: Tensor, limited: Tensor, *, delta: float) -> None:
        """Add d_t [K, T] of Eq. 3, what the mask of Eq. 5 would remove, and what the limiter left of it, `limited`."""
        mass = kl_mass(d, mask, delta=delta)
        self.add(tokens_kd=mass.tokens, kl=mass.kl, masked_tokens=mass.masked_tokens, masked_kl=mass.masked_kl)
        self.add(limited_kl=mass.kl.sum() - limited.sum())

    def keep_kl(self, rollouts: Sequence[Rollout], d: Tensor, removed: Tensor) -> None:
        """Keep d_t [K, C] of these distilled rollouts, on the device, for what looks at single tokens.

        `removed` [K, C]: the trained tokens that limiter or correction remove from the loss.
        """
        for rollout, values, zero in zip(rollouts, d.detach(), removed, strict=True):
            trained = torch.from_numpy(rollout.sampled).to(d.device)
            whole = values.new_full(trained.shape, math.nan).masked_scatter(trained, values)
            self.distilled.append(Distilled(rollout, whole, (~trained).masked_scatter(trained, zero)))

    def add_batch(self, batch: Batch, imbalance: float) -> None:
        """Add the metrics of a batch, or of a part of it, that are known before any forward."""
        self.imbalances.append(imbalance)
        self.problems = (*self.problems, *batch.metrics)
        self.siblings |= batch.siblings
        for name, value in (item for metrics in batch.metrics for item in metrics.items()):
            self.sums[f"{name}_sum"] += value
            self.sums[f"{name}_problems"] += 1
        self.sums["targets"] += len(batch.sequences.distillation)
        self.sums["tokens_forward_only"] += batch.forward_only
        self.sums["tokens_stale"] += batch.stale

    def reduce(self) -> dict[str, Any]:
        """Compute the metrics of the step, equal on every rank. A collective of all ranks."""
        sums = torch.cat((torch.stack(list(self.sums.values())), self.tokens_by_lag, self.mismatch.sums.flatten()))
        minima = torch.cat((torch.stack(list(self.minima.values())), -self.mismatch.maxima.flatten()))
        local = torch.cat((sums, minima))
        gathered = local.new_empty(dist.get_world_size() * len(local))
        dist.all_gather_single(gathered, local)
        ranks = gathered.view(-1, len(local)).cpu()
        sizes = (len(SUMS), len(self.tokens_by_lag), self.mismatch.sums.numel())
        named, by_lag, mismatch_sums = ranks[:, : len(sums)].sum(0).split(sizes)
        lowest, negated = ranks[:, len(sums) :].amin(0).split((len(MINIMA), self.mismatch.maxima.numel()))
        total = dict(zip(SUMS, named.tolist(), strict=True))
        least = dict(zip(MINIMA, lowest.tolist(), strict=True))
        return (
            {"imbalance": sum(self.imbalances) / len(self.imbalances)}
            | _loss_metrics(total)
            | {name: _ratio(total[f"{name}_sum"], total[f"{name}_problems"]) for name in PROBLEM_METRICS}
            | _correction_metrics(total, least)
            | _lag_metrics(by_lag.tolist())
            | mismatch.metrics(mismatch_sums.view_as(self.mismatch.sums), -negated.view_as(self.mismatch.maxima))
        )


def _loss_metrics(total: dict[str, float]) -> dict[str, Any]:
    return {
        "loss": total["grpo_loss"] + total["kd_loss"] + total["likelihood_loss"],
        "grpo_loss": total["grpo_loss"],
        "kd_loss": total["kd_loss"],
        "likelihood_loss": total["likelihood_loss"] if total["tokens_likelihood"] else None,
        "entropy": _ratio(total["entropy"], total["entropy_tokens"]),
        "kept_mean": _ratio(total["kept"], total["tokens_policy_gradient"]) or None,
        "kl_mean": _ratio(total["kl"], total["tokens_kd"]),
        "kl_masked_fraction": _ratio(total["masked_tokens"], total["tokens_kd"]),
        "kl_masked_mass": _ratio(total["masked_kl"], total["kl"]),
        "kl_limited_mass": _ratio(total["limited_kl"], total["kl"]),
        "targets": int(total["targets"]),
        "tokens": int(total["tokens_policy_gradient"] + total["tokens_kd"] + total["tokens_likelihood"]),
        "tokens_forward_only": int(total["tokens_forward_only"]),
        "tokens_stale": int(total["tokens_stale"]),
    }


def _correction_metrics(total: dict[str, float], lowest: dict[str, float]) -> dict[str, Any]:
    """Compute mean, minimum and clipped fraction of each term's weights, over all, lag-0 and stale tokens."""
    metrics: dict[str, Any] = {}
    for term in TERMS:
        for suffix, ages in (("", AGES), *((f"_{age}", (age,)) for age in AGES)):
            tokens = sum(total[f"{term}_tokens_{age}"] for age in ages)
            metrics[f"{term}_mean{suffix}"] = _ratio(sum(total[f"{term}_sum_{age}"] for age in ages), tokens)
            metrics[f"{term}_clipped{suffix}"] = _ratio(sum(total[f"{term}_clipped_{age}"] for age in ages), tokens)
            least = min(lowest[f"{term}_min_{age}"] for age in ages)
            metrics[f"{term}_min{suffix}"] = least if tokens else None
    return metrics


def _lag_metrics(tokens: list[float]) -> dict[str, Any]:
    seen = {lag: count for lag, count in enumerate(tokens) if count}
    return {
        "lag_histogram": {str(lag): int(count) for lag, count in seen.items()},
        "lag_mean": _ratio(sum(lag * count for lag, count in seen.items()), sum(tokens)),
        "lag_max": max(seen, default=None),
    }


def _ratio(part: float, whole: float) -> float | None:
    """Divide; return None if `whole` is 0, because JSON has no NaN."""
    return part / whole if whole else None

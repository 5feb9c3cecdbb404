"""What one step did, added up over micro-batches, and over ranks in one collective.

A rank adds sums and minima of any number of micro-batches; `reduce` gathers every rank's vector once and divides.
Correction weights are kept apart for lag 0, where those of GRPO show the mismatch between engine and learner alone, and
for stale tokens, where they also show how far the policy has moved. Ratios by lag are GRPO's alone for that reason: a
frozen teacher differs from the behaviour policy at any lag.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgpo_async.algorithm import correction_weights, kl_mass
from sgpo_async.config.schema import Correction

AGES = ("lag0", "stale")
TERMS = ("correction", "kl_correction")
SUMS = (
    *("grpo_loss", "kd_loss", "entropy", "tokens_auto", "tokens_kd", "kl", "masked_tokens", "masked_kl"),
    *(f"{term}_{part}_{age}" for term in TERMS for part in ("sum", "clipped", "tokens") for age in AGES),
)
MINIMA = tuple(f"{term}_min_{age}" for term in TERMS for age in AGES)


class Statistics:
    """Sums over one step on one rank."""

    def __init__(self, *, max_lag: int, device: torch.device) -> None:
        self.device = device
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in SUMS}
        self.minima = {name: torch.full((), math.inf, dtype=torch.float64, device=device) for name in MINIMA}
        self.by_lag = torch.zeros(3, max_lag + 1, dtype=torch.float64, device=device)  # tokens; GRPO's: tokens, ratios

    def add(self, **values: Tensor) -> None:
        """Add numbers, or the sum of a tensor, to the named sums."""
        for name, value in values.items():
            self.sums[name] += value.detach().sum()

    def add_correction(self, term: str, weights: Tensor, log_rho: Tensor, lags: Tensor, rule: Correction) -> None:
        """Record one term's correction.

        Args:
            term: one of TERMS.
            weights: [N, T], as used.
            log_rho: [N, T], log pi - log mu, from which they came.
            lags: [N, T] versions behind; -1 in the padding.
            rule: mode and bound. A token counts as clipped if its weight would be another without the bound.
        """
        mask = lags >= 0
        zero = torch.zeros_like(log_rho)
        clipped = weights != correction_weights(log_rho, zero, mask, mode=rule.mode, bound=math.inf)
        for age, tokens in zip(AGES, (lags == 0, lags > 0), strict=True):
            self.sums[f"{term}_sum_{age}"] += weights.masked_fill(~tokens, 0).sum()
            self.sums[f"{term}_clipped_{age}"] += (clipped & tokens).sum()
            self.sums[f"{term}_tokens_{age}"] += tokens.sum()
            least = self.minima[f"{term}_min_{age}"]
            torch.minimum(least, weights.masked_fill(~tokens, math.inf).amin().double(), out=least)
        bins = lags.clamp(0, self.by_lag.shape[1] - 1).flatten()
        self.by_lag[0].index_add_(0, bins, mask.double().flatten())
        if term == "correction":
            self.by_lag[1].index_add_(0, bins, mask.double().flatten())
            self.by_lag[2].index_add_(0, bins, log_rho.double().exp().masked_fill(~mask, 0).flatten())

    def add_kl(self, d: Tensor, mask: Tensor, *, delta: float) -> None:
        """Record d_t [K, T] of Eq. 3 and what the limiter of Eq. 5 takes from it."""
        mass = kl_mass(d, mask, delta=delta)
        self.add(tokens_kd=mass.tokens, kl=mass.kl, masked_tokens=mass.masked_tokens, masked_kl=mass.masked_kl)

    def reduce(self) -> dict[str, Any]:
        """The step's metrics, equal on every rank. A collective of all ranks."""
        sums = torch.cat((torch.stack(list(self.sums.values())), self.by_lag.flatten()))
        own = torch.cat((sums, torch.stack(list(self.minima.values()))))
        gathered = own.new_empty(dist.get_world_size() * len(own))
        dist.all_gather_single(gathered, own)
        ranks = gathered.view(-1, len(own)).cpu()
        total = dict(zip(SUMS, ranks[:, : len(SUMS)].sum(0).tolist(), strict=True))
        lowest = dict(zip(MINIMA, ranks[:, len(sums) :].amin(0).tolist(), strict=True))
        tokens, own_tokens, ratios = ranks[:, len(SUMS) : len(sums)].sum(0).view(3, -1).tolist()
        by_lag = _lag_metrics(tokens) | _ratio_metrics(own_tokens, ratios)
        return _loss_metrics(total) | _correction_metrics(total, lowest) | by_lag


def _loss_metrics(total: dict[str, float]) -> dict[str, Any]:
    return {
        "loss": total["grpo_loss"] + total["kd_loss"],
        "grpo_loss": total["grpo_loss"],
        "kd_loss": total["kd_loss"],
        "entropy": _ratio(total["entropy"], total["tokens_auto"]),
        "kl_mean": _ratio(total["kl"], total["tokens_kd"]),
        "kl_masked_fraction": _ratio(total["masked_tokens"], total["tokens_kd"]),
        "kl_masked_mass": _ratio(total["masked_kl"], total["kl"]),
        "tokens": int(total["tokens_auto"] + total["tokens_kd"]),
    }


def _correction_metrics(total: dict[str, float], lowest: dict[str, float]) -> dict[str, Any]:
    """Mean, minimum and clipped share of each term's weights: over all tokens, and for lag 0 and stale ones apart."""
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


def _ratio_metrics(tokens: list[float], ratios: list[float]) -> dict[str, Any]:
    return {
        "ratio_mean": _ratio(sum(ratios), sum(tokens)),
        "ratio_by_lag": {str(lag): ratios[lag] / count for lag, count in enumerate(tokens) if count},
    }


def _ratio(part: float, whole: float) -> float | None:
    """None where there is nothing to divide: JSON has no NaN."""
    return part / whole if whole else None

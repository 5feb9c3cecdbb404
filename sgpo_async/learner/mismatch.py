"""Engine against learner: how far log pi here and log mu there lie apart on the tokens of the autonomous rollouts.

                  lag 0: both hold the same weights        stale: the engine's were older
    first span    kernels, precision, sampler              these, and how far the policy has moved since
    later spans   these, and what the engine makes of      all of it
                  a sequence begun under older weights

A span is what one version of the weights sampled of a rollout; later ones follow an update in flight. An engine that
keeps old keys and values is wrong in them alone. Only lag 0 tells anything about the engine by itself, so nothing else
is ever alarmed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgpo_async.config.schema import Run
from sgpo_async.metrics.mismatch import SPANS

AGES = ("lag0", "stale")
EVIDENCE = 64  # tokens whose mean is judged: in bfloat16 a single sound one may differ by 0.2 nats
# What is sound: in float32 no token differed by more than 3e-5 nats, in bfloat16 the mean is of the order of 1e-2.
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-4, 0.05


class Mismatch:
    """Sums and maxima over one step on one rank, by span and lag.

    Attributes:
        sums: [4, 2, max_lag + 1] of 1, rho, |log rho| and rho - 1 - log rho, where rho = pi/mu.
        maxima: [2, max_lag + 1] of |log rho|; 0 without tokens.
    """

    def __init__(self, *, max_lag: int, device: torch.device) -> None:
        shape = (len(SPANS), max_lag + 1)
        self.sums = torch.zeros(4, *shape, dtype=torch.float64, device=device)
        self.maxima = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, log_rho: Tensor, lags: Tensor, later: Tensor) -> None:
        """Record tokens.

        Args:
            log_rho: [N, T], log pi - log mu.
            lags: [N, T] versions behind; -1 in the padding.
            later: [N, T], true beyond the first span of the rollout.
        """
        mask = (lags >= 0).flatten()
        lag_count = self.maxima.shape[1]
        bins = (later * lag_count + lags.clamp(0, lag_count - 1)).flatten()
        x = log_rho.detach().double().flatten().masked_fill(~mask, 0)
        values = torch.stack((mask.double(), x.exp().masked_fill(~mask, 0), x.abs(), x.expm1() - x))
        self.sums.view(4, -1).index_add_(1, bins, values)
        self.maxima.view(-1).scatter_reduce_(0, bins, x.abs(), "amax")


def metrics(sums: Tensor, maxima: Tensor) -> dict[str, float | int | dict[str, float] | None]:
    """Figures of `Mismatch.sums` and `.maxima` over all ranks; None where nothing was measured.

    Per age and span: tokens, mean and maximum of |log rho| in nats, and the k3 estimate of KL(mu || pi), the mean of
    rho - 1 - log rho (http://joschu.net/blog/kl-approx.html).
    """
    found: dict[str, float | int | dict[str, float] | None] = {}
    for age, lags in zip(AGES, (slice(0, 1), slice(1, None)), strict=True):
        for span, of_span, most in zip(SPANS, sums[:, :, lags].sum(2).T, maxima[:, lags], strict=True):
            tokens, _, distance, kl = of_span.tolist()
            found[f"mismatch_tokens_{age}_{span}"] = int(tokens)
            found[f"mismatch_mean_{age}_{span}"] = distance / tokens if tokens else None
            found[f"mismatch_max_{age}_{span}"] = float(most.max()) if tokens else None
            found[f"mismatch_kl_{age}_{span}"] = kl / tokens if tokens else None
    tokens, ratio, distance, _ = sums.sum(1)
    found["ratio_mean"] = float(ratio.sum() / tokens.sum()) if tokens.sum() else None
    found["ratio_by_lag"] = _by_lag(ratio, tokens)
    found["mismatch_by_lag"] = _by_lag(distance, tokens)
    return found


def _by_lag(part: Tensor, tokens: Tensor) -> dict[str, float]:
    return {str(lag): float(part[lag] / count) for lag, count in enumerate(tokens.tolist()) if count}


def bound_for(run: Run, *, learner_bfloat16: bool) -> float:
    """The bound of the alarm in nats: `learner.mismatch_bound`, or, where that is 0, what the precisions allow."""
    coarse = learner_bfloat16 or run.model.dtype == "bfloat16"
    return run.learner.mismatch_bound or (BFLOAT16_BOUND if coarse else FLOAT32_BOUND)


@dataclass
class Alarm:
    """Puts means at lag 0 beside the bound; who reads the line can tell an alarm (`sgpo_async.metrics.mismatch`).

    In an asynchronous run few tokens may be that new. They are gathered over steps until EVIDENCE of a kind are there:
    then a mean is worth judging, and none is ever left out. A resumed run gathers anew.
    """

    bound: float
    _waiting: dict[str, tuple[int, float]] = field(default_factory=dict)  # by span: tokens, sum of |log rho|

    def judge(self, line: Mapping[str, Any]) -> dict[str, float | None]:
        """The bound, and per kind of span the mean of |log rho| that is compared with it; None while too few tokens."""
        return {"mismatch_bound": self.bound} | {f"mismatch_judged_{span}": self._mean(line, span) for span in SPANS}

    def _mean(self, line: Mapping[str, Any], span: str) -> float | None:
        new, mean = line[f"mismatch_tokens_lag0_{span}"], line[f"mismatch_mean_lag0_{span}"] or 0.0
        tokens, total = self._waiting.pop(span, (0, 0.0))
        tokens, total = tokens + new, total + new * mean
        if tokens >= EVIDENCE:
            return total / tokens
        self._waiting[span] = tokens, total
        return None

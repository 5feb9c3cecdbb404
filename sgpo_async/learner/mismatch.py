"""The difference between the learner's log pi and the engine's log mu on the tokens of the policy gradient.

They are compared after the prompt with which the rollout was sampled, unless an objective trains it after another.
The table shows the causes of the difference:

                  lag 0: both hold the same weights        stale: the engine's weights were older
    first span    kernels, precision, sampler              the same, and the change of the policy since then
    later spans   the same, and how the engine continues   all of these
                  a sequence begun with older weights

A span is the part of a rollout that one weight version sampled; later spans follow a weight update in flight. An engine
that wrongly keeps old keys and values differs only in later spans. Only at lag 0 does the difference measure the engine
alone, so the alarm uses only lag 0.
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
# The alarm uses the mean of at least this many tokens, because in bfloat16 a single token may differ by 0.2 nats.
MIN_TOKENS = 64
# A correct engine differs by at most 3e-5 nats per token in float32, and by about 1e-2 nats on average in bfloat16.
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-4, 0.05


class Mismatch:
    """Sums and maxima over one step on one rank, by span and lag.

    Attributes:
        sums: [4, 2, max_lag + 1], sums of 1, rho, |log rho| and rho - 1 - log rho, where rho = pi/mu.
        maxima: [2, max_lag + 1], maxima of |log rho|; 0 without tokens.
    """

    def __init__(self, *, max_lag: int, device: torch.device) -> None:
        shape = (len(SPANS), max_lag + 1)
        self.sums = torch.zeros(4, *shape, dtype=torch.float64, device=device)
        self.maxima = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, log_rho: Tensor, lags: Tensor, later: Tensor) -> None:
        """Add tokens to the sums and maxima.

        Args:
            log_rho: [N, T], log pi - log mu.
            lags: [N, T], lag of each token in versions; -1 in the padding.
            later: [N, T], true after the first span of the rollout.
        """
        mask = (lags >= 0).flatten()
        lag_count = self.maxima.shape[1]
        bins = (later * lag_count + lags.clamp(0, lag_count - 1)).flatten()
        x = log_rho.detach().double().flatten().masked_fill(~mask, 0)
        values = torch.stack((mask.double(), x.exp().masked_fill(~mask, 0), x.abs(), x.expm1() - x))
        self.sums.view(4, -1).index_add_(1, bins, values)
        self.maxima.view(-1).scatter_reduce_(0, bins, x.abs(), "amax")


def metrics(sums: Tensor, maxima: Tensor) -> dict[str, float | int | dict[str, float] | None]:
    """Compute the metrics from `Mismatch.sums` and `.maxima` of all ranks; None where nothing was measured.

    For lag 0 and for stale tokens, and for each span: the number of tokens, the mean and maximum of |log rho| in nats,
    and the k3 estimate of KL(mu || pi), the mean of rho - 1 - log rho (http://joschu.net/blog/kl-approx.html).
    """
    found: dict[str, float | int | dict[str, float] | None] = {}
    for age, lags in zip(AGES, (slice(0, 1), slice(1, None)), strict=True):
        for span, span_sums, span_maxima in zip(SPANS, sums[:, :, lags].sum(2).T, maxima[:, lags], strict=True):
            tokens, _, distance, kl = span_sums.tolist()
            found[f"mismatch_tokens_{age}_{span}"] = int(tokens)
            found[f"mismatch_mean_{age}_{span}"] = distance / tokens if tokens else None
            found[f"mismatch_max_{age}_{span}"] = float(span_maxima.max()) if tokens else None
            found[f"mismatch_kl_{age}_{span}"] = kl / tokens if tokens else None
    tokens, ratio, distance, _ = sums.sum(1)
    found["ratio_mean"] = float(ratio.sum() / tokens.sum()) if tokens.sum() else None
    found["ratio_by_lag"] = _by_lag(ratio, tokens)
    found["mismatch_by_lag"] = _by_lag(distance, tokens)
    return found


def _by_lag(part: Tensor, tokens: Tensor) -> dict[str, float]:
    return {str(lag): float(part[lag] / count) for lag, count in enumerate(tokens.tolist()) if count}


def bound_for(run: Run, *, learner_bfloat16: bool) -> float:
    """Return the alarm's bound in nats: `learner.mismatch_bound` or, if that is 0, a default for the precision."""
    bfloat16 = learner_bfloat16 or run.model.dtype == "bfloat16"
    return run.learner.mismatch_bound or (BFLOAT16_BOUND if bfloat16 else FLOAT32_BOUND)


@dataclass
class Alarm:
    """Computes the means at lag 0 that `sgpo_async.metrics.mismatch` compares with the bound.

    In an asynchronous run few tokens may have lag 0. The alarm accumulates them over steps until it has MIN_TOKENS of a
    kind, computes their mean, and starts again, so every token at lag 0 is compared once. The accumulated tokens are
    not part of checkpoints: a resumed run starts from zero.
    """

    bound: float
    _waiting: dict[str, tuple[int, float]] = field(default_factory=dict)  # by span: tokens, sum of |log rho|

    def judge(self, line: Mapping[str, Any]) -> dict[str, float | None]:
        """Return the bound, and for each span the mean of |log rho| to compare with it, or None with too few tokens."""
        return {"mismatch_bound": self.bound} | {f"mismatch_judged_{span}": self._mean(line, span) for span in SPANS}

    def _mean(self, line: Mapping[str, Any], span: str) -> float | None:
        new, mean = line[f"mismatch_tokens_lag0_{span}"], line[f"mismatch_mean_lag0_{span}"] or 0.0
        tokens, total = self._waiting.pop(span, (0, 0.0))
        tokens, total = tokens + new, total + new * mean
        if tokens >= MIN_TOKENS:
            return total / tokens
        self._waiting[span] = tokens, total
        return None

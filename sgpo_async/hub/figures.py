"""What a batch looked like: lag, pass rates, mean adaptive weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sgpo_async.config.schema import Algorithm
from sgpo_async.hub.work import Group


def figures(groups: Sequence[Group], *, version: int, algorithm: Algorithm) -> dict[str, Any]:
    """Figures of a batch trained by `version`, as plain data.

    `lag` counts sampled tokens; pass rates are means over groups; `alpha` is the mean weight (Eq. 6) over groups,
    0 where the objective does not distil.
    """
    autonomous = [group.pass_rate(guided=False) for group in groups]
    guided = [group.pass_rate(guided=True) for group in groups]
    distils = algorithm.objective == "sgpo"
    alphas = [
        adaptive_weight(p_auto or 0.0, p_guide or 0.0, algorithm) if distils else 0.0
        for p_auto, p_guide in zip(autonomous, guided, strict=True)
    ]
    return {
        "lag": lag(groups, version=version),
        "pass_auto": mean_of_known(autonomous),
        "pass_guided": mean_of_known(guided),
        "alpha": float(np.mean(alphas)),
    }


def adaptive_weight(p_auto: float, p_guide: float, algorithm: Algorithm) -> float:
    """SGPO's alpha (arXiv 2606.24064, Eq. 6); 0 without a correct guided rollout, as nothing is distilled then."""
    if p_guide == 0:
        return 0.0
    alpha = algorithm.alpha0 * (p_guide - p_auto + algorithm.gamma) / (p_auto + algorithm.gamma)
    return min(max(alpha, 0.0), algorithm.alpha_max)


def lag(groups: Sequence[Group], *, version: int) -> dict[str, Any]:
    """Mean, maximum and histogram {lag: tokens} of how many versions older than `version` the tokens are."""
    lags = np.concatenate(
        [version - rollout.token_versions() for group in groups for rollout in group.rollouts]
    )
    values, counts = np.unique(lags, return_counts=True)
    histogram = {str(value): int(count) for value, count in zip(values, counts, strict=True)}
    return {"mean": float(lags.mean()), "max": int(lags.max()), "histogram": histogram}


def mean_of_known(rates: Sequence[float | None]) -> float | None:
    """Mean of those that are not None; None if all are."""
    known = [rate for rate in rates if rate is not None]
    return float(np.mean(known)) if known else None

"""Lag, pass rates and rewards of a trained batch. The learner reports its other metrics, such as losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.wire.records import OBSERVED


def batch_metrics(groups: Sequence[CompletedGroup], *, version: int) -> dict[str, Any]:
    """Metrics of a batch that weights of `version` were trained on.

    `lag` is computed over sampled tokens; pass rates and rewards are means over groups. `uniform` is the share of
    groups whose autonomous rollouts all have the same reward, so that the policy gradient learns nothing from them;
    `cut` is that of the rollouts that max_new_tokens has cut. Lengths are means over rollouts.
    """
    return {
        "lag": lag(groups, version=version),
        "pass_auto": mean_of_known([group.pass_rate(guided=False) for group in groups]),
        "pass_guided": mean_of_known([group.pass_rate(guided=True) for group in groups]),
        "reward_auto": mean_of_known([group.mean_reward(guided=False) for group in groups]),
        "reward_guided": mean_of_known([group.mean_reward(guided=True) for group in groups]),
        "uniform": float(np.mean([len({r.reward for r in group.rollouts if not r.guided}) <= 1 for group in groups])),
        "cut": float(np.mean([r.finish != "stop" for group in groups for r in group.rollouts])),
        "length_auto": mean_length(groups, guided=False),
        "length_guided": mean_length(groups, guided=True),
    }


def lag(groups: Sequence[CompletedGroup], *, version: int) -> dict[str, Any]:
    """Mean, maximum and histogram {lag: number of tokens} of `version` minus the version of each token."""
    tokens: Counter[int] = Counter()
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        start = 0
        for own, end in zip(rollout.versions.tolist(), rollout.ends.tolist(), strict=True):
            if own != OBSERVED:
                tokens[version - own] += end - start
            start = end
    mean = sum(one * count for one, count in tokens.items()) / tokens.total()
    histogram = {str(one): count for one, count in sorted(tokens.items())}
    return {"mean": mean, "max": max(tokens), "histogram": histogram}


def mean_length(groups: Sequence[CompletedGroup], *, guided: bool) -> float | None:
    """Mean number of tokens of the completions, with those of an environment; None if there are none."""
    lengths = [len(r.tokens) for group in groups for r in group.rollouts if r.guided == guided]
    return float(np.mean(lengths)) if lengths else None


def mean_of_known(rates: Sequence[float | None]) -> float | None:
    """Mean of the rates that are not None; None if all of them are None."""
    known = [rate for rate in rates if rate is not None]
    return float(np.mean(known)) if known else None

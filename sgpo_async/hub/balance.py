"""Deals groups to the learner ranks, about as many tokens to each; the ranks then divide the work by themselves."""

from __future__ import annotations

from collections.abc import Sequence


def balance(weights: Sequence[int], ranks: int) -> list[list[int]]:
    """Partition the indices of `weights` over `ranks`, with sums of weights that are nearly equal.

    The rule is "longest processing time first" (Graham, 1969): the heaviest remaining item goes to the rank with the
    smallest sum so far. The largest sum is at most 4/3 - 1/(3 ranks) times the smallest possible one. All weights are
    positive, so no rank is empty if there are at least as many items as ranks. Of equal items or ranks, the one with
    the lower index comes first. Each rank's indices are ascending.
    """
    assert all(weight > 0 for weight in weights), weights
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += weights[index]
        shares[rank].append(index)
    return [sorted(share) for share in shares]

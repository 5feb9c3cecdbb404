"""Distribution of groups over learner ranks, so that all are done at about the same time."""

from __future__ import annotations

from collections.abc import Sequence


def balance(weights: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of `weights` for each rank, ascending, with sums as equal as a greedy rule makes them.

    Longest processing time first (Graham, 1969): the heaviest goes to the rank that has least so far; the largest sum
    is at most 4/3 - 1/(3 ranks) of the best possible. Weights are positive, so every rank gets one while there are
    enough. Ties go to the lower index and the lower rank.
    """
    assert all(weight > 0 for weight in weights), weights
    loads = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += weights[index]
        shares[rank].append(index)
    return [sorted(share) for share in shares]

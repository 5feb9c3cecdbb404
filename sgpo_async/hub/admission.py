"""Admission control: how many tasks may be in flight, and how old the weights that serve them may be.

AReaL (arXiv 2505.24298, Eq. 3) admits a rollout while accepted + running < (eta + steps + 1) * batch. Here every step
trains exactly one batch, so accepted = steps * batch + buffered, and the rule becomes
running + buffered < (eta + 1) * batch: the step number cancels. With eta = 0 there is one batch at a time, which is
the synchronous algorithm.
"""

from __future__ import annotations


def free_capacity(*, live: int, batch: int, max_lag: int, steps_left: int) -> int:
    """How many more tasks the hub may dispatch while `live` tasks are neither trained nor dropped.

    It never dispatches more tasks than the remaining `steps_left` optimiser steps can train.
    """
    return min(max_lag + 1, steps_left) * batch - live


def lowest_version(*, version: int, ahead: int, batch: int, max_lag: int) -> int:
    """The lowest weight version whose tokens are not yet stale when the next leased task is trained.

    `ahead` tasks are running or buffered before this task, so it is trained `ahead // batch` batches after the next
    batch, by weights of `version + ahead // batch`. The result is at most `version`, because `free_capacity` limits
    `ahead` to less than (max_lag + 1) * batch.
    """
    return version + ahead // batch - max_lag

"""How many tasks may be under way, and how old their tokens may be.

AReaL (arXiv 2505.24298, Eq. 3) admits a rollout while accepted + running < (eta + steps + 1) * batch. Every step
here trains exactly one batch, so accepted = steps * batch + buffered, and the rule becomes
running + buffered < (eta + 1) * batch: the step number cancels. With eta = 0 this is one batch at a time, the
synchronous algorithm.
"""

from __future__ import annotations


def room(*, live: int, batch: int, max_lag: int, steps_left: int) -> int:
    """How many more tasks may be dispatched while `live` are neither trained nor dropped.

    Never more than the `steps_left` optimiser steps can train.
    """
    return min(max_lag + 1, steps_left) * batch - live


def lowest_version(*, version: int, ahead: int, batch: int, max_lag: int) -> int:
    """The oldest version whose tokens are not yet stale when this task's batch is formed.

    `ahead` tasks are running or buffered before it, so it lands `ahead // batch` batches, that is versions, after
    the next one, which is trained by `version`. At most `version`, because `room` keeps `ahead` within
    (max_lag + 1) * batch.
    """
    return version + ahead // batch - max_lag

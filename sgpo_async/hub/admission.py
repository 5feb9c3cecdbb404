"""Admission control: how many tasks may be in flight, and how old the weights that serve them may be.

AReaL (arXiv 2505.24298, Eq. 3) admits a rollout while accepted + running < (eta + steps + 1) * batch. Here every step
trains exactly one batch, so accepted = steps * batch + buffered, and the rule becomes
running + buffered < (eta + 1) * batch: the step number cancels. With eta = 0 there is one batch at a time, which is
the synchronous algorithm.
"""

from __future__ import annotations


def free_capacity(*, fresh: int, live: int, batch: int, max_lag: int, batches: int, steps_left: int) -> int:
    """How many more tasks the hub may dispatch.

    Args:
        fresh: tasks that are neither trained nor dropped, without running ones that have stale tokens already. Those
            are late whatever else is dispatched, and no batch waits for them.
        live: all tasks that are neither trained nor dropped.
        batches: batches of tasks that may be live.
        steps_left: remaining optimiser steps; the hub never dispatches more tasks than they can train.
    """
    limits = ((max_lag + 1) * batch - fresh, batches * batch - live, steps_left * batch - live)
    return min(limits)


def lowest_version(*, version: int, ahead: int, batch: int, max_lag: int) -> int:
    """The lowest weight version whose tokens are not yet stale when the next leased task is trained.

    `ahead` fresh tasks are running or buffered before this task, so it is trained `ahead // batch` batches after the
    next batch, by weights of `version + ahead // batch`. The result is at most `version`, because `free_capacity`
    limits `ahead` to less than (max_lag + 1) * batch.
    """
    return version + ahead // batch - max_lag


def kept_back(*, tasks: int, ready: int, coming: int) -> int:
    """How many of the tasks that could be leased now are kept for actors that are about to serve the newest weights.

    Otherwise the first actors that have them would take more than their slots, while the others stay empty.

    Args:
        tasks: those that can be leased now, and those that were since the publication.
        ready: leases that the actors can take which serve these weights, and those that they have got since.
        coming: leases that the others can take as soon as they do.
    """
    return tasks * coming // (ready + coming) if coming else 0


def evaluation_limit(share: float, *, leases: int) -> int:
    """How many tasks of evaluation may be leased before training is served, of all `leases`; at least one."""
    return max(1, int(share * leases))

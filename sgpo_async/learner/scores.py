"""What teacher and reference say of the sampled tokens, added to the sequences before the forward pass.

    with_evidence    log p(o_t|context), or its difference from wrong contexts, for `algorithm.credit`
    with_reference   log pi_0(o_t), for `algorithm.reference_kl`

Both are collectives of all ranks, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from sgpo_async.learner.objectives.base import PolicyGradient, rollout_after
from sgpo_async.learner.packing import Tokens

Score = Callable[[Sequence[Tokens]], Sequence[np.ndarray]]
"""Sequences -> the log-probability of each of their trained tokens, [C] float64 each."""


def with_evidence(items: Sequence[PolicyGradient], score: Score) -> list[PolicyGradient]:
    """Ask the teacher about the items that have a context; the results have `evidence` in its place."""
    sequences = [
        rollout_after(prompt, item.rollout)
        for item in items
        if item.context
        for prompt in (item.context.right, *item.context.wrong)
    ]
    scores = iter(score(sequences))
    return [replace(item, context=None, evidence=_evidence(item, scores)) if item.context else item for item in items]


def with_reference(items: Sequence[PolicyGradient], score: Score) -> list[PolicyGradient]:
    """Add what the reference says of every item."""
    scores = score([item.student for item in items])
    return [replace(item, log_reference=_whole(item, own)) for item, own in zip(items, scores, strict=True)]


def _evidence(item: PolicyGradient, scores: Iterator[np.ndarray]) -> np.ndarray:
    """The log-probability with the right context, less that of the mean over wrong ones, if there are any: [T]."""
    assert item.context
    found, wrong = next(scores), [next(scores) for _ in item.context.wrong]
    if wrong:
        found = found - (np.logaddexp.reduce(wrong) - np.log(len(wrong)))
    return _whole(item, found)


def _whole(item: PolicyGradient, values: np.ndarray) -> np.ndarray:
    """Values of the trained tokens, at their places among all tokens of the rollout; 0 at the others."""
    found = np.zeros(len(item.rollout.tokens))
    found[item.rollout.sampled] = values
    return found

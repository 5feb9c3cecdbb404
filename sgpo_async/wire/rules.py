"""What types cannot say about a record: lengths that belong together, spans, finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sgpo_async.wire.records import Rollout


def rollout_fault(rollout: Rollout) -> str | None:
    """What keeps a learner from training on this rollout, if anything.

    Token ids are not compared with a vocabulary: the wire knows none.
    """
    length, ends = len(rollout.tokens), rollout.ends
    if not len(rollout.prompt) or not length:
        return "prompt and tokens hold at least one token each"
    if len(rollout.logprobs) != length:
        return f"{len(rollout.logprobs)} logprobs for {length} tokens"
    if not len(ends) or len(rollout.versions) != len(ends):
        return f"{len(rollout.versions)} versions for {len(ends)} spans"
    if ends[0] <= 0 or ends[-1] != length or not increasing(ends):
        return f"spans end at {ends[:8].tolist()}, not increasing from above 0 to {length}"
    if rollout.prompt.min() < 0 or rollout.tokens.min() < 0 or rollout.versions.min() < 0:
        return "a token id or a version is below 0"
    if not np.isfinite(rollout.logprobs).all():
        return "a log-probability is not finite"
    if not math.isfinite(rollout.reward) or not math.isfinite(rollout.unguided_logprob or 0.0):
        return "reward or unguided_logprob is not finite"
    return None


def increasing(ends: np.ndarray) -> bool:
    """Whether every element is larger than the one before."""
    return len(ends) == 1 or bool((ends[1:] > ends[:-1]).all())


FAULTS: dict[type, Callable[[Any], str | None]] = {Rollout: rollout_fault}

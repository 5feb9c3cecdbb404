"""What types cannot say about a record: lengths that belong together, spans, finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from sgpo_async.wire.records import Lease, Rollout, Shard


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
    if not 0.0 <= rollout.reward <= 1.0:
        return f"reward {rollout.reward} is outside [0, 1]"
    return unguided_fault(rollout) or top_fault(rollout)


def unguided_fault(rollout: Rollout) -> str | None:
    """What is wrong with the log-probability under the plain prompt, of which Eq. 4 chooses the target."""
    value = rollout.unguided_logprob
    if value is None:
        needed = rollout.guided and rollout.purpose == "train" and rollout.reward == 1.0
        return "a correct guided rollout lacks unguided_logprob" if needed else None
    if not rollout.guided:
        return "unguided_logprob on a rollout that is not guided"
    return None if math.isfinite(value) else "unguided_logprob is not finite"


def top_fault(rollout: Rollout) -> str | None:
    """What is wrong with the likeliest tokens, from which a behaviour policy teaches."""
    tokens, logprobs = rollout.top_tokens, rollout.top_logprobs
    if tokens is None and logprobs is None:
        return None
    if tokens is None or logprobs is None or rollout.unguided_logprob is None:
        return "top_tokens and top_logprobs belong together, on a correct guided rollout"
    if not len(tokens) or len(tokens) != len(logprobs) or len(tokens) % len(rollout.tokens):
        return f"{len(tokens)} top_tokens and {len(logprobs)} top_logprobs for {len(rollout.tokens)} tokens"
    return None if tokens.min() >= 0 and np.isfinite(logprobs).all() else "a top token is below 0 or not finite"


def increasing(ends: np.ndarray) -> bool:
    """Whether every element is larger than the one before."""
    return len(ends) == 1 or bool((ends[1:] > ends[:-1]).all())


def lease_fault(lease: Lease) -> str | None:
    """What keeps an actor from sampling as it is asked to."""
    if not (lease.temperature > 0 and 0 < lease.top_p <= 1 and lease.max_new_tokens >= 1):
        return f"temperature {lease.temperature}, top_p {lease.top_p}, max_new_tokens {lease.max_new_tokens}"
    if lease.top_logprobs_num < 0:
        return f"top_logprobs_num {lease.top_logprobs_num}"
    if lease.purpose == "train" and lease.top_p < 1:
        return f"top_p {lease.top_p} for training, whose log-probabilities would be of another distribution"
    return None


def shard_fault(shard: Shard) -> str | None:
    """Only what was sampled for training is trained: evaluation may truncate the distribution."""
    strangers = [rollout.task for rollout in shard.rollouts if rollout.purpose != "train"]
    return f"rollouts of task {strangers[0]}, which is no training task" if strangers else None


FAULTS: dict[type, Callable[[Any], str | None]] = {Lease: lease_fault, Rollout: rollout_fault, Shard: shard_fault}

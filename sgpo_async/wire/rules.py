"""Rules for records that types cannot express: sizes that must agree, parameters that an engine can use.

Each function returns why a record is invalid, or None if it is valid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgpo_async.wire.records import Lease, Rollout, Shard


def invalid_rollout(rollout: Rollout) -> str | None:
    """Why the arrays of a rollout do not fit together.

    What they hold is not checked here: the hub checks it against the lease (`sgpo_async.hub.rollout_checks`), because
    it has to end a lease whose rollout it refuses.
    """
    length, spans, top = len(rollout.tokens), len(rollout.ends), rollout.top_tokens
    if not len(rollout.prompt) or not length:
        return "prompt and tokens must hold at least one token each"
    if len(rollout.logprobs) != length:
        return f"logprobs must hold one number for each of {length} tokens, got {len(rollout.logprobs)}"
    if not spans or len(rollout.versions) != spans:
        return f"versions must hold one number for each of one or more spans, got {len(rollout.versions)} for {spans}"
    if (top is None) != (rollout.top_logprobs is None):
        return "top_tokens and top_logprobs must come together"
    if top is None or rollout.top_logprobs is None:
        return None
    if not len(top) or len(top) != len(rollout.top_logprobs) or len(top) % length:
        return (
            f"top_tokens and top_logprobs must hold k numbers for each of {length} tokens, "
            f"got {len(top)} and {len(rollout.top_logprobs)}"
        )
    return None


def invalid_lease(lease: Lease) -> str | None:
    """Why an actor cannot sample this lease."""
    if not lease.temperature > 0:
        return f"temperature must be > 0, got {lease.temperature}"
    if not 0 < lease.top_p <= 1:
        return f"top_p must be in (0, 1], got {lease.top_p}"
    if lease.max_new_tokens < 1:
        return f"max_new_tokens must be >= 1, got {lease.max_new_tokens}"
    if lease.top_logprobs_num < 0:
        return f"top_logprobs_num must be >= 0, got {lease.top_logprobs_num}"
    if lease.purpose == "train" and lease.top_p < 1:
        return f"top_p must be 1 for training, whose log-probabilities cover the whole vocabulary, got {lease.top_p}"
    return None


def invalid_shard(shard: Shard) -> str | None:
    """Why a shard must not be trained on: evaluation may sample from a truncated distribution, training must not."""
    others = [rollout for rollout in shard.rollouts if rollout.purpose != "train"]
    return f"rollouts must be for training, got task {others[0].task} for {others[0].purpose}" if others else None


RULES: dict[type, Callable[[Any], str | None]] = {Lease: invalid_lease, Rollout: invalid_rollout, Shard: invalid_shard}

"""Rules for records that types cannot express: sizes that must agree, parameters that an engine can use.

Each function returns why a record is invalid, or None if it is valid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sgpo_async.wire.records import Canary, Heartbeat, Hello, Lease, PartialRollout, Progress, Rollout, Shard

MAX_ENGINE = 200  # characters of a server's URL
MAX_HELD = 2**16  # leases of one actor; hub.max_leases allows half as many, the rest may wait to be acknowledged
MAX_COUNT = 2**53  # of a counter, so that a sum over many members fits into the 64 bits of a number in a message


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
    if not spans or not len(rollout.versions) == len(rollout.digests) == spans:
        return (
            "versions and digests must hold one number for each of one or more spans, "
            f"got {len(rollout.versions)} and {len(rollout.digests)} for {spans}"
        )
    if (top is None) != (rollout.top_logprobs is None):
        return "top_tokens and top_logprobs must come together"
    if reason := _invalid_kept(rollout):
        return reason
    if top is None or rollout.top_logprobs is None:
        return None
    if not len(top) or len(top) != len(rollout.top_logprobs) or len(top) % length:
        return (
            f"top_tokens and top_logprobs must hold k numbers for each of {length} tokens, "
            f"got {len(top)} and {len(rollout.top_logprobs)}"
        )
    return None


def _invalid_kept(sent: Rollout | PartialRollout) -> str | None:
    kept, sizes = sent.kept, sent.kept_sizes
    if kept is None or sizes is None:
        return None if kept is sizes else "kept and kept_sizes must come together"
    if len(sizes) != len(sent.tokens) or (sizes < 0).any() or sizes.sum(dtype="int64") != len(kept):
        return (
            f"kept_sizes must hold numbers >= 0 for each of {len(sent.tokens)} tokens, with the sum {len(kept)}, "
            f"got {len(sizes)}"
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
    if lease.turns < 0:
        return f"turns must be >= 0, got {lease.turns}"
    if lease.top_logprobs_num < 0:
        return f"top_logprobs_num must be >= 0, got {lease.top_logprobs_num}"
    if lease.top_k < 0:
        return f"top_k must be >= 0, got {lease.top_k}"
    if any(part.start for part in lease.partial):
        return "the partial rollouts of a lease must start at position 0"
    return next(filter(None, map(invalid_partial, lease.partial)), None)


def invalid_progress(progress: Progress) -> str | None:
    """Why the partial rollouts of a report are invalid."""
    return next(filter(None, map(invalid_partial, progress.partial)), None)


def invalid_partial(part: PartialRollout) -> str | None:
    """Why a partial rollout cannot be continued."""
    length, ends = len(part.tokens), part.ends
    if part.slot < 0 or part.start < 0:
        return "slot and start must be >= 0"
    if not length or len(part.logprobs) != length:
        return (
            f"a partial rollout must hold tokens and one log-probability for each, got {length}, {len(part.logprobs)}"
        )
    if (
        not len(ends)
        or not len(part.versions) == len(part.digests) == len(ends)
        or ends[0] <= 0
        or ends[-1] != length
        or (ends[1:] <= ends[:-1]).any()
    ):
        spans = "with one version and digest for each"
        return f"ends must be > 0 and increase up to {length}, {spans}, got {ends[:8].tolist()}"
    if reason := _invalid_kept(part):
        return reason
    top, top_logprobs = part.top_tokens, part.top_logprobs
    if top is None or top_logprobs is None:
        return None if top is top_logprobs else "top_tokens and top_logprobs must come together"
    if not len(top) or len(top) % length or len(top) != len(top_logprobs):
        return f"top_tokens and top_logprobs must hold k numbers for each of {length} tokens, got {len(top)}"
    return None


def invalid_canary(canary: Canary) -> str | None:
    """Why a score of the canary is invalid; the hub logs the name of the engine."""
    if len(canary.engine) > MAX_ENGINE or not canary.engine.isprintable():
        return f"engine must be at most {MAX_ENGINE} printable characters"
    return None if len(canary.logprobs) else "logprobs must hold at least one number"


def invalid_heartbeat(heartbeat: Heartbeat) -> str | None:
    """Why the hub cannot add up the counters of a heartbeat, or renew its leases."""
    for name in ("running", "tokens", "busy_s", "weights_s", "wall_s"):
        value = getattr(heartbeat, name)
        if not 0 <= value <= MAX_COUNT:  # NaN is not, either
            return f"{name} must be in [0, 2^53], got {value}"
    held = len(heartbeat.tasks)
    return f"tasks must hold at most {MAX_HELD} numbers, got {held}" if held > MAX_HELD else None


def invalid_hello(hello: Hello) -> str | None:
    """Why the list of leases that a member holds is invalid."""
    count = len(hello.holds)
    if count > 2 * MAX_HELD:
        return f"holds must be at most {MAX_HELD} pairs, got {count} numbers"
    return f"holds must be pairs, got {count} numbers" if count % 2 else None


def invalid_shard(shard: Shard) -> str | None:
    """Why a shard must not be trained on: rollouts of an evaluation lack what training needs."""
    others = [rollout for rollout in shard.rollouts if rollout.purpose != "train"]
    return f"rollouts must be for training, got task {others[0].task} for {others[0].purpose}" if others else None


RULES: dict[type, Callable[[Any], str | None]] = {
    Canary: invalid_canary,
    Heartbeat: invalid_heartbeat,
    Hello: invalid_hello,
    Lease: invalid_lease,
    Progress: invalid_progress,
    Rollout: invalid_rollout,
    Shard: invalid_shard,
}

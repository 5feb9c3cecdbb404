"""Checks of rollouts and reports against their lease.

An actor is another machine, whose numbers the learner would train on. Decoding has checked the sizes of the arrays
(see `sgpo_async.wire.rules`); what they hold is checked here, so that the hub can end the lease. The hub has no
tokenizer: it cannot recognise a wrong prompt, only different prompts in one group.

A reason has no values in it, because the hub counts rejections by reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sgpo_async.rollout.partial import Arrived
from sgpo_async.wire.records import OBSERVED, Lease, PartialRollout, Progress, Rollout, sampled_by_policy

TOLERANCE = 1e-3  # a log-probability may be so far above 0, by rounding
MOST_KEPT = 4096  # tokens at a position: more than MAX_TOP_K allows, since equally likely ones may be kept too
LOWEST = -1e4  # no engine samples a token of a lower log-probability

BEGINS = "tokens must begin with one that the policy sampled"
ENDS = "tokens must end with one that the policy sampled"
CERTAIN = "logprobs of tokens that an environment wrote must be 0"
PROMPT_DIFFERS = "prompt differs from that of the group"


class Limits(NamedTuple):
    """Limits of token ids, versions and digests."""

    vocabulary: int  # number of token ids that the model knows; 0 if it is unknown
    newest: int  # newest weight version
    # Why spans of these versions and digests cannot be; None if they can. See `ServedWeights.objection`.
    objection: Callable[[np.ndarray, np.ndarray], str | None]


def violation(lease: Lease, rollout: Rollout, limits: Limits, *, prompt: np.ndarray | None) -> str | None:
    """Why `rollout` cannot be one of `lease`; None if it can.

    Args:
        lease: the lease of this purpose, task and attempt.
        prompt: that of the rollouts, guided or not like this one, that have arrived for this lease; None if none has.
    """
    return (
        _slot(lease, rollout)
        or _length(lease, rollout)
        or _spans(lease, rollout, limits)
        or _token_ids(rollout, limits)
        or _numbers(lease, rollout)
        or _likely_tokens(lease, rollout)
        or _kept(lease, rollout)
        or _prompt(rollout, prompt)
    )


def report_violation(lease: Lease, progress: Progress, limits: Limits, *, arrived: Arrived) -> str | None:
    """Why `progress` cannot be a report on `lease`, of which this has `arrived`; None if it can.

    What a rollout may not have, its beginning may not have either: another actor continues it, and would be blamed.
    """
    if len({part.slot for part in progress.partial}) < len(progress.partial):
        return "report: a slot must come only once"
    for part in progress.partial:
        reason = (
            _part(lease, part)
            or _turns(lease, np.concatenate([*arrived.versions_before(part), part.versions]))
            or _versions(lease, part, limits)
            or _token_ids(part, limits)
            or _kept(lease, part)
        )
        if reason:
            return f"report: {reason}"
    return None


def _part(lease: Lease, part: PartialRollout) -> str | None:
    sampled = part.start + len(part.tokens)
    if part.slot >= lease.autonomous + lease.guided:
        return "slot is out of range"
    if sampled > lease.max_new_tokens:
        return "number of tokens is not in [1, max_new_tokens]"
    if part.finish != "stop" and (part.finish == "length") != (sampled == lease.max_new_tokens):
        return "finish does not match max_new_tokens"
    k = lease.top_logprobs_num if part.slot >= lease.autonomous else 0
    if (0 if part.top_tokens is None else len(part.top_tokens)) != k * len(part.tokens):
        return "top_tokens must hold top_logprobs_num for each token of a guided rollout"
    if part.start == 0 and part.versions[0] == OBSERVED:
        return BEGINS
    if part.finish and part.versions[-1] == OBSERVED:
        return ENDS
    if OBSERVED in part.versions and (part.logprobs[~sampled_by_policy(part.versions, part.ends)] != 0).any():
        return CERTAIN
    if not _are_logprobs(part.logprobs) or (part.top_logprobs is not None and not _are_logprobs(part.top_logprobs)):
        return f"logprobs must be in [{LOWEST:g}, 0]"
    return None


def _slot(lease: Lease, rollout: Rollout) -> str | None:
    if not 0 <= rollout.slot < lease.autonomous + lease.guided:
        return "slot is out of range"
    if rollout.guided != (rollout.slot >= lease.autonomous):
        return "guided flag does not match the slot"
    return None


def _length(lease: Lease, rollout: Rollout) -> str | None:
    if not 1 <= len(rollout.tokens) <= lease.max_new_tokens:
        return "number of tokens is not in [1, max_new_tokens]"
    if rollout.finish == "length" and len(rollout.tokens) < lease.max_new_tokens:
        return "finish is length before max_new_tokens"
    return None


def _spans(lease: Lease, rollout: Rollout, limits: Limits) -> str | None:
    ends, versions = rollout.ends.tolist(), rollout.versions.tolist()  # few: as lists they are compared faster
    if not ends or ends[0] < 1 or ends[-1] != len(rollout.tokens) or any(map(operator.ge, ends, ends[1:])):
        return "ends of spans do not increase from 1 to the number of tokens"
    if versions[0] == OBSERVED:
        return BEGINS
    if versions[-1] == OBSERVED:
        return ENDS
    if OBSERVED in versions and (rollout.logprobs[~rollout.sampled] != 0).any():
        return CERTAIN
    return _turns(lease, rollout.versions) or _versions(lease, rollout, limits)


def _turns(lease: Lease, versions: np.ndarray) -> str | None:
    """Before each turn but the first, an environment has replied; the versions are of all spans up to some token."""
    if not lease.turns:
        return None  # without an environment, `_versions` refuses what it wrote
    observed = versions == OBSERVED
    replies = np.count_nonzero(observed[1:] & ~observed[:-1])
    return "number of turns is not in [1, turns]" if replies >= lease.turns else None


def _versions(lease: Lease, sent: Rollout | PartialRollout, limits: Limits) -> str | None:
    versions = sent.versions.tolist()
    if lease.turns:
        versions = [version for version in versions if version != OBSERVED]
    if not versions:
        return limits.objection(sent.versions, sent.digests)  # a report between two turns
    if min(versions) < lease.min_version:
        return "tokens are older than the lease's min_version"
    if max(versions) > limits.newest:
        return "tokens have a version that does not exist yet"
    return limits.objection(sent.versions, sent.digests)


def _token_ids(sent: Rollout | PartialRollout, limits: Limits) -> str | None:
    limit = limits.vocabulary or 2**31
    for name in ("prompt", "tokens", "top_tokens", "kept"):
        ids = getattr(sent, name, None)
        # As unsigned numbers, negative ones are larger than any limit.
        if ids is not None and np.maximum.reduce(ids.view(np.uint32), initial=0) >= limit:
            return f"{name} has an id that is not in the vocabulary"
    return None


def _numbers(lease: Lease, rollout: Rollout) -> str | None:
    if not _are_logprobs(rollout.logprobs):
        return f"logprobs must be in [{LOWEST:g}, 0]"
    if not math.isfinite(rollout.reward):
        return "reward must be finite"
    if rollout.solved_at != lease.solved_at:
        return "solved_at differs from the lease's"
    value = rollout.unguided_logprob
    if (value is not None) != (lease.unguided_scores and rollout.may_be_distilled):
        return (
            "unguided_logprob must come with a correct, complete guided rollout of training if the lease asks for it, "
            "and with no other"
        )
    if value is not None and not -np.inf < value <= TOLERANCE * len(rollout.tokens):
        return "unguided_logprob must be finite and <= 0"
    return None


def _likely_tokens(lease: Lease, rollout: Rollout) -> str | None:
    tokens, logprobs = rollout.top_tokens, rollout.top_logprobs
    wanted = len(rollout.tokens) * lease.top_logprobs_num if rollout.may_be_distilled else 0
    if any(wanted != (0 if array is None else len(array)) for array in (tokens, logprobs)):
        return (
            "top_tokens and top_logprobs must hold top_logprobs_num for each token of a rollout that may be distilled"
        )
    if logprobs is not None and not _are_logprobs(logprobs):
        return f"top_logprobs must be in [{LOWEST:g}, 0]"
    return None


def _kept(lease: Lease, sent: Rollout | PartialRollout) -> str | None:
    if (sent.kept is not None) != lease.reports_kept:
        return "kept must come with rollouts of training with top_p below 1 or top_k above 0, and with no others"
    if sent.kept is None or sent.kept_sizes is None:
        return None
    if (sent.kept_sizes[~sampled_by_policy(sent.versions, sent.ends)] != 0).any():
        return "kept_sizes of tokens that an environment wrote must be 0"
    if sent.kept_sizes.max(initial=0) >= MOST_KEPT:
        return f"kept_sizes must be < {MOST_KEPT}"
    at = np.repeat(np.arange(len(sent.tokens)), sent.kept_sizes)
    pairs = np.concatenate([at, np.arange(len(sent.tokens))]) * 2**32 + np.concatenate([sent.kept, sent.tokens])
    if len(np.unique(pairs)) != len(pairs):
        return "kept must hold distinct tokens at each position, without the sampled one"
    return None


def _prompt(rollout: Rollout, known: np.ndarray | None) -> str | None:
    if not len(rollout.prompt):
        return "prompt is empty"
    if known is not None and known.tobytes() != rollout.prompt.tobytes():
        return PROMPT_DIFFERS
    return None


def _are_logprobs(values: np.ndarray) -> bool:
    """Whether all are log-probabilities of tokens; NaN is none."""
    lowest, highest = np.minimum.reduce(values, initial=0.0), np.maximum.reduce(values, initial=0.0)
    return bool(lowest >= LOWEST and highest <= TOLERANCE)  # both are NaN if a value is

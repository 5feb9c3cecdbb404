"""Validation of requests, the same for all engines."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from sgpo_async.engines.base import Generate, SampledTokens, Score
from sgpo_async.errors import EngineError


def validate(request: Generate | Score, *, longest: int, vocabulary: int, ends: Collection[int]) -> None:
    """Raise EngineError unless a model of `longest` positions and `vocabulary` token ids can serve `request`.

    `ends` are the token ids that end a completion. The tokens of a prefix come from another actor, and only a model
    knows its end tokens; that the arrays of a prefix fit together, the hub has checked.
    """
    more = request.tokens.size if isinstance(request, Score) else request.max_new_tokens
    total = request.prompt.size + more
    given = request if isinstance(request, Score) else request.prefix
    ids = request.prompt if given is None else np.concatenate([request.prompt, given.tokens])
    if request.prompt.size < 1 or more < 1:
        raise EngineError(
            f"request {request.id}: prompt and completion must have at least one token each, "
            f"got {request.prompt.size} and {more}"
        )
    if total > longest:
        raise EngineError(
            f"request {request.id}: {request.prompt.size} prompt tokens and up to {more} more exceed the model's "
            f"{longest} positions; shorten the prompt or lower rollout.max_new_tokens"
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise EngineError(
            f"request {request.id}: token ids must be in [0, {vocabulary - 1}], got {ids.min()} to {ids.max()}; "
            f"use the tokenizer of this model"
        )
    if not request.temperature > 0:
        raise EngineError(f"request {request.id}: temperature must be > 0, got {request.temperature}")
    if isinstance(request, Generate) and not 0 <= request.top_logprobs_num < vocabulary:
        raise EngineError(
            f"request {request.id}: top_logprobs_num must be in [0, {vocabulary - 1}], got "
            f"{request.top_logprobs_num}; lower algorithm.teacher_top_k"
        )
    if isinstance(request, Generate) and not 0 < request.top_p <= 1:
        raise EngineError(f"request {request.id}: top_p must be in (0, 1], got {request.top_p}")
    if isinstance(request, Generate) and request.top_k < 0:
        raise EngineError(f"request {request.id}: top_k must be >= 0, got {request.top_k}")
    if isinstance(request, Generate) and request.prefix is not None:
        _check_prefix(request, request.prefix, ends)


def _check_prefix(request: Generate, prefix: SampledTokens, ends: Collection[int]) -> None:
    count, k = prefix.tokens.size, request.top_logprobs_num
    assert 0 < count < request.max_new_tokens, f"request {request.id}: prefix of {count} of {request.max_new_tokens}"
    if (last := int(prefix.tokens[-1])) in ends:
        raise EngineError(
            f"request {request.id}: the prefix ends with end token {last}; give all actors the same model folder"
        )
    assert prefix.logprobs.size == count, f"request {request.id}: {prefix.logprobs.size} logprobs of {count} tokens"
    spans = {prefix.versions.size, prefix.digests.size, prefix.ends.size}
    tiled = len(spans) == 1 and (np.diff(prefix.ends, prepend=0) > 0).all()
    assert tiled and prefix.ends[-1] == count, f"request {request.id}: spans {prefix.ends} of {count} tokens"
    tops = [0 if top is None else top.size for top in (prefix.top_tokens, prefix.top_logprobs)]
    kept = None if prefix.kept is None or prefix.kept_sizes is None else (prefix.kept.size, prefix.kept_sizes)
    assert (kept is not None) == request.report_kept, f"request {request.id}: the prefix must have its kept tokens"
    assert kept is None or (kept[1].size, kept[1].sum()) == (count, kept[0]), f"request {request.id}: kept {kept}"
    assert tops == [count * k, count * k], f"request {request.id}: {tops} likeliest tokens, {k} at {count} positions"

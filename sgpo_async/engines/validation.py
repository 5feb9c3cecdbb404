"""Validation of requests, the same for all engines."""

from __future__ import annotations

import numpy as np

from sgpo_async.engines.base import Generate, Score
from sgpo_async.errors import EngineError


def validate(request: Generate | Score, *, longest: int, vocabulary: int) -> None:
    """Raise EngineError unless a model of `longest` positions and `vocabulary` token ids can serve `request`."""
    more = request.tokens.size if isinstance(request, Score) else request.max_new_tokens
    total = request.prompt.size + more
    ids = np.concatenate([request.prompt, request.tokens]) if isinstance(request, Score) else request.prompt
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

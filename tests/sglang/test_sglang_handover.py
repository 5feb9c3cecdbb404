"""Generations that real servers have begun continue on another engine, from the tokens that had arrived."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sglang_support import Servers, assert_teacher_forced, completion, loaded, version_of

from sgpo_async.engines import EmbeddedEngine, Generated
from sgpo_async.weights import digest

pytestmark = [pytest.mark.sglang, pytest.mark.process]
REQUESTS, TOKENS = 32, 400


def test_half_a_completion_continues_under_other_weights_on_servers_and_on_the_embedded_engine(
    pair: Servers, models: dict[str, Path]
) -> None:
    pair.load(models["qwen3"], 0)
    asked = [
        replace(completion(i, length=4 + i % 5, tokens=TOKENS, seed=i), top_logprobs_num=i % 3) for i in range(REQUESTS)
    ]
    ids = [request.id for request in asked]
    for request in asked:
        pair.engine.submit(request)
    pair.until(lambda: len(pair.engine.progress(ids)) == REQUESTS, "tokens of every request")
    progress = pair.engine.progress([*ids, "unknown"])
    pair.engine.cancel(ids)
    assert pair.engine.progress(ids) == {}
    assert len(progress) == REQUESTS and all(0 < p.tokens.size < TOKENS for p in progress.values())
    assert_teacher_forced({0: loaded(models["qwen3"])}, asked, progress)
    continued = [replace(request, prefix=progress[request.id]) for request in asked]

    pair.load(models["qwen3-other"], 1)
    for request in continued[:16]:
        pair.engine.submit(request)
    results = pair.results(16)
    embedded = EmbeddedEngine(loaded(models["qwen3"]), digest=digest)
    embedded.load(version_of(models["qwen3-other"], 1))
    for request in continued[16:]:
        embedded.submit(request)
    while len(results) < REQUESTS:
        results |= {result.id: result for result in embedded.step(0.0)}

    both = {0: loaded(models["qwen3"]), 1: loaded(models["qwen3-other"])}
    assert_teacher_forced(both, asked, results)
    for id, prefix in progress.items():
        result = results[id]
        assert isinstance(result, Generated) and result.finish == "length" and result.tokens.size == TOKENS
        assert np.array_equal(result.tokens[: prefix.tokens.size], prefix.tokens)
        assert np.array_equal(result.logprobs[: prefix.tokens.size], prefix.logprobs)
        assert (result.versions.tolist(), result.ends.tolist()) == ([0, 1], [prefix.tokens.size, TOKENS])

"""The canary is the same wherever the tokenizer is, and made of ordinary tokens."""

from itertools import pairwise

import numpy as np
import pytest

from sgpo_async.learner.canary import canary_due
from sgpo_async.model.canary import PROMPT, TOKENS, canary_of
from sgpo_async.model.folder import load_tokenizer, model_folder


def test_the_canary_is_made_of_ordinary_tokens_and_always_the_same() -> None:
    tokenizer = load_tokenizer(model_folder("builtin:cues"))
    canary, again = canary_of(tokenizer), canary_of(load_tokenizer(model_folder("builtin:cues")))
    ids = np.concatenate([canary.prompt, canary.tokens])
    assert np.array_equal(ids, np.concatenate([again.prompt, again.tokens]))
    assert (len(canary.prompt), len(canary.tokens)) == (PROMPT, TOKENS) and ids.dtype == np.int32
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert ids.min() >= 0 and ids.max() < len(tokenizer)
    assert len(set(ids.tolist())) > 20


@pytest.mark.parametrize("every", [1, 2, 3, 4, 7])
def test_an_engine_that_loads_every_nth_version_meets_scored_ones(every: int) -> None:
    scored = [step for step in range(20 * every * every) if canary_due(step, every)]
    assert scored[0] == 0
    assert all(later - earlier <= 2 * every for earlier, later in pairwise(scored))
    assert len(scored) == 20 * every
    for stride in range(1, every + 1):
        for first in range(stride):
            assert {step for step in scored if step % stride == first}, (stride, first)

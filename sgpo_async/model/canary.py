"""The canary: a fixed sequence of tokens by which learner and hub see that an engine serves the right weights.

The learner scores it under exactly the weights that it publishes, every engine under what it has loaded. Both make it
from the tokenizer alone, so it is the same on every node and never travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PROMPT, TOKENS = 8, 24  # lengths
STRIDE = 7919  # a prime, so that neighbouring tokens are far apart in the vocabulary


@dataclass(frozen=True)
class Canary:
    """A prompt, and the tokens after it that are scored."""

    prompt: np.ndarray  # [PROMPT] int32
    tokens: np.ndarray  # [TOKENS] int32


def canary_of(tokenizer: Any) -> Canary:
    """The canary of every model with this tokenizer: ordinary tokens without special or added ones.

    The text means nothing, so most of its tokens are unlikely, and their log-probabilities react to any change of the
    weights.
    """
    left_out = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    every = range(tokenizer.vocab_size)
    ids = [id for id in every if id not in left_out] or list(every)
    picked = np.array([ids[STRIDE * (i + 1) % len(ids)] for i in range(PROMPT + TOKENS)], np.int32)
    return Canary(picked[:PROMPT], picked[PROMPT:])

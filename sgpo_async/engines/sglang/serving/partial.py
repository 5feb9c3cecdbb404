"""An unfinished completion. It grows with each message, across aborts, servers and weight versions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from sgpo_async.engines.base import Generate, Generated


class Partial:
    """The tokens generated for one request so far. Tokens after the end of the last span have no version yet."""

    def __init__(self, request: Generate) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[Sequence[Any]]] = []  # per token: SGLang's entries of the likeliest tokens
        self._versions: list[int] = []
        self._ends: list[int] = []

    @property
    def remaining(self) -> int:
        """How many more tokens may be generated."""
        return self.request.max_new_tokens - len(self.tokens)

    def input_ids(self) -> list[int]:
        """Prompt and tokens so far, the input of the next attempt."""
        return [*self.request.prompt.tolist(), *self.tokens]

    def extend(self, pairs: Sequence[Sequence[Any]], top: Sequence[list[Sequence[Any]]] = ()) -> None:
        """Append tokens in SGLang's form [[logprob, token, text], ...], and the likeliest tokens at each of them."""
        self.tokens += [pair[1] for pair in pairs]
        self.logprobs += [pair[0] for pair in pairs]
        self.top += top

    def close_span(self, version: int, end: int) -> None:
        """Record that `version` generated the tokens from the last span up to `end`. Spans are never empty."""
        start = self._ends[-1] if self._ends else 0
        assert start <= end <= len(self.tokens), (start, end, len(self.tokens))
        if start == end:
            return
        if self._versions and self._versions[-1] == version:
            self._ends[-1] = end
        else:
            self._versions.append(version)
            self._ends.append(end)

    def drop_unversioned(self) -> None:
        """Drop tokens without a version: it is unknown which weights generated them."""
        end = self._ends[-1] if self._ends else 0
        del self.tokens[end:], self.logprobs[end:], self.top[end:]

    def finish(self, ends: Collection[int]) -> Literal["stop", "length"] | None:
        """How the completion ended; None if it is not complete."""
        if self.tokens and self.tokens[-1] in ends:
            return "stop"
        return "length" if self.remaining <= 0 else None

    def result(self, ends: Collection[int]) -> Generated:
        """The complete completion; every token is in a span."""
        finish = self.finish(ends)
        assert finish is not None
        assert self._ends[-1] == len(self.tokens)
        return Generated(
            id=self.request.id,
            tokens=np.array(self.tokens, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            versions=np.array(self._versions, np.int32),
            ends=np.array(self._ends, np.int32),
            finish=finish,
            top_tokens=self._likeliest(1, np.int32),
            top_logprobs=self._likeliest(0, np.float32),
        )

    def _likeliest(self, item: int, dtype: type) -> np.ndarray | None:
        """[T * k], one item of each entry, position by position."""
        if not self.request.top_logprobs_num:
            return None
        return np.array([pair[item] for pairs in self.top for pair in pairs], dtype)

"""A continuation that grows from message to message, across aborts, servers and weight versions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from sgpo_async.engines.base import Generate, Generated


class Partial:
    """What has been generated for one request. Tokens since the last span's end have no version yet."""

    def __init__(self, request: Generate) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[Sequence[Any]]] = []  # at each token SGLang's pairs of the likeliest ones, if asked for
        self._versions: list[int] = []
        self._ends: list[int] = []

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.request.max_new_tokens - len(self.tokens)

    def input_ids(self) -> list[int]:
        """Prompt and tokens so far: what the next attempt continues."""
        return [*self.request.prompt.tolist(), *self.tokens]

    def extend(self, pairs: Sequence[Sequence[Any]], top: Sequence[list[Sequence[Any]]] = ()) -> None:
        """Add SGLang's [[logprob, token, text], ...], and the likeliest ones at each of these places, in its form."""
        self.tokens += [pair[1] for pair in pairs]
        self.logprobs += [pair[0] for pair in pairs]
        self.top += top

    def close_span(self, version: int, end: int) -> None:
        """Tokens since the last span, up to `end`, came from `version`. Spans are never empty."""
        start = self._ends[-1] if self._ends else 0
        assert start <= end <= len(self.tokens), (start, end, len(self.tokens))
        if start == end:
            return
        if self._versions and self._versions[-1] == version:
            self._ends[-1] = end
        else:
            self._versions.append(version)
            self._ends.append(end)

    def forget_open(self) -> None:
        """Drop tokens that have no version: nobody can say any more which weights they came from."""
        end = self._ends[-1] if self._ends else 0
        del self.tokens[end:], self.logprobs[end:], self.top[end:]

    def finish(self, ends: Collection[int]) -> Literal["stop", "length"] | None:
        """Whether, and how, the continuation is complete."""
        if self.tokens and self.tokens[-1] in ends:
            return "stop"
        return "length" if self.remaining <= 0 else None

    def result(self, ends: Collection[int]) -> Generated:
        """The complete continuation, all of it in spans."""
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
        """[T * k], one item of every pair, place by place."""
        if not self.request.top_logprobs_num:
            return None
        return np.array([pair[item] for pairs in self.top for pair in pairs], dtype)

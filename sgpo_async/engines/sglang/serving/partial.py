"""An unfinished completion. It grows with each message, across aborts, servers and weight versions."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from sgpo_async.engines.base import Generate, Generated, SampledTokens


class Partial:
    """The tokens generated for one request so far. Tokens after the end of the last span have no version yet.

    Arrays and not lists, so that `sampled` copies blocks of memory.
    """

    def __init__(self, request: Generate) -> None:
        """It begins with the request's prefix, if there is one."""
        self.request, prefix = request, request.prefix
        self.tokens, self.logprobs = array("i"), array("f")
        self._top_tokens, self._top_logprobs = array("i"), array("f")  # the k likeliest, position by position
        self._kept, self._kept_sizes = array("i"), array("i")  # if the request has `report_kept`
        self._versions: list[int] = []
        self._digests: list[int] = []
        self._ends: list[int] = []
        if prefix is not None:
            self.tokens.extend(prefix.tokens.tolist())
            self.logprobs.extend(prefix.logprobs.tolist())
            self._versions, self._ends = prefix.versions.tolist(), prefix.ends.tolist()
            self._digests = prefix.digests.tolist()
            if prefix.top_tokens is not None and prefix.top_logprobs is not None:
                self._top_tokens.extend(prefix.top_tokens.tolist())
                self._top_logprobs.extend(prefix.top_logprobs.tolist())
            if prefix.kept is not None and prefix.kept_sizes is not None:
                self._kept.extend(prefix.kept.tolist())
                self._kept_sizes.extend(prefix.kept_sizes.tolist())

    @property
    def remaining(self) -> int:
        """How many more tokens may be generated."""
        return self.request.max_new_tokens - len(self.tokens)

    @property
    def versioned(self) -> int:
        """How many tokens have a version."""
        return self._ends[-1] if self._ends else 0

    def input_ids(self) -> list[int]:
        """Prompt and tokens so far, the input of the next attempt."""
        return [*self.request.prompt.tolist(), *self.tokens]

    def extend(self, pairs: Sequence[Sequence[Any]], top: Sequence[list[Sequence[Any]]] = ()) -> None:
        """Append tokens in SGLang's form [[logprob, token, text], ...], and the likeliest tokens at each of them."""
        self.tokens.extend(pair[1] for pair in pairs)
        self.logprobs.extend(pair[0] for pair in pairs)
        self._top_tokens.extend(pair[1] for position in top for pair in position)
        self._top_logprobs.extend(pair[0] for position in top for pair in position)

    def extend_kept(self, masks: Sequence[Sequence[int]], logprobs: Sequence[float]) -> None:
        """Add to the newest tokens which tokens were kept, and replace their log-probabilities by renormalised ones.

        Args:
            masks: the ids of all kept tokens at each of the newest positions.
            logprobs: of the sampled tokens, renormalised over the kept ones.
        """
        start = len(self.tokens) - len(masks)
        self.logprobs[start:] = array("f", logprobs)
        for token, ids in zip(self.tokens[start:], masks, strict=True):
            others = [id for id in ids if id != token]
            self._kept.extend(others)
            self._kept_sizes.append(len(others))

    def close_span(self, version: int, digest: int, end: int) -> None:
        """Record that `version` with `digest` generated the tokens up to `end`. Spans are never empty."""
        start = self.versioned
        assert start <= end <= len(self.tokens), (start, end, len(self.tokens))
        if start == end:
            return
        if self._versions and (self._versions[-1], self._digests[-1]) == (version, digest):
            self._ends[-1] = end
        else:
            self._versions.append(version)
            self._digests.append(digest)
            self._ends.append(end)

    def drop_unversioned(self) -> None:
        """Drop tokens without a version: it is unknown which weights generated them."""
        self.truncate(self.versioned)

    def truncate(self, count: int) -> None:
        """Keep only the first `count` tokens, all of which have a version."""
        top, spans = count * self.request.top_logprobs_num, bisect_left(self._ends, count) + 1 if count else 0
        del self.tokens[count:], self.logprobs[count:], self._top_tokens[top:], self._top_logprobs[top:]
        del self._kept[sum(self._kept_sizes[:count]) :], self._kept_sizes[count:]
        del self._versions[spans:], self._digests[spans:], self._ends[spans:]
        if spans:
            self._ends[-1] = count

    def finish(self, ends: Collection[int]) -> Literal["stop", "length"] | None:
        """How the completion ended; None if it is not complete."""
        if self.tokens and self.tokens[-1] in ends:
            return "stop"
        return "length" if self.remaining <= 0 else None

    def sampled(self) -> SampledTokens:
        """A copy of the tokens that have a version."""
        end, top, asked = self.versioned, self.versioned * self.request.top_logprobs_num, self.request.top_logprobs_num
        sizes, with_kept = np.array(self._kept_sizes[:end], np.int32), self.request.report_kept
        return SampledTokens(
            tokens=np.array(self.tokens[:end], np.int32),
            logprobs=np.array(self.logprobs[:end], np.float32),
            versions=np.array(self._versions, np.int32),
            digests=np.array(self._digests, np.int64),
            ends=np.array(self._ends, np.int32),
            top_tokens=np.array(self._top_tokens[:top], np.int32) if asked else None,
            top_logprobs=np.array(self._top_logprobs[:top], np.float32) if asked else None,
            kept=np.array(self._kept[: sizes.sum()], np.int32) if with_kept else None,
            kept_sizes=sizes if with_kept else None,
        )

    def result(self, ends: Collection[int]) -> Generated:
        """The complete completion; every token is in a span."""
        finish = self.finish(ends)
        assert finish is not None
        assert self.versioned == len(self.tokens)
        return Generated(id=self.request.id, finish=finish, **vars(self.sampled()))

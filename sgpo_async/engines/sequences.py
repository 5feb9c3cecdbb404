"""The sequences of an engine: waiting ones are objects, running ones are rows of arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sgpo_async.engines.base import Generate, Generated, SampledTokens
from sgpo_async.engines.sampling import stream, uniforms


@dataclass
class Sequence:
    """One request and the tokens generated for it so far. It survives when the sequence leaves its row."""

    request: Generate
    ids: np.ndarray  # [length] int32: prompt and generated tokens
    logprobs: np.ndarray  # [length] float32; the prompt's are unused
    top_tokens: np.ndarray  # [length, k] int32, k = request.top_logprobs_num; the prompt's are unused
    top_logprobs: np.ndarray  # [length, k] float32
    kept: list[np.ndarray] = field(default_factory=list)  # of each generated token, if request.report_kept
    versions: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, request: Generate) -> Sequence:
        """A sequence that has the tokens of the request's prefix, if there is one."""
        prefix, start, k = request.prefix, request.prompt.size, request.top_logprobs_num
        length = start + (prefix.tokens.size if prefix else 0)
        sequence = cls(
            request,
            np.zeros(length, np.int32),
            np.zeros(length, np.float32),
            np.zeros((length, k), np.int32),
            np.zeros((length, k), np.float32),
        )
        sequence.ids[:start] = request.prompt
        if prefix is not None:
            sequence.ids[start:], sequence.logprobs[start:] = prefix.tokens, prefix.logprobs
            sequence.versions, sequence.ends = prefix.versions.tolist(), prefix.ends.tolist()
            sequence.digests = prefix.digests.tolist()
            if prefix.kept is not None and prefix.kept_sizes is not None:
                sequence.kept = np.split(prefix.kept, np.cumsum(prefix.kept_sizes)[:-1])
            if prefix.top_tokens is not None and prefix.top_logprobs is not None:
                sequence.top_tokens[start:] = prefix.top_tokens.reshape(-1, k)
                sequence.top_logprobs[start:] = prefix.top_logprobs.reshape(-1, k)
        return sequence

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return self.ids.size - self.request.prompt.size

    def close_span(self, version: int, digest: int) -> None:
        """Record that `version` with `digest` sampled all tokens since the last span. Spans are never empty."""
        if self.generated == (self.ends[-1] if self.ends else 0):
            return
        if self.versions and (self.versions[-1], self.digests[-1]) == (version, digest):
            self.ends[-1] = self.generated
        else:
            self.versions.append(version)
            self.digests.append(digest)
            self.ends.append(self.generated)

    def sampled(self) -> SampledTokens:
        """A copy of the generated tokens; the caller has closed the last span."""
        start, asked = self.request.prompt.size, self.request.top_logprobs_num > 0
        return SampledTokens(
            tokens=self.ids[start:].copy(),
            logprobs=self.logprobs[start:].copy(),
            versions=np.array(self.versions, np.int32),
            digests=np.array(self.digests, np.int64),
            ends=np.array(self.ends, np.int32),
            top_tokens=self.top_tokens[start:].flatten() if asked else None,
            top_logprobs=self.top_logprobs[start:].flatten() if asked else None,
            kept=np.concatenate(self.kept) if self.request.report_kept else None,
            kept_sizes=np.array([len(ids) for ids in self.kept], np.int32) if self.request.report_kept else None,
        )

    def result(self, *, stopped: bool) -> Generated:
        """The finished completion; the caller has closed its last span."""
        return Generated(id=self.request.id, finish="stop" if stopped else "length", **vars(self.sampled()))


class Running:
    """Sequences in rows 0..n-1. All state is in arrays over rows, so a decode step needs no Python loop over sequences.

    When rows move, `move(sources, targets, length)` is called so that the key-value cache moves the same rows.
    """

    def __init__(self, slots: int, move: Callable[[np.ndarray, np.ndarray, int], None]) -> None:
        self.sequences: list[Sequence] = []
        self._move = move
        self._ids = np.zeros((slots, 64), np.int32)
        self._logprobs = np.zeros((slots, 64), np.float32)
        self._top_tokens = np.zeros((slots, 64, 0), np.int32)  # last axis: the largest top_logprobs_num so far
        self._top_logprobs = np.zeros((slots, 64, 0), np.float32)
        self._length = np.zeros(slots, np.int64)
        self._prompt = np.zeros(slots, np.int64)
        self._limit = np.zeros(slots, np.int64)
        self._stream = np.zeros(slots, np.uint64)
        self._temperature = np.ones(slots, np.float32)
        self._top_p = np.ones(slots, np.float64)
        self._top_k = np.zeros(slots, np.int64)
        self._report_kept = np.zeros(slots, bool)
        self._top_num = np.zeros(slots, np.int64)

    def __len__(self) -> int:
        return len(self.sequences)

    def append(self, sequence: Sequence) -> None:
        """Put `sequence` into the next row."""
        row, length, request = len(self), sequence.ids.size, sequence.request
        self._reserve(length + 1, request.top_logprobs_num)
        self._ids[row, :length] = sequence.ids
        self._logprobs[row, :length] = sequence.logprobs
        self._top_tokens[row, :length, : request.top_logprobs_num] = sequence.top_tokens
        self._top_logprobs[row, :length, : request.top_logprobs_num] = sequence.top_logprobs
        self._length[row], self._prompt[row] = length, request.prompt.size
        self._limit[row] = request.prompt.size + request.max_new_tokens
        self._stream[row] = stream(request.seed)
        self._temperature[row], self._top_p[row] = request.temperature, request.top_p
        self._top_k[row], self._report_kept[row] = request.top_k, request.report_kept
        self._top_num[row] = request.top_logprobs_num
        self.sequences.append(sequence)

    def positions(self) -> np.ndarray:
        """Column of each row's newest token, [n] int64."""
        return self._length[: len(self)] - 1

    def newest(self) -> np.ndarray:
        """Each row's newest token, the input of a decode step, [n] int64."""
        return self._ids[np.arange(len(self)), self.positions()].astype(np.int64)

    def temperatures(self) -> np.ndarray:
        """[n] float32."""
        return self._temperature[: len(self)]

    def top_p(self) -> np.ndarray:
        """[n] float64."""
        return self._top_p[: len(self)]

    def top_k(self) -> np.ndarray:
        """[n] int64."""
        return self._top_k[: len(self)]

    def report_kept(self) -> np.ndarray:
        """Whether each row asks for the tokens that were kept, [n] bool."""
        return self._report_kept[: len(self)]

    def top_logprobs_num(self) -> np.ndarray:
        """The number of likeliest tokens that each row asks for, [n] int64."""
        return self._top_num[: len(self)]

    def uniforms(self) -> np.ndarray:
        """The uniform random number that samples each row's next token, [n] float64."""
        n = len(self)
        return uniforms(self._stream[:n], self._length[:n] - self._prompt[:n])

    def record_likeliest(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Store the likeliest tokens [r, k] and their log-probabilities at the position of these rows' next token."""
        self._reserve(int(self._length[rows].max()) + 1, tokens.shape[1])
        self._top_tokens[rows, self._length[rows], : tokens.shape[1]] = tokens
        self._top_logprobs[rows, self._length[rows], : tokens.shape[1]] = logprobs

    def extend(self, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Add one token to each row; returns which rows have reached their limit, [n] bool."""
        n = len(self)
        rows, length = np.arange(n), self._length[:n]
        self._reserve(int(length.max()) + 1)
        self._ids[rows, length] = tokens
        self._logprobs[rows, length] = logprobs
        length += 1
        return length >= self._limit[:n]

    def remove(self, rows: np.ndarray) -> list[Sequence]:
        """Remove `rows` and return their sequences with all generated tokens; the last rows move into the gaps."""
        removed = [self.update(row) for row in rows.tolist()]
        n = len(self)
        kept = n - rows.size
        stays = np.ones(n, bool)
        stays[rows] = False
        sources, targets = np.flatnonzero(stays[kept:]) + kept, np.flatnonzero(~stays[:kept])
        if sources.size:
            for array in self._arrays():
                array[targets] = array[sources]
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                self.sequences[target] = self.sequences[source]
            self._move(sources, targets, int(self._length[targets].max()))
        del self.sequences[kept:]
        return removed

    def update(self, row: int) -> Sequence:
        """The sequence of `row`, after its tokens have been copied into it."""
        sequence, length = self.sequences[row], self._length[row]
        sequence.ids = self._ids[row, :length].copy()
        sequence.logprobs = self._logprobs[row, :length].copy()
        width = sequence.request.top_logprobs_num
        sequence.top_tokens = self._top_tokens[row, :length, :width].copy()
        sequence.top_logprobs = self._top_logprobs[row, :length, :width].copy()
        return sequence

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return (
            self._ids, self._logprobs, self._top_tokens, self._top_logprobs, self._length, self._prompt, self._limit,
            self._stream, self._temperature, self._top_p, self._top_k, self._report_kept, self._top_num,
        )  # fmt: skip

    def _reserve(self, length: int, width: int = 0) -> None:
        """Allocate at least `length` tokens per row and `width` likeliest tokens per position."""
        missing = length - self._ids.shape[1]
        longer = (0, max(missing, self._ids.shape[1])) if missing > 0 else (0, 0)
        wider = (0, max(width - self._top_tokens.shape[2], 0))
        if missing > 0:
            grow = ((0, 0), longer)
            self._ids, self._logprobs = np.pad(self._ids, grow), np.pad(self._logprobs, grow)
        if missing > 0 or wider[1]:
            grow_top = ((0, 0), longer, wider)
            self._top_tokens = np.pad(self._top_tokens, grow_top)
            self._top_logprobs = np.pad(self._top_logprobs, grow_top)

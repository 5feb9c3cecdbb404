"""Pack the sequences of a micro-batch: one row, one sequence after another, without padding.

    plain    | prompt completion | prompt completion | ...      what attention sees
    row      | prompt completion | completion | ...             what all other layers compute, if prompts are shared

The position ids restart at 0 for each sequence, and `attention` keeps the sequences of a row apart. The tokens of a
prompt that several sequences have in common are computed once, because their hidden states are the same: they attend
only to themselves. Attention alone needs the plain layout, so sharing pays only if it shortens the row enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sgpo_async.algorithm import Kept

SHARE = 0.1  # least share of the positions that must repeat a prompt for it to be computed once


class Tokens(NamedTuple):
    """One sequence: its prompt and its completion, of which some tokens may be read only."""

    prompt: np.ndarray  # [L] int32, L >= 1
    completion: np.ndarray  # [T] int32, T >= 1
    trained: np.ndarray | None = None  # [T] bool, whether a token has a loss; None: every token has
    kept: np.ndarray | None = None  # the other tokens that truncated sampling kept, position by position, and ...
    kept_sizes: np.ndarray | None = None  # ... their number, [T] int32; None: it was not truncated

    @property
    def targets(self) -> np.ndarray:
        """The C <= T tokens of the completion that have a loss: [C] int32."""
        return self.completion if self.trained is None else self.completion[self.trained]

    @property
    def length(self) -> int:
        """The number of positions in a row; the last token predicts nothing and is left out."""
        return len(self.prompt) + len(self.completion) - 1


class Shared(NamedTuple):
    """How the row and the plain layout correspond."""

    where: np.ndarray  # [S] int64, for each position of the plain layout, its position in the row
    first: np.ndarray  # [W] int64, for each position of the row, the first of its positions in the plain layout


class Packed(NamedTuple):
    """A micro-batch: a row of W tokens, of which C are trained, in the order of their sequences."""

    input_ids: np.ndarray  # [1, W] int64
    position_ids: np.ndarray  # [1, W] int64
    lengths: list[int]  # of the sequences; their sum is S, the length of the plain layout
    picks: np.ndarray  # [C] int64, the position in the row that predicts each trained token
    targets: np.ndarray  # [C] int64, the trained tokens
    shared: Shared | None = None  # None: the row is the plain layout


def kept_of(sequences: Sequence[Tokens]) -> Kept | None:
    """The tokens that truncated sampling kept beside each trained token; None if it was not truncated."""
    others, sizes = [], []
    for own in sequences:
        if own.kept is None or own.kept_sizes is None:
            continue
        trained = np.ones(len(own.completion), bool) if own.trained is None else own.trained
        others.append(own.kept[np.repeat(trained, own.kept_sizes)])
        sizes.append(own.kept_sizes[trained])
    assert len(others) in (0, len(sequences)), "truncated and other sequences must not share a loss"
    return Kept(np.concatenate(others), np.concatenate(sizes)) if others else None


def pack(sequences: Sequence[Tokens], row_tokens: float = math.inf) -> Packed:
    """Lay out the sequences of one micro-batch; an empty micro-batch is one token without a target.

    `row_tokens` is the capacity of a row, see `repeated_tokens`.
    """
    if not sequences:
        one, none = np.zeros((1, 1), np.int64), np.empty(0, np.int64)
        return Packed(one, one, [1], none, none)
    lengths = [own.length for own in sequences]
    ends = np.cumsum(lengths)
    ids = _concatenate([part for own in sequences for part in (own.prompt, own.completion[:-1])])
    positions = _concatenate([np.arange(length) for length in lengths])
    picks = _concatenate(
        [
            np.arange(end - len(own.completion), end)[slice(None) if own.trained is None else own.trained]
            for own, end in zip(sequences, ends, strict=True)
        ]
    )
    targets = _concatenate([own.targets for own in sequences])
    if (shared := _share(sequences, ends - lengths, row_tokens)) is None:
        return Packed(ids[None], positions[None], lengths, picks, targets)
    return Packed(ids[None, shared.first], positions[None, shared.first], lengths, shared.where[picks], targets, shared)


def repeated_tokens(sequences: Sequence[Tokens], row_tokens: float = math.inf) -> int:
    """The number of positions that need not be computed if equal prompts are computed once; 0 if they are not.

    They are if that shortens the row by the share `SHARE`, or if the row would otherwise exceed `row_tokens`.
    """
    once = {own.prompt.tobytes(): len(own.prompt) for own in sequences}
    repeated = sum(len(own.prompt) for own in sequences) - sum(once.values())
    plain = sum(own.length for own in sequences)
    return repeated if repeated >= SHARE * plain or plain > row_tokens else 0


def _share(sequences: Sequence[Tokens], starts: np.ndarray, row_tokens: float) -> Shared | None:
    """Let equal prompts be computed once; None if they are not. `starts`: of the sequences, in the plain layout."""
    if not repeated_tokens(sequences, row_tokens):
        return None
    every = np.arange(starts[-1] + sequences[-1].length)
    source = every.copy()
    known: dict[bytes, int] = {}
    for own, start in zip(sequences, starts.tolist(), strict=True):
        first = known.setdefault(own.prompt.tobytes(), start)
        source[start : start + len(own.prompt)] = every[first : first + len(own.prompt)]
    kept = source == every
    return Shared((np.cumsum(kept) - 1)[source], np.flatnonzero(kept))


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad ragged rows: return values [N, T] float64, 0 in the padding, and mask [N, T] bool, false in the padding."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    values = np.zeros(mask.shape)
    values[mask] = np.concatenate(rows) if len(rows) else []
    return values, mask


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64)

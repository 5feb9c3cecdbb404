"""Pack sequences of different lengths into micro-batches of at most `row_tokens` tokens, without padding.

    sequences ──▶ micro-batches (first-fit decreasing) ──▶ Packed: one row, one sequence after another

The position ids restart at 0 for each sequence, and `attention` keeps the sequences of a row apart. A sequence longer
than `row_tokens` is a micro-batch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MicroBatch = tuple[int, ...]  # ascending indices of sequences


class Tokens(NamedTuple):
    """One sequence: its prompt and its completion, of which some tokens may be read only."""

    prompt: np.ndarray  # [L] int32, L >= 1
    completion: np.ndarray  # [T] int32, T >= 1
    trained: np.ndarray | None = None  # [T] bool, whether a token has a loss; None: every token has

    @property
    def targets(self) -> np.ndarray:
        """The C <= T tokens of the completion that have a loss: [C] int32."""
        return self.completion if self.trained is None else self.completion[self.trained]

    @property
    def length(self) -> int:
        """The number of positions in a row; the last token predicts nothing and is left out."""
        return len(self.prompt) + len(self.completion) - 1


class Packed(NamedTuple):
    """A micro-batch: a row of W tokens, of which C are trained, in the order of their sequences."""

    input_ids: np.ndarray  # [1, W] int64
    position_ids: np.ndarray  # [1, W] int64
    lengths: list[int]  # of the sequences; their sum is W
    picks: np.ndarray  # [C] int64, the position that predicts each trained token
    targets: np.ndarray  # [C] int64, the trained tokens


def plan(lengths: Sequence[int], row_tokens: int) -> list[MicroBatch]:
    """Divide the sequences into micro-batches; each sequence index appears exactly once.

    Each sequence, longest first, goes into the first micro-batch with space: at most 11/9 of the fewest micro-batches,
    plus one.
    """
    micro_batches: list[list[int]] = []
    free_space: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = next((m for m, free in enumerate(free_space) if free >= lengths[item]), len(micro_batches))
        if at == len(micro_batches):
            micro_batches.append([])
            free_space.append(row_tokens)
        micro_batches[at].append(item)
        free_space[at] -= lengths[item]
    return [tuple(sorted(micro_batch)) for micro_batch in micro_batches]


def pack(sequences: Sequence[Tokens]) -> Packed:
    """Lay out the sequences of one micro-batch; an empty micro-batch is one token without a target."""
    if not sequences:
        one, none = np.zeros((1, 1), np.int64), np.empty(0, np.int64)
        return Packed(one, one, [1], none, none)
    lengths = [own.length for own in sequences]
    ends = np.cumsum(lengths)
    picks = [
        np.arange(end - len(own.completion), end)[slice(None) if own.trained is None else own.trained]
        for own, end in zip(sequences, ends, strict=True)
    ]
    return Packed(
        _concatenate([part for own in sequences for part in (own.prompt, own.completion[:-1])])[None],
        _concatenate([np.arange(length) for length in lengths])[None],
        lengths,
        _concatenate(picks),
        _concatenate([own.targets for own in sequences]),
    )


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad ragged rows: return values [N, T] float64, 0 in the padding, and mask [N, T] bool, false in the padding."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    values = np.zeros(mask.shape)
    values[mask] = np.concatenate(rows) if len(rows) else []
    return values, mask


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64)

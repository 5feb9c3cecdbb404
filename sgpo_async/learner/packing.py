"""Pack sequences of different lengths into dense micro-batches of about `row_tokens` tokens.

    sequences ──▶ rows (first-fit decreasing) ──▶ micro-batches of equal area ──▶ Packed

A row holds whole sequences one after another. The position ids restart at 0 for each sequence and for the padding.
From these restarts transformers derives a block-diagonal causal mask in each layer, also with a sliding window, if it
is given neither an attention mask nor a cache. `policy.check_model` verifies this for the model of the run.

The width of the rows is the length of the longest sequence that fits into `row_tokens`, not `row_tokens` itself: the
cost of attention grows with the square of the width, so many narrow rows are cheaper than one wide row. A sequence
longer than `row_tokens` gets its own row and micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Row = tuple[int, ...]  # indices of sequences
MicroBatch = tuple[Row, ...]


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
    """A micro-batch of B rows of W tokens with C trained tokens, ordered by ascending sequence index."""

    input_ids: np.ndarray  # [B, W] int64, 0 in the padding
    position_ids: np.ndarray  # [B, W] int64
    picks: np.ndarray  # [C] int64, index into B * W of the position that predicts each trained token
    targets: np.ndarray  # [C] int64, the trained tokens


def plan(lengths: Sequence[int], row_tokens: int) -> list[MicroBatch]:
    """Divide the sequences into micro-batches of rows; each sequence index appears exactly once."""
    short = [i for i, length in enumerate(lengths) if length <= row_tokens]
    long = [i for i, length in enumerate(lengths) if length > row_tokens]
    width = max((lengths[i] for i in short), default=1)
    rows = first_fit_decreasing(lengths, short, capacity=width)
    height = row_tokens // width
    return [((i,),) for i in long] + [tuple(rows[at : at + height]) for at in range(0, len(rows), height)]


def first_fit_decreasing(lengths: Sequence[int], items: Sequence[int], *, capacity: int) -> list[Row]:
    """Put each item, longest first, into the first row with space; needs at most 11/9 of the fewest rows, plus one."""
    rows: list[list[int]] = []
    free_space: list[int] = []
    for item in sorted(items, key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(free_space) if free >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            free_space.append(capacity)
        rows[row].append(item)
        free_space[row] -= lengths[item]
    return [tuple(row) for row in rows]


def pack(sequences: Sequence[Tokens], micro_batch: MicroBatch) -> Packed:
    """Lay out the sequences of one micro-batch; an empty micro-batch is one token without a target."""
    width = max((sum(sequences[i].length for i in row) for row in micro_batch), default=1)
    input_ids = np.zeros((max(len(micro_batch), 1), width), np.int64)
    position_ids = np.tile(np.arange(width), (len(input_ids), 1))
    picks: dict[int, np.ndarray] = {}
    for r, row in enumerate(micro_batch):
        start = 0
        for i in row:
            prompt, completion, trained = sequences[i]
            end = start + sequences[i].length
            input_ids[r, start:end] = np.concatenate((prompt, completion[:-1]))
            position_ids[r, start:] -= position_ids[r, start]
            positions = r * width + np.arange(end - len(completion), end)
            picks[i] = positions if trained is None else positions[trained]
            start = end
        position_ids[r, start:] -= position_ids[r, start] if start < width else 0
    order = sorted(picks)
    return Packed(
        input_ids,
        position_ids,
        _concatenate([picks[i] for i in order]),
        _concatenate([sequences[i].targets for i in order]),
    )


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pad ragged rows: return values [N, T] float64, 0 in the padding, and mask [N, T] bool, false in the padding."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    values = np.zeros(mask.shape)
    values[mask] = np.concatenate(rows) if len(rows) else []
    return values, mask


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, np.int64)

"""Sequences of all lengths into dense micro-batches of about `row_tokens` tokens.

    sequences ──▶ rows (first-fit decreasing) ──▶ micro-batches of equal area ──▶ Packed

A row holds whole sequences one after another; their position ids restart at 0, and so does the padding's. From that
restart transformers derives a block-diagonal causal mask, per layer and so also under a sliding window, as long as
it is given neither an attention mask nor a cache. `policy.check_model` proves it for the model at hand.

Rows are as wide as the longest sequence that fits `row_tokens`, not as `row_tokens`: attention costs the square of
the width, so many narrow rows beat a wide one. A longer sequence gets a row, and a micro-batch, of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Row = tuple[int, ...]  # indices of sequences
MicroBatch = tuple[Row, ...]


class Tokens(NamedTuple):
    """One sequence: what was given and what was sampled."""

    prompt: np.ndarray  # [L] int32, L >= 1
    completion: np.ndarray  # [T] int32, T >= 1

    @property
    def length(self) -> int:
        """Positions that it takes: the last token predicts nothing and stays out."""
        return len(self.prompt) + len(self.completion) - 1


class Packed(NamedTuple):
    """A micro-batch of B rows of W tokens with C completion tokens, in ascending order of sequences."""

    input_ids: np.ndarray  # [B, W] int64, 0 in the padding
    position_ids: np.ndarray  # [B, W] int64
    picks: np.ndarray  # [C] int64 into B * W: the position that predicts each completion token
    targets: np.ndarray  # [C] int64: that token


def plan(lengths: Sequence[int], row_tokens: int) -> list[MicroBatch]:
    """Divide sequences into micro-batches of rows; each index appears once."""
    short = [i for i, length in enumerate(lengths) if length <= row_tokens]
    long = [i for i, length in enumerate(lengths) if length > row_tokens]
    width = max((lengths[i] for i in short), default=1)
    rows = first_fit_decreasing(lengths, short, capacity=width)
    height = row_tokens // width
    return [((i,),) for i in long] + [tuple(rows[at : at + height]) for at in range(0, len(rows), height)]


def first_fit_decreasing(lengths: Sequence[int], items: Sequence[int], *, capacity: int) -> list[Row]:
    """Put each item, longest first, into the first row with room for it. At most 11/9 of the fewest rows, plus one."""
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(room) if free >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= lengths[item]
    return [tuple(row) for row in rows]


def pack(sequences: Sequence[Tokens], micro_batch: MicroBatch) -> Packed:
    """Lay the sequences of one micro-batch out. Without any it is one token that trains nothing."""
    width = max((sum(sequences[i].length for i in row) for row in micro_batch), default=1)
    input_ids = np.zeros((max(len(micro_batch), 1), width), np.int64)
    position_ids = np.tile(np.arange(width), (len(input_ids), 1))
    picks: dict[int, np.ndarray] = {}
    for r, row in enumerate(micro_batch):
        start = 0
        for i in row:
            prompt, completion = sequences[i]
            end = start + sequences[i].length
            input_ids[r, start:end] = np.concatenate((prompt, completion[:-1]))
            position_ids[r, start:] -= position_ids[r, start]
            picks[i] = r * width + np.arange(end - len(completion), end)
            start = end
        position_ids[r, start:] -= position_ids[r, start] if start < width else 0
    order = sorted(picks)
    return Packed(
        input_ids,
        position_ids,
        _concatenate([picks[i] for i in order]),
        _concatenate([sequences[i].completion for i in order]),
    )


def pad(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows -> values [N, T] float64, 0 in the padding, and mask [N, T] bool of what is no padding."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    values = np.zeros(mask.shape)
    values[mask] = np.concatenate(rows) if len(rows) else []
    return values, mask


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, np.int64)

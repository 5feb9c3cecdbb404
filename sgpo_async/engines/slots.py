"""The key-value cache: one row ("slot") per running sequence, token t of a sequence in column t.

    keys, values   [slots, heads, capacity, width] per layer
    prefill        writes several new prefixes, right-padded, into consecutive rows; each attends to its own tokens
                   only; a prefix that several rows share is computed once
    decode         writes one token into each of the first n rows; it attends to columns 0..position of its row

Rows in use are always the first n, so a decode step reads views and copies nothing. The mask hides the padding that a
prefill leaves behind the end of a sequence, until a decode step overwrites it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from sgpo_async.errors import EngineError

_FIRST_CAPACITY = 64


class DecodeView(NamedTuple):
    """The part of the cache that one decode step writes and reads."""

    rows: torch.Tensor  # [n] int64: 0..n-1
    positions: torch.Tensor  # [n] int64: column of each row's new token
    columns: torch.Tensor  # [L] int64: 0..L-1; L is above the highest position
    keys: list[torch.Tensor]  # per layer [slots, heads, capacity, width]
    values: list[torch.Tensor]


class SlotCache(Cache):
    """Cache of `slots` rows. Columns are allocated at first use; their number doubles when they run out."""

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._slots, self._device = slots, device
        self._capacity = _FIRST_CAPACITY
        self._columns = torch.arange(self._capacity, device=device)
        self._rows = torch.arange(slots, device=device)
        self._view: DecodeView | None = None  # None while prefilling
        self._first, self._copies = 0, self._rows

    def prefill(self, first: int, copies: torch.Tensor, length: int) -> None:
        """Prepare the next forward, which computes `length` columns; row first + i stores its row copies[i]."""
        self.reserve(length)
        self._first, self._copies, self._view = first, copies, None

    def decode_view(self, positions: torch.Tensor, length: int) -> DecodeView:
        """The view of a decode step at `positions` [n] < `length` of rows 0..n-1; allocates missing columns."""
        self.reserve(length)
        rows, columns = self._rows[: positions.shape[0]], self._columns[:length]
        return DecodeView(rows, positions, columns, self.keys, self.values)

    def decode(self, view: DecodeView) -> None:
        """Prepare the next forward, which adds one token to each row of `view`."""
        self._view = view

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first `length` columns of rows `sources` to rows `targets`."""
        for tensor in (*self.keys, *self.values):
            tensor[targets, :, :length] = tensor[sources, :, :length]

    def forget(self) -> None:
        """Set all entries to zero: a NaN that earlier weights left would spread even with attention weight 0."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()

    def reserve(self, length: int) -> None:
        """Allocate at least `length` columns. Raises EngineError if memory does not suffice."""
        if length <= self._capacity:
            return
        while self._capacity < length:
            self._capacity *= 2
        self._columns = torch.arange(self._capacity, device=self._device)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = self._allocate(old)
                tensors[i][:, :, : old.shape[2]] = old

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model in each layer with [n, heads, tokens, width]; returns keys and values to attend to."""
        if self._view is not None:
            return _write_and_read(self._view, key_states, value_states, layer_idx)
        if layer_idx == len(self.keys):
            self.keys.append(self._allocate(key_states))
            self.values.append(self._allocate(value_states))
        rows, length = slice(self._first, self._first + self._copies.shape[0]), key_states.shape[2]
        self.keys[layer_idx][rows, :, :length] = key_states[self._copies]
        self.values[layer_idx][rows, :, :length] = value_states[self._copies]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (all layers are alike)
        """Number of columns that are filled before the next forward."""
        return 0 if self._view is None else self._view.columns.shape[0] - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of the keys that the next forward sees."""
        return self.get_seq_length() + query_length, 0

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self._slots, like.shape[1], self._capacity, like.shape[3])
        try:
            return torch.zeros(shape, dtype=like.dtype, device=self._device)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"no memory for a key-value cache of {self._slots} slots x {self._capacity} tokens on {self._device}: "
                f"lower engine.slots"
            ) from error


def _write_and_read(
    view: DecodeView, key_states: torch.Tensor, value_states: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, positions, columns, keys, values = view
    keys[layer][rows, :, positions] = key_states[:, :, 0]
    values[layer][rows, :, positions] = value_states[:, :, 0]
    n, length = rows.shape[0], columns.shape[0]
    return keys[layer][:n, :, :length], values[layer][:n, :, :length]

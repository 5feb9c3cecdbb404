"""The key-value cache: one row ("slot") per running sequence, token t of a sequence in column t.

    keys, values   [slots, heads, capacity, width] per layer
    prefill        several new sequences, right-padded, into consecutive rows; attends to its own tokens only
    decode         one token into each of the first n rows; attends to columns 0..position of its row

Rows in use are always the first n, so a decode step reads views and copies nothing. What a prefill leaves behind
its sequence's end is hidden by the mask until a decode step overwrites it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from sgpo_async.errors import EngineError

_FIRST_CAPACITY = 64


class SlotCache(Cache):
    """Cache of `slots` rows whose columns are allocated at first use and doubled when they run out."""

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self._slots, self._device = slots, device
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._capacity = _FIRST_CAPACITY
        self._columns = torch.arange(self._capacity, device=device)
        self._rows = torch.arange(slots, device=device)
        self._first = 0
        self._positions: torch.Tensor | None = None  # None while prefilling
        self._length = 0

    def prefill(self, first: int, length: int) -> None:
        """The next forward fills `length` columns of the rows from `first` on."""
        self.reserve(length)
        self._first, self._positions, self._length = first, None, length

    def decode(self, positions: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
        """The next forward writes row i at `positions`[i], [n] int64; `length` = their maximum + 1.

        Returns the additive attention mask, [n, 1, 1, length].
        """
        self.reserve(length)
        self._positions, self._length = positions, length
        hidden = self._columns[:length] > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self._device).masked_fill_(hidden, -torch.inf)
        return mask[:, None, None]

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first `length` columns of rows `sources` to rows `targets`."""
        for tensor in (*self._keys, *self._values):
            tensor[targets, :, :length] = tensor[sources, :, :length]

    def forget(self) -> None:
        """Zero everything: what other weights left (it may be NaN) must not reach a sum, even with weight 0."""
        for tensor in (*self._keys, *self._values):
            tensor.zero_()

    def reserve(self, length: int) -> None:
        """Make room for `length` columns. Raises EngineError if memory does not suffice."""
        if length <= self._capacity:
            return
        while self._capacity < length:
            self._capacity *= 2
        self._columns = torch.arange(self._capacity, device=self._device)
        for tensors in (self._keys, self._values):
            for i, old in enumerate(tensors):
                tensors[i] = self._allocate(old)
                tensors[i][:, :, : old.shape[2]] = old

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model in each layer with [n, heads, tokens, width]; returns what to attend to."""
        if layer_idx == len(self._keys):
            self._keys.append(self._allocate(key_states))
            self._values.append(self._allocate(value_states))
        keys, values, n = self._keys[layer_idx], self._values[layer_idx], key_states.shape[0]
        if self._positions is None:
            rows = slice(self._first, self._first + n)
            keys[rows, :, : self._length] = key_states
            values[rows, :, : self._length] = value_states
            return key_states, value_states
        rows = self._rows[:n]
        keys[rows, :, self._positions] = key_states[:, :, 0]
        values[rows, :, self._positions] = value_states[:, :, 0]
        return keys[:n, :, : self._length], values[:n, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns filled before the next forward."""
        return 0 if self._positions is None else self._length - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
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

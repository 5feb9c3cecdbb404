"""A causal language model with its slot cache: numpy token ids in, logits out. No architecture is named here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sgpo_async.engines.attention import use_decode_attention
from sgpo_async.engines.decode_step import DecodeStep, Step, traced
from sgpo_async.engines.slots import SlotCache
from sgpo_async.errors import EngineError

_BATCH_TOKENS = 8192  # of one padded prefill or scoring batch
_BATCH_LOGITS = 2**26  # float32 logits of one scoring batch: 256 MiB
_FAULTS = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)  # of a model's code that is asked too much


class Decoder:
    """Runs `model` over the rows of a SlotCache. All methods need `torch.inference_mode` around them.

    Raises EngineError if the model cannot be decoded with a key-value cache.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        use_decode_attention(model)
        self.model, self.slots = model.eval(), slots
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.cache = SlotCache(slots, model.device)
        self._step = self._choose_step()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """`array` on the model's device."""
        return torch.from_numpy(array).to(self.model.device)

    def prefill(self, first: int, prefixes: list[np.ndarray]) -> None:
        """Compute the cache of `prefixes` ([length] ids each, possibly empty) in the rows from `first` on."""
        for start, stop in batches([p.size for p in prefixes], _BATCH_TOKENS):
            ids = self._padded(prefixes[start:stop])
            if ids.shape[1]:
                self.cache.prefill(first + start, ids.shape[1])
                # Without the head: prefixes need no logits. Padding stands behind the tokens, so causal
                # attention hides it without a mask.
                self.model.base_model(input_ids=ids, past_key_values=self.cache, use_cache=True)

    def decode(self, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Feed `tokens` [n] at `positions` [n] of rows 0..n-1; returns the logits after them, [n, V]."""
        return self._step(*self._step_inputs(tokens, positions))

    def logits(self, ids: list[np.ndarray]) -> torch.Tensor:
        """Teacher-forced logits of all positions, [n, longest, V], without the cache."""
        return self.model(input_ids=self._padded(ids), use_cache=False).logits

    def scoring_batches(self, lengths: list[int]) -> list[tuple[int, int]]:
        """How to split sequences of these lengths so that their logits fit in memory."""
        return batches(lengths, min(_BATCH_TOKENS, _BATCH_LOGITS // self.vocabulary))

    def move(self, sources: np.ndarray, targets: np.ndarray, length: int) -> None:
        """Copy cache rows."""
        self.cache.move(self.tensor(sources), self.tensor(targets), length)

    @torch.inference_mode()
    def _choose_step(self) -> Step:
        """The traced decode step if it agrees with the model's plain forward, else the untraced one if that does.

        Neither does for models that keep other state than keys and values, or ignore given positions or masks.
        """
        ids = [np.arange(length, dtype=np.int64) % self.vocabulary for length in (9, 4, 6)[: self.slots]]
        step = DecodeStep(self.model, self.cache)
        try:
            plain = torch.stack([self.logits([row])[0, -1] for row in ids])
            self.prefill(0, [row[:-1] for row in ids])
            fault = ""
            for candidate in (traced(step, *self._inputs([row[:3] for row in ids[:2]])), step):
                fault = self._fault(candidate, ids, plain)
                if not fault:
                    return candidate
        except _FAULTS as error:
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise EngineError(
            f"the embedded engine cannot decode {type(self.model).__name__} exactly with a key-value cache: {fault}"
        )

    def _fault(self, step: Step, ids: list[np.ndarray], plain: torch.Tensor) -> str:
        """What is wrong with `step`, decoding the last two tokens of `ids`, all rows or the first alone; "" if nothing."""
        limit = (1e-3 if self.model.dtype == torch.float32 else 5e-2) * float(plain.abs().max())
        for rows in (len(ids), 1):
            try:
                step(*self._inputs([row[:-1] for row in ids[:rows]]))
                decoded = step(*self._inputs(ids[:rows]))
            except _FAULTS as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            difference = float((decoded - plain[:rows]).abs().max())
            if not difference <= limit:
                return f"cached and plain logits differ by {difference:.1e}, limit {limit:.1e}"
        return ""

    def _inputs(self, ids: list[np.ndarray]) -> tuple[Any, ...]:
        """Of the decode step that feeds the last token of each of `ids`."""
        return self._step_inputs(np.array([row[-1] for row in ids]), np.array([row.size - 1 for row in ids]))

    def _step_inputs(self, tokens: np.ndarray, positions: np.ndarray) -> tuple[Any, ...]:
        places = self.cache.places(self.tensor(positions), int(positions.max()) + 1)
        return self.tensor(tokens), *places

    def _padded(self, ids: list[np.ndarray]) -> torch.Tensor:
        return self.tensor(pad_sequence([torch.from_numpy(row) for row in ids], batch_first=True).numpy())


def batches(lengths: list[int], limit: int) -> list[tuple[int, int]]:
    """Split 0..n-1 into consecutive [start, stop) whose padded size, rows x longest, is at most `limit` (or one row)."""
    parts: list[tuple[int, int]] = []
    start = longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and (i + 1 - start) * longest > limit:
            parts.append((start, i))
            start, longest = i, length
    if lengths:
        parts.append((start, len(lengths)))
    return parts

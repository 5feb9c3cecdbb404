"""A causal language model with its slot cache: numpy token ids in, logits out. No architecture is named here."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sgpo_async.engines.attention import use_decode_attention
from sgpo_async.engines.slots import SlotCache
from sgpo_async.errors import EngineError

_BATCH_TOKENS = 8192  # of one padded prefill or scoring batch
_BATCH_LOGITS = 2**26  # float32 logits of one scoring batch: 256 MiB


class Decoder:
    """Runs `model` over the rows of a SlotCache. All methods need `torch.inference_mode` around them."""

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        use_decode_attention(model)
        self.model, self.slots = model.eval(), slots
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.cache = SlotCache(slots, model.device)

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
        places = self.tensor(positions)
        mask = self.cache.decode(places, int(positions.max()) + 1, self.model.dtype)
        output = self.model(
            input_ids=self.tensor(tokens)[:, None],
            position_ids=places[:, None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

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
    def check(self) -> None:
        """Raise EngineError unless this model, decoded in rows of different lengths, agrees with its plain forward.

        That fails for models that keep other state than keys and values, or ignore positions or masks given.
        """
        ids = [np.arange(length, dtype=np.int32) % self.vocabulary for length in (7, 4)[: self.slots]]
        try:
            self.prefill(0, [row[:-2] for row in ids])
            for back in (2, 1):
                decoded = self.decode(
                    np.array([row[-back] for row in ids], np.int32), np.array([row.size - back for row in ids])
                )
            plain = torch.stack([self.logits([row])[0, -1] for row in ids])
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            raise EngineError(f"{self._unsupported()} ({type(error).__name__}: {error})") from error
        limit = (1e-3 if self.model.dtype == torch.float32 else 5e-2) * float(plain.abs().max())
        difference = float((decoded - plain).abs().max())
        if not difference <= limit:
            raise EngineError(
                f"{self._unsupported()} (cached and plain logits differ by {difference:.1e}, limit {limit:.1e})"
            )

    def _unsupported(self) -> str:
        return f"the embedded engine cannot decode {type(self.model).__name__} exactly with a key-value cache"

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

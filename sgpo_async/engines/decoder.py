"""A causal language model with its slot cache: numpy token ids in, logits out. Works for any architecture."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sgpo_async.engines.attention import use_decode_attention
from sgpo_async.engines.decode_step import DecodeStep, Step, traced
from sgpo_async.engines.sampling import log_softmax
from sgpo_async.engines.slots import SlotCache
from sgpo_async.errors import EngineError

_BATCH_TOKENS = 8192  # padded tokens of one prefill or scoring batch
_BATCH_LOGITS = 2**26  # float32 logits of one scoring batch: 256 MiB


class Decoder:
    """Runs `model` over the rows of a SlotCache. Call all methods under `torch.inference_mode`.

    Raises EngineError if the model cannot be decoded with a key-value cache.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        use_decode_attention(model)
        self.model, self.slots = model.eval(), slots
        self.vocabulary = _rows(model.get_input_embeddings())
        self._batch_rows = max(1, _BATCH_LOGITS // self.vocabulary)
        self._takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.cache = SlotCache(slots, model.device)
        self._step = self._choose_step()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """`array` on the model's device."""
        return torch.from_numpy(array).to(self.model.device)

    def prefill(self, first: int, prefixes: list[np.ndarray]) -> None:
        """Fill the cache rows from `first` on with `prefixes` ([length] ids each, possibly empty)."""
        for start, stop in batches([p.size for p in prefixes], _BATCH_TOKENS):
            distinct, copies = _distinct(prefixes[start:stop])
            ids = self._padded(distinct)
            if ids.shape[1]:
                self.cache.prefill(first + start, self.tensor(copies), ids.shape[1])
                # base_model has no output head, because prefixes need no logits. Padding follows the tokens, so
                # causal attention hides it without a mask.
                self.model.base_model(input_ids=ids, past_key_values=self.cache, use_cache=True)

    def decode(self, tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Feed `tokens` [n] at `positions` [n] of rows 0..n-1; returns the logits of the next token, [n, V]."""
        return self._step(*self._inputs(tokens, positions))

    def logits(self, ids: list[np.ndarray], *, first: int = 0) -> torch.Tensor:
        """Logits of the positions of given sequences, [n, longest, V], computed without the cache.

        The positions before `first` are not needed: they may be missing, so that the last position is always the last.
        """
        padded = self._padded(ids)
        keep = padded.shape[1] - first
        # Only for a sequence that is too long for a batch: a smaller matrix product may round differently.
        if self._takes_keep and padded.numel() > self._batch_rows:
            return self.model(input_ids=padded, use_cache=False, logits_to_keep=keep).logits
        return self.model(input_ids=padded, use_cache=False).logits

    def scoring_batches(self, lengths: list[int]) -> list[tuple[int, int]]:
        """Split sequences of these lengths into ranges with logits of limited size; a longer sequence is one by itself.

        Of such a sequence the logits exist once, as the model returns them.
        """
        return batches(lengths, min(_BATCH_TOKENS, self._batch_rows))

    def logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        """Log-probabilities [T] of `tokens` [T] by `logits` [T, V], some rows at a time: each step makes a copy."""
        parts = zip(logits.split(self._batch_rows), tokens.split(self._batch_rows), strict=True)
        divisor = torch.tensor(temperature, device=logits.device)
        return torch.cat([log_softmax(some, divisor).gather(1, own[:, None])[:, 0] for some, own in parts])

    def move(self, sources: np.ndarray, targets: np.ndarray, length: int) -> None:
        """Copy cache rows."""
        self.cache.move(self.tensor(sources), self.tensor(targets), length)

    @torch.inference_mode()
    def _choose_step(self) -> Step:
        """The decode step: its trace if the trace agrees with the plain forward, else the untraced step."""
        step = DecodeStep(self.model, self.cache)
        if disagreement := self._disagreement(step):
            raise EngineError(
                f"the embedded engine cannot decode {type(self.model).__name__} exactly with a key-value cache: "
                f"{disagreement}"
            )
        trace = traced(step, *self._inputs_after([row[:3] for row in self._trial_rows()[:2]]))
        return step if self._disagreement(trace) else trace

    def _disagreement(self, step: Step) -> str:
        """How `step` differs from the model's plain forward, on all trial rows and on one row; "" if it agrees.

        Models that keep other state than keys and values, or ignore the given positions or masks, disagree.
        """
        ids = self._trial_rows()
        try:
            plain = torch.stack([self.logits([row])[0, -1] for row in ids])
            self.prefill(0, [row[:-2] for row in ids])
            limit = (1e-3 if self.model.dtype == torch.float32 else 5e-2) * float(plain.abs().max())
            for rows in (len(ids), 1):
                step(*self._inputs_after([row[:-1] for row in ids[:rows]]))
                difference = float((step(*self._inputs_after(ids[:rows])) - plain[:rows]).abs().max())
                if not difference <= limit:
                    return f"cached and plain logits differ by {difference:.1e}, limit {limit:.1e}"
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return ""

    def _trial_rows(self) -> list[np.ndarray]:
        return [np.arange(length, dtype=np.int64) % self.vocabulary for length in (9, 4, 6)[: self.slots]]

    def _inputs(self, tokens: np.ndarray, positions: np.ndarray) -> tuple[Any, ...]:
        view = self.cache.decode_view(self.tensor(positions), int(positions.max()) + 1)
        return self.tensor(tokens), *view

    def _inputs_after(self, ids: list[np.ndarray]) -> tuple[Any, ...]:
        """The inputs of the step that feeds the last token of each of `ids`."""
        return self._inputs(np.array([row[-1] for row in ids]), np.array([row.size - 1 for row in ids]))

    def _padded(self, ids: list[np.ndarray]) -> torch.Tensor:
        return self.tensor(pad_sequence([torch.from_numpy(row) for row in ids], batch_first=True).numpy())


def _rows(embedding: torch.nn.Module) -> int:
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _distinct(prefixes: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The distinct prefixes, and the index of each prefix among them. Rollouts of a group share their prompt."""
    distinct = {prefix.tobytes(): prefix for prefix in prefixes}
    indices = {key: i for i, key in enumerate(distinct)}
    return list(distinct.values()), np.array([indices[prefix.tobytes()] for prefix in prefixes])


def batches(lengths: list[int], limit: int) -> list[tuple[int, int]]:
    """Split 0..n-1 into consecutive ranges [start, stop) with a padded size (rows x longest) of at most `limit`.

    A single row that exceeds `limit` gets a range of its own.
    """
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

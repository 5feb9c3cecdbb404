"""One decode step as a function of tensors, and its trace.

A step of a small model is some 150 tensor operations; the Python of transformers around them costs more than they do.
A trace replays the operations alone (measured on a 150k parameter Qwen2, one CPU core: 2.8 to 1.0 ms with one row,
4.0 to 2.7 ms with 64) and gives the same bits. It shares the model's parameters, so new weights need no new trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from sgpo_async.engines.slots import Places, SlotCache

Step = Callable[..., torch.Tensor]


class DecodeStep(torch.nn.Module):
    """tokens [n] int64 and the fields of `Places` -> logits [n, V]; writes keys and values in place."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(  # a trace takes tensors, not records
        self,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        columns: torch.Tensor,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        self.cache.decode(Places(rows, positions, columns, keys, values))
        hidden = columns > positions[:, None]
        mask = torch.zeros_like(hidden, dtype=self.model.dtype).masked_fill_(hidden, -torch.inf)
        output = self.model(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            attention_mask=mask[:, None, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]


def traced(step: DecodeStep, *inputs: object) -> Step:
    """A trace of `step`, or `step` itself if it cannot be traced or if what it does depends on values.

    `inputs` have two rows if there are two slots: a single row may be taken for one to broadcast.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        try:
            trace = torch.jit.trace(step, inputs, check_trace=False)
        except Exception:  # whatever a model's code does with tensors that it takes for numbers
            return step

    def replay(*args: object) -> torch.Tensor:
        with torch.jit.optimized_execution(False):  # operations as they were traced: no fusion, no other bits
            return trace(*args)

    return replay

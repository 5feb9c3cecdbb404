"""Attention of one query per sequence over the slot cache, for models that use PyTorch's SDPA.

`scaled_dot_product_attention` is made for many queries. On a CPU, for one query and a short cache, it takes two to
three times as long as two batched matrix products, and it copies grouped keys for every query head. So a decode step
in float32 uses two matrix products; everything else uses SDPA.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "sgpo_slots"


def use_decode_attention(model: PreTrainedModel) -> None:
    """Let `model` decode with `decode_attention`; a model that does not use SDPA keeps its own attention."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, decode_attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


def decode_attention(  # noqa: PLR0913, PLR0917 (transformers' attention signature)
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [n, H, 1, d], key and value [n, h, L, d] with h dividing H, mask [n, 1, 1, L] added to the scores.

    Returns [n, 1, H, d]. Query heads of one group are the rows of one matrix product. The code branches on types only
    and never on sizes, so a trace is valid for all sizes.
    """
    if not _is_decode_step(attention_mask, kwargs):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    n, heads, _, width = query.shape
    groups, length = key.shape[1:3]
    grouped = (query * (width**-0.5 if scaling is None else scaling)).view(n * groups, heads // groups, width)
    scores = torch.bmm(grouped, key.reshape(n * groups, length, width).transpose(1, 2)).view(n, heads, length)
    weights = (scores + attention_mask[:, 0]).softmax(-1).view(n * groups, heads // groups, length)
    mixed = torch.bmm(weights, value.reshape(n * groups, length, value.shape[-1]))
    return mixed.view(n, 1, heads, value.shape[-1]), None


def _is_decode_step(attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> TypeGuard[torch.Tensor]:
    """Only a decode step passes an additive mask: prefill and scoring pass none; transformers' are boolean."""
    return attention_mask is not None and attention_mask.dtype == torch.float32 and kwargs.get("position_bias") is None

"""Causal attention within each sequence of a packed row, for every model whose attention transformers lets us choose.

    row of N sequences ─▶ query, key, value ─┬▶ varlen_attn, one kernel for the row     CUDA, bfloat16 or float16
                                             └▶ split ─▶ SDPA, one call for neighbours of equal length    elsewhere

Neither way builds a mask of the row, and transformers builds none either, because it knows no mask function of this
attention's name. The causal mask of one sequence is left to the kernel. A layer with a sliding window attends to the
`sliding_window` newest tokens, its own included; elsewhere than on CUDA it is computed in blocks of so many queries,
with a mask of one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

NAME = "sgpo_packed"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments of transformers' attentions that change the scores
FLASH_TYPES = (torch.bfloat16, torch.float16)
FLASH_WIDTH = 256  # largest width of a head; it must be a multiple of 8


@dataclass(frozen=True)
class Segments:
    """The sequences of one packed row, in their order. See `packing` for the row and the plain layout."""

    lengths: list[int]  # in tokens; their sum is the length S of the plain layout
    edges: Tensor  # [N + 1] int32, on the row's device: 0, and where each sequence ends in the plain layout
    windows: set[int | None]  # each layer adds its sliding window
    where: Tensor | None = None  # [S] for each position of the plain layout, its position in the row; None: the same
    first: Tensor | None = None  # [W] for each position of the row, its first position in the plain layout


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let the layers of `model` compute their attention by `packed_attention`."""
    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)


@torch.compiler.disable  # see `compiling`
def packed_attention(  # noqa: PLR0913 (transformers' attention signature)
    _: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, W, d], key [1, h, W, d] and value [1, h, W, e], with h dividing H; returns [1, W, H, e].

    `segments` is what the model's forward was given under this name. Raises TypeError if the layer wants anything else
    than causal attention within them.
    """
    if segments is None:
        raise TypeError("its attention is not told where the packed sequences begin")
    if attention_mask is not None or any(kwargs.get(name) is not None for name in UNSUPPORTED):
        raise TypeError(f"its attention has a mask of its own, or one of {', '.join(UNSUPPORTED)}")
    segments.windows.add(sliding_window)
    if segments.where is not None:
        query, key, value = (tensor.index_select(2, segments.where) for tensor in (query, key, value))
    by = _by_kernel if _has_kernel(query, value) else _by_sequence
    mixed = by(query, key, value, scaling, sliding_window, segments)
    # In plain layout, as every layer makes it anyway, so that compiled layers see the same strides in every row.
    return mixed.contiguous() if segments.first is None else mixed.index_select(1, segments.first), None


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, segments: Segments
) -> Tensor:
    """Attention of all sequences by one kernel, FlashAttention: [1, H, S, d] to [1, S, H, d]."""
    longest = max(segments.lengths)
    mixed = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        segments.edges,
        segments.edges,
        longest,
        longest,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),  # tokens to the left and to the right; -1: all
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed, Tensor)
    return mixed[None]


def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, segments: Segments
) -> Tensor:
    """Attention of one sequence after another, neighbours of equal length together: [1, H, S, d] to [1, S, H, e]."""
    runs = [(length, len(list(own))) for length, own in groupby(segments.lengths)]
    parts = zip(
        *(tensor[0].split([length * n for length, n in runs], 1) for tensor in (query, key, value)), strict=True
    )
    mixed = []
    for (_, n), part in zip(runs, parts, strict=True):
        q, k, v = (tensor.unflatten(1, (n, -1)).transpose(0, 1) for tensor in part)  # [H, n L, d] to [n, H, L, d]
        mixed.append(_causal(q, k, v, scale, window).transpose(1, 2).flatten(0, 1)[None])
    return torch.cat(mixed, 1)  # not a view of another tensor, which would be another graph to compiled layers


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    if not (query.is_cuda and query.dtype in FLASH_TYPES and torch.cuda.get_device_capability(query.device) >= (8, 0)):
        return False
    return width == value.shape[-1] and width <= FLASH_WIDTH and width % 8 == 0


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Causal attention of n sequences of length L: query [n, H, L, d] to [n, H, L, e]."""
    grouped, length = query.shape[1] != key.shape[1], query.shape[2]
    if window is None or length <= window:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
    blocks = []
    for start in range(0, length, window):
        first, end = max(start - window + 1, 0), min(start + window, length)
        distance = torch.arange(start, end, device=key.device)[:, None] - torch.arange(first, end, device=key.device)
        blocks.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, first:end],
                value[:, :, first:end],
                attn_mask=(distance >= 0) & (distance < window),
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(blocks, 2)

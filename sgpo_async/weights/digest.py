"""A short digest that is equal for two sets of weights exactly if they are equal, bit for bit.

The digest is the xxh3_128 over each tensor's name, dtype, shape and the xxh3_128 of its row-major bytes, in the order
of the names. Because each tensor is hashed separately, a writer can hash tensors in any order and the result still
depends only on the content. xxh3 detects accidental changes, not deliberate forgery.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch


def digest(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Compute the digest of `named_tensors`, in any order, on any device: 32 hexadecimal digits."""
    return combine(
        (name, dtype_name(tensor), tuple(tensor.shape), xxhash.xxh3_128_digest(tensor_bytes(tensor)))
        for name, tensor in named_tensors
    )


def combine(parts: Iterable[tuple[str, str, Sequence[int], bytes]]) -> str:
    """Compute the digest from each tensor's (name, dtype, shape, xxh3_128 of the bytes), in any order."""
    state = xxhash.xxh3_128()
    for name, dtype, shape, content in sorted(parts):
        state.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
        state.update(content)
    return state.hexdigest()


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the torch name of the dtype, for example "bfloat16"."""
    return name_of(tensor.dtype)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the row-major bytes of a tensor of any dtype, on any device; without copying if possible."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data

"""One short string that two sets of weights share exactly when they are the same, bit for bit.

xxh3_128 over, in the order of names, each tensor's name, dtype, shape and the xxh3_128 of its row-major
bytes. Hashing each tensor on its own lets a writer hash in the order of arrival while the result depends on
the content alone. xxh3 finds accidents, not forgeries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch


def digest(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of `named_tensors`, in any order, on any device: 32 hexadecimal digits."""
    return combine(
        (name, dtype_name(tensor), tuple(tensor.shape), xxhash.xxh3_128_digest(tensor_bytes(tensor)))
        for name, tensor in named_tensors
    )


def combine(parts: Iterable[tuple[str, str, Sequence[int], bytes]]) -> str:
    """Digest from (name, dtype, shape, xxh3_128 of the bytes) of each tensor, in any order."""
    state = xxhash.xxh3_128()
    for name, dtype, shape, content in sorted(parts):
        state.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())
        state.update(content)
    return state.hexdigest()


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype's torch name, such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The row-major bytes of a tensor of any dtype, on any device; a view where it can be one."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data

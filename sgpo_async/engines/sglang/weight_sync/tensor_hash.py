"""SGLang's two content hashes of a tensor, both computed on the CPU.

A server hashes its tensors on its own device (`tensor_hash` in sglang/srt/managers/mm_utils.py, 0.5.23): on a CPU with
SHA-256, on a GPU with a Triton kernel (sglang/kernels/ops/memory/gpu_tensor_hash.py). `cuda_hash` is that kernel in
NumPy.

The kernel takes the bytes as 32-bit words v_i, in tiles of 8192. Two seeds s give two 32-bit halves of each tile:

    p_i = (i C + s) xor rotl(i, r)         the position i counts from the start of the tensor
    h   = fmix32((sum_i fmix32(v_i xor p_i)) xor nbytes)

The result is splitmix64 of the sum of the tiles' 64-bit words. All arithmetic wraps around.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_TILE = 8192  # words: 2^13, so that the bits of a tile's number and of a position within it do not overlap
_BLOCK = 8  # tiles computed together: small enough for the CPU cache, large enough for efficient NumPy calls
_MIX = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35))
_SEED = 0x243F6A88
# (s, C, r) of the upper and of the lower half
_HALVES = ((_SEED, 0x27D4EB2D, 15), (((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF, 0x165667B1, 13))
_LOW32, _LOW64 = (1 << 32) - 1, (1 << 64) - 1


def cpu_hash(tensor: torch.Tensor) -> str:
    """The hash of `tensor` on a CPU server: the first 8 bytes of its SHA-256 as 16 hexadecimal digits."""
    return hashlib.sha256(_bytes(tensor).data).hexdigest()[:16]


def cuda_hash(tensor: torch.Tensor) -> str:
    """The hash of `tensor` on a GPU server as 16 hexadecimal digits; `tensor` may be on any device."""
    content = _bytes(tensor)
    if content.size % 4:
        content = np.concatenate([content, np.zeros(-content.size % 4, np.uint8)])
    words = content.view(np.uint32)
    if words.size == 0:
        return f"{0:016x}"
    halves = [_Half(*half) for half in _HALVES]
    total = 0
    for start in range(0, words.size, _BLOCK * _TILE):
        block = words[start : start + _BLOCK * _TILE]
        whole = block.size // _TILE
        for first, tiles in ((0, block[: whole * _TILE].reshape(whole, _TILE)), (whole, block[None, whole * _TILE :])):
            if tiles.size:
                upper, lower = (half.of(tiles, start // _TILE + first, words.size * 4) for half in halves)
                total += (int(upper.sum(dtype=np.uint64)) << 32) + int(lower.sum(dtype=np.uint64))
    return f"{_splitmix64(total & _LOW64):016x}"


class _Half:
    """One 32-bit half of a tile's hash. Terms that depend only on the position within a tile are computed once."""

    def __init__(self, seed: int, factor: int, rotation: int) -> None:
        within = np.arange(_TILE, dtype=np.uint32)
        self.factor, self.rotation = factor, rotation
        self.products = within * np.uint32(factor) + np.uint32(seed)
        self.rotated = _rotl(within, rotation)
        self.mixed = np.empty((_BLOCK, _TILE), np.uint32)
        self.shifted = np.empty((_BLOCK, _TILE), np.uint32)

    def of(self, tiles: np.ndarray, first: int, nbytes: int) -> np.ndarray:
        """The hashes [tiles] of `tiles` [tiles, words]; `first` is the number of the first tile."""
        count, width = tiles.shape
        x, spare = self.mixed[:count, :width], self.shifted[:count, :width]
        bases = (np.arange(first, first + count, dtype=np.uint64)[:, None] * _TILE).astype(np.uint32)
        np.add(self.products[:width], bases * np.uint32(self.factor), out=x)
        x ^= self.rotated[:width]
        x ^= _rotl(bases, self.rotation)
        x ^= tiles
        _fmix32(x, spare)
        sums = x.sum(axis=1, dtype=np.uint32)
        sums ^= np.uint32(nbytes & _LOW32)
        _fmix32(sums, np.empty_like(sums))
        return sums


def _fmix32(x: np.ndarray, spare: np.ndarray) -> None:
    """Apply MurmurHash3's finaliser to 32-bit words, in place."""
    for shift, factor in zip((16, 13), _MIX, strict=True):
        np.right_shift(x, shift, out=spare)
        x ^= spare
        x *= factor
    np.right_shift(x, 16, out=spare)
    x ^= spare


def _rotl(x: np.ndarray, bits: int) -> np.ndarray:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def _splitmix64(x: int) -> int:
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & _LOW64
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & _LOW64
    return x ^ (x >> 31)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The row-major bytes of a tensor of any dtype; a view if the memory layout allows it."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

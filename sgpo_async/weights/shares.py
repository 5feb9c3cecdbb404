"""Write one version from several processes, each of which has some rows of every tensor.

    layout, share_of          which bytes of the version each process has: pure functions, the same everywhere
    write_part                each process writes its bytes to their offsets in the store
    ReadBack ─▶ manifest      one process hashes what lies in the store

The xxh3 of a tensor cannot be put together from hashes of its parts, so for the digest one process has to hash every
byte. It hashes what lies in the store, not what it was sent. With every block it also updates the hash of the share
that the block belongs to, while the block is in the cache; each process hashes its own bytes before it writes them.
If a share's two hashes are equal, no write of it is torn or at a wrong place. That costs every byte one more hash on
either side, 8 bytes on the way, and no second reading of the version.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from sgpo_async.weights import store_layout
from sgpo_async.weights.digest import combine, name_of
from sgpo_async.weights.manifest import BucketSums, Manifest, TensorEntry, aligned
from sgpo_async.weights.writer import BUCKET_BYTES

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 2**20  # read back at once: small enough for a core's cache


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of one tensor that one process has."""

    start: int  # in the bytes of the process, which are its pieces one after another
    offset: int  # in the data of the version
    nbytes: int


Share = tuple[Piece, ...]  # of one process: at most one piece of each tensor, in the order of the tensors


def layout(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> tuple[TensorEntry, ...]:
    """Lay tensors out, from name, dtype and shape, as `StoreWriter.publish` does."""
    entries: list[TensorEntry] = []
    offset = 0
    for name, dtype, shape in tensors:
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        entries.append(TensorEntry(name, name_of(dtype), tuple(shape), offset, nbytes))
        offset += aligned(nbytes)
    return tuple(entries)


def share_of(tensors: Sequence[TensorEntry], rows_of: Callable[[int], range]) -> Share:
    """Return the share of a process that has the rows `rows_of(n)` of every tensor of n rows; a scalar is one row."""
    pieces: list[Piece] = []
    start = 0
    for entry in tensors:
        rows = entry.shape[0] if entry.shape else 1
        own, row_bytes = rows_of(rows), entry.nbytes // max(rows, 1)
        if nbytes := len(own) * row_bytes:
            pieces.append(Piece(start, entry.offset + own.start * row_bytes, nbytes))
            start += nbytes
    return tuple(pieces)


def size_of(share: Share) -> int:
    """Return how many bytes a process has."""
    return share[-1].start + share[-1].nbytes if share else 0


def write_part(fd: int, data: int, share: Share, first: int, part: memoryview) -> None:
    """Write some of the bytes of a process to their places in the file. Raises WeightsError.

    Args:
        data: where the data of the version begin in the file.
        first: where `part` begins in the bytes of the process.
    """
    last = first + len(part)
    for piece in share:
        begin, end = max(piece.start, first), min(piece.start + piece.nbytes, last)
        if begin < end:
            store_layout.write(fd, part[begin - first : end - first], data + piece.offset + begin - piece.start)


def write_padding(fd: int, data: int, tensors: Sequence[TensorEntry]) -> None:
    """Write the zeros that follow each tensor, which belong to no share. Raises WeightsError."""
    for entry in tensors:
        if missing := aligned(entry.nbytes) - entry.nbytes:
            store_layout.write(fd, bytes(missing), data + entry.offset + entry.nbytes)


class ReadBack:
    """Hashes a version that lies in a store."""

    def __init__(
        self,
        fd: int,
        data: int,
        tensors: Sequence[TensorEntry],
        shares: Sequence[Share],
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """`data` is where the data of the version begin in the file."""
        self._fd, self._data, self._tensors = fd, data, tuple(tensors)
        self._pieces = deque(sorted((p.offset, p.nbytes, owner) for owner, share in enumerate(shares) for p in share))
        self._shares = [xxhash.xxh3_64() for _ in shares]
        self._contents: list[bytes] = []
        self._sums = BucketSums(bucket_bytes)
        self._buffer = memoryview(bytearray(BLOCK_BYTES))

    def blocks(self) -> Iterator[int]:
        """Read and hash the whole version; yield the size of each block that was read."""
        sums = self._sums
        for entry in self._tensors:
            content, end = xxhash.xxh3_128(), entry.offset + entry.nbytes
            while self._pieces and self._pieces[0][0] < end:
                offset, nbytes, owner = self._pieces.popleft()
                assert offset == sums.offset, f"{entry.name}: the shares must cover it once, from {sums.offset}"
                for block in self._read(offset, nbytes):
                    for state in (content, self._shares[owner], sums):
                        state.update(block)
                    yield len(block)
            assert sums.offset == end, f"{entry.name}: the shares must cover it up to {end}, got {sums.offset}"
            self._contents.append(content.digest())
            for block in self._read(end, aligned(entry.nbytes) - entry.nbytes):
                sums.update(block)

    def hashes(self) -> list[int]:
        """The xxh3_64 of the bytes of each share, as they were read."""
        return [state.intdigest() for state in self._shares]

    def manifest(self, version: int) -> Manifest:
        """Describe what was read as `version`."""
        parts = zip(self._tensors, self._contents, strict=True)
        return Manifest(
            version=version,
            digest=combine((e.name, e.dtype, e.shape, content) for e, content in parts),
            published_at=time.time(),
            nbytes=self._sums.offset,
            tensors=self._tensors,
            buckets=self._sums.buckets(),
        )

    def _read(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield the bytes from `offset` on in blocks; each is valid until the next one."""
        for begin in range(0, nbytes, BLOCK_BYTES):
            block = self._buffer[: nbytes - begin]
            yield block[: store_layout.read_into(self._fd, block, self._data + offset + begin)]

"""The manifest of one weight version: its tensors, the offsets of their bytes, and checksums.

Offsets count from the start of the version's data. Tensors follow one another, each aligned to `ALIGNMENT` bytes, with
zeros in the gaps. Buckets divide the same bytes into equal pieces, which are the units of transfer. The encoded form is
the xxh3_64 of the body (8 bytes, little-endian), followed by the body, one MessagePack map.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import msgpack
import xxhash

from sgpo_async.errors import WeightsError

ALIGNMENT = 64
_CHECKSUM_BYTES = 8


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its bytes are [offset, offset + nbytes), contiguous and row-major."""

    name: str
    dtype: str  # the torch name: "float32", "bfloat16", ...
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Bucket:
    """One unit of transfer: the bytes [offset, offset + nbytes) of the data."""

    offset: int
    nbytes: int
    checksum: int  # xxh3_64 of the bytes


@dataclass(frozen=True)
class Manifest:
    """The description of one complete weight version."""

    version: int
    digest: str  # `weights.digest` of the tensors
    published_at: float  # wall-clock time of the publisher, seconds since 1970
    nbytes: int  # size of the data, including padding
    tensors: tuple[TensorEntry, ...]
    buckets: tuple[Bucket, ...]

    def to_bytes(self) -> bytes:
        """Encode the manifest, with a checksum in front."""
        body = msgpack.packb(dataclasses.asdict(self))
        return xxhash.xxh3_64_intdigest(body).to_bytes(_CHECKSUM_BYTES, "little") + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Decode a manifest. Raises WeightsError if the checksum does not match."""
        checksum, body = int.from_bytes(data[:_CHECKSUM_BYTES], "little"), data[_CHECKSUM_BYTES:]
        if xxhash.xxh3_64_intdigest(body) != checksum:
            raise WeightsError(f"manifest: the checksum does not match its {len(data)} bytes; send it again")
        fields: dict[str, Any] = msgpack.unpackb(body)
        fields["tensors"] = tuple(TensorEntry(**{**t, "shape": tuple(t["shape"])}) for t in fields["tensors"])
        fields["buckets"] = tuple(Bucket(**b) for b in fields["buckets"])
        return cls(**fields)

    def check(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Raise WeightsError unless `data` is the content of bucket `index`."""
        self.check_size(index, len(data))
        self.check_sum(index, xxhash.xxh3_64_intdigest(data))

    def check_size(self, index: int, nbytes: int) -> None:
        """Raise WeightsError unless bucket `index` has this size."""
        if nbytes != (expected := self.buckets[index].nbytes):
            raise WeightsError(
                f"weights version {self.version}: bucket {index} must have {expected} bytes, got {nbytes}"
            )

    def check_sum(self, index: int, checksum: int) -> None:
        """Raise WeightsError unless this is the xxh3_64 of bucket `index`."""
        if checksum != self.buckets[index].checksum:
            raise WeightsError(f"weights version {self.version}: bucket {index} does not match its checksum")


class BucketSums:
    """Divides a stream of bytes into buckets of one size and computes their checksums.

    Attributes:
        offset: how many bytes there were so far.
    """

    def __init__(self, bucket_bytes: int) -> None:
        self.offset = 0
        self._bucket_bytes = bucket_bytes
        self._buckets: list[Bucket] = []
        self._hash = xxhash.xxh3_64()

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        view = memoryview(data)
        while view:
            begin = len(self._buckets) * self._bucket_bytes
            piece = view[: begin + self._bucket_bytes - self.offset]
            self._hash.update(piece)
            self.offset += len(piece)
            view = view[len(piece) :]
            if self.offset == begin + self._bucket_bytes:
                self._cut()

    def buckets(self) -> tuple[Bucket, ...]:
        """End the stream; return its buckets, of which the last may be shorter."""
        if self.offset > len(self._buckets) * self._bucket_bytes:
            self._cut()
        return tuple(self._buckets)

    def _cut(self) -> None:
        begin = len(self._buckets) * self._bucket_bytes
        self._buckets.append(Bucket(begin, self.offset - begin, self._hash.intdigest()))
        self._hash = xxhash.xxh3_64()


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Round `nbytes` up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment

"""What one version of the weights consists of: tensors, where their bytes lie, and checksums.

Offsets count from the start of the version's data. Tensors follow one another, each aligned to `ALIGNMENT`
bytes with zeros between; buckets cut the same bytes into equal pieces, the units of transfer. Encoded form:
the xxh3_64 of the rest (8 bytes, little-endian), then one MessagePack map.
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
    dtype: str  # "float32", "bfloat16", ...: the torch name
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Bucket:
    """One unit of transfer: bytes [offset, offset + nbytes) of the data."""

    offset: int
    nbytes: int
    checksum: int  # xxh3_64 of the bytes


@dataclass(frozen=True)
class Manifest:
    """One whole version of the weights."""

    version: int
    digest: str  # `weights.digest` of the tensors
    published_at: float  # publisher's wall clock, seconds since 1970
    nbytes: int  # of the data, with padding
    tensors: tuple[TensorEntry, ...]
    buckets: tuple[Bucket, ...]

    def to_bytes(self) -> bytes:
        """Encode with a checksum in front."""
        body = msgpack.packb(dataclasses.asdict(self))
        return xxhash.xxh3_64_intdigest(body).to_bytes(_CHECKSUM_BYTES, "little") + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Decode. Raises WeightsError if the checksum does not fit."""
        checksum, body = int.from_bytes(data[:_CHECKSUM_BYTES], "little"), data[_CHECKSUM_BYTES:]
        if xxhash.xxh3_64_intdigest(body) != checksum:
            raise WeightsError(f"manifest: checksum does not fit its {len(data)} bytes")
        fields: dict[str, Any] = msgpack.unpackb(body)
        fields["tensors"] = tuple(TensorEntry(**{**t, "shape": tuple(t["shape"])}) for t in fields["tensors"])
        fields["buckets"] = tuple(Bucket(**b) for b in fields["buckets"])
        return cls(**fields)

    def check(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Raise WeightsError unless `data` is the content of bucket `index`."""
        bucket = self.buckets[index]
        if len(data) != bucket.nbytes or xxhash.xxh3_64_intdigest(data) != bucket.checksum:
            raise WeightsError(f"weights version {self.version}: bucket {index} does not fit its checksum")


def aligned(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment

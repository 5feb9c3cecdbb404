"""How one weight version is divided into broadcasts.

The division is a pure function of the manifest, so that sender and receiver compute the same one. A broadcast is the
bytes of some whole tensors, one after another in the manifest's order, without gaps: the "flattened bucket" of SGLang
(sglang/srt/weight_sync/tensor_bucket.py, 0.5.23). SGLang rejects a tensor whose offset in the bucket is not a multiple
of its element size; such a tensor therefore starts the next broadcast.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from sgpo_async.weights.manifest import Manifest, TensorEntry

BROADCAST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Broadcast:
    """The tensors of one broadcast, in order; the fields are those of SGLang's /update_weights_from_distributed."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # torch names
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class BroadcastPlan:
    """The broadcasts of one version, in order."""

    version: int
    digest: str  # `weights.digest` of the tensors
    broadcasts: tuple[Broadcast, ...]

    @property
    def fingerprint(self) -> str:
        """A digest that is equal for two plans exactly if version, content, names, dtypes, shapes and division are."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.to_plain()).encode())

    def to_plain(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> BroadcastPlan:
        """The inverse of `to_plain`; also accepts the result of a JSON round trip."""
        broadcasts = tuple(
            Broadcast(tuple(b["names"]), tuple(b["dtypes"]), tuple(tuple(s) for s in b["shapes"]))
            for b in plain["broadcasts"]
        )
        return cls(plain["version"], plain["digest"], broadcasts)


def plan_of(manifest: Manifest, limit: int = BROADCAST_BYTES) -> BroadcastPlan:
    """Divide a version into broadcasts of at most `limit` bytes each; a larger tensor gets its own broadcast."""
    broadcasts = tuple(
        Broadcast(tuple(t.name for t in piece), tuple(t.dtype for t in piece), tuple(t.shape for t in piece))
        for piece in cut(manifest.tensors, limit)
    )
    return BroadcastPlan(manifest.version, manifest.digest, broadcasts)


def cut(tensors: Iterable[TensorEntry], limit: int = BROADCAST_BYTES) -> Iterator[list[TensorEntry]]:
    """Divide `tensors` in the same way as `plan_of`, and yield the entries of each broadcast."""
    piece: list[TensorEntry] = []
    nbytes = 0
    for tensor in tensors:
        if piece and (nbytes + tensor.nbytes > limit or nbytes % _element_bytes(tensor)):
            yield piece
            piece, nbytes = [], 0
        piece.append(tensor)
        nbytes += tensor.nbytes
    if piece:
        yield piece


def _element_bytes(tensor: TensorEntry) -> int:
    numel = math.prod(tensor.shape)
    return tensor.nbytes // numel if numel else 16  # for an empty tensor use 16: no element type is larger

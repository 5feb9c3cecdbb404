"""Write a weight store: one version at a time, into the slot that does not hold the newest version.

    publish(version, tensors)     from tensors, one after another
    begin(version), commit        from shares of several processes (in the learner, see `weights.shares`)
    receive(manifest)             from buckets, in any order (in the weight receiver on an inference node)

A version becomes visible through its record, which is written last. If the writer is killed or fails, the newest
version is unchanged, and the next writer continues in the other slot: with `receive` after the buckets that are already
there, if it is the same version.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from sgpo_async.errors import WeightsError
from sgpo_async.weights import store_layout
from sgpo_async.weights.digest import combine, dtype_name, tensor_bytes
from sgpo_async.weights.manifest import BucketSums, Manifest, TensorEntry, aligned
from sgpo_async.weights.store_layout import PAGE, IncomingRecord, Record

if TYPE_CHECKING:
    import torch

BUCKET_BYTES = 16 * 2**20
BLOCK_BYTES = 2**20


class StoreWriter:
    """The only writer of a store; it can continue a store that an earlier writer left."""

    def __init__(self, path: str | Path, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        assert bucket_bytes > 0
        self.path = str(path)
        self.bucket_bytes = bucket_bytes
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        with store_layout.guarded(f"open {path}"):
            self._fd = os.open(self.path, flags, 0o600)
        header = store_layout.read_header(self._fd)
        self._stride, self._interrupted = header.stride, header.incoming
        self._newest: Manifest | None = None
        self._slot = 0
        if header.complete:
            newest = header.complete[-1]
            data = store_layout.read(self._fd, newest.manifest_nbytes, newest.manifest)
            self._newest = Manifest.from_bytes(bytes(data))
            self._slot = 1 - newest.slot

    @property
    def place(self) -> str:
        """A path at which other processes of this machine find the store as long as this process has it open."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def contact(self) -> tuple[str, bytes]:
        """`place`; no secret is needed there, because only processes of this user can open it."""
        return self.place, b""

    @property
    def newest(self) -> Manifest | None:
        """The newest complete version; None if there is none."""
        return self._newest

    @property
    def version(self) -> int | None:
        """The number of the newest complete version; None if there is none."""
        return self._newest.version if self._newest else None

    def publish(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Manifest:
        """Copy `named_tensors` into the store, one at a time, and make them visible as `version`.

        The first publication fixes names, dtypes, shapes and order. Raises WeightsError if a later publication
        differs in these, if `version` is not above the newest version, or if there is not enough space; the
        newest version is then unchanged.
        """
        self._check_version(version)
        self._begin()
        start = self._start()
        sums = BucketSums(self.bucket_bytes)
        entries: list[TensorEntry] = []
        hashes: list[bytes] = []
        for name, tensor in named_tensors:
            data = tensor_bytes(tensor)
            entry = TensorEntry(name, dtype_name(tensor), tuple(tensor.shape), sums.offset, len(data))
            self._check_entry(version, len(entries), entry)
            entries.append(entry)
            hashes.append(xxhash.xxh3_128_digest(data))
            for part in (data, bytes(aligned(len(data)) - len(data))):
                store_layout.write(self._fd, part, start + sums.offset)
                sums.update(part)
        self._check_names(version, [e.name for e in entries])
        manifest = Manifest(
            version=version,
            digest=combine((e.name, e.dtype, e.shape, h) for e, h in zip(entries, hashes, strict=True)),
            published_at=time.time(),
            nbytes=sums.offset,
            tensors=tuple(entries),
            buckets=sums.buckets(),
        )
        self._finish(manifest)
        return manifest

    def receive(self, manifest: Manifest) -> Incoming:
        """Start to write the version that `manifest` describes, or continue it after an interrupted writer.

        Raises WeightsError for the same reasons as `publish`.
        """
        self._check(manifest.version, manifest.tensors)
        encoded = manifest.to_bytes()
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is not None and self._is_of(interrupted.record, encoded):
            return Incoming(self, manifest, interrupted)
        self._begin()
        if self._newest is None:
            self._lay_out(manifest.nbytes, encoded)
        record = self._record(manifest, encoded)
        store_layout.write(self._fd, encoded, record.manifest)
        return Incoming(self, manifest, IncomingRecord(record, 0))

    def begin(self, version: int, tensors: Sequence[TensorEntry]) -> int:
        """Start a version that other processes write, too; return where in the file its data begin.

        It becomes visible by `commit`. Raises WeightsError for the same reasons as `publish`.
        """
        self._check(version, tensors)
        self._begin()
        return self._start()

    def commit(self, manifest: Manifest) -> None:
        """Make the version that `begin` has started visible; all its data must have been written."""
        self._finish(manifest)

    def clear(self) -> None:
        """Give up all versions: what follows may be of another model, and has versions of its own."""
        self._newest, self._interrupted, self._slot = None, None, 0
        for slot in range(store_layout.SLOTS):
            store_layout.erase_record(self._fd, slot)
        store_layout.erase_incoming(self._fd)

    def close(self) -> None:
        """Close the store; it stays readable."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _start(self) -> int:
        return PAGE + self._slot * self._stride

    def _begin(self) -> None:
        """Give up what the slot holds, also a version that an earlier writer has not completed."""
        if self._newest is None:
            self._stride = 0  # the file holds no complete version: lay out the slots from PAGE on
        store_layout.erase_incoming(self._fd)
        store_layout.erase_record(self._fd, self._slot)

    def _lay_out(self, nbytes: int, encoded: bytes) -> None:
        self._stride = store_layout.stride_for(nbytes, len(encoded))
        store_layout.write_header(self._fd, self._stride)

    def _record(self, manifest: Manifest, encoded: bytes) -> Record:
        """Where the version that is being written lies."""
        start = self._start()
        offset = start + aligned(manifest.nbytes)
        assert offset + len(encoded) <= start + self._stride
        return Record(self._slot, manifest.version, start, offset, len(encoded))

    def _is_of(self, record: Record, encoded: bytes) -> bool:
        """Whether an earlier writer has begun this slot with the version of this manifest."""
        if record.slot != self._slot or record.manifest_nbytes != len(encoded):
            return False
        return store_layout.read(self._fd, record.manifest_nbytes, record.manifest) == encoded

    def _finish(self, manifest: Manifest) -> None:
        """Write the manifest of a version whose data is in the slot, and make it visible."""
        encoded = manifest.to_bytes()
        if self._newest is None:
            self._lay_out(manifest.nbytes, encoded)
        record = self._record(manifest, encoded)
        store_layout.write(self._fd, encoded, record.manifest)
        self._show(manifest, record)

    def _show(self, manifest: Manifest, record: Record) -> None:
        store_layout.write_record(self._fd, record)
        self._newest = manifest
        self._slot = 1 - self._slot

    def _check(self, version: int, tensors: Sequence[TensorEntry]) -> None:
        self._check_version(version)
        for index, entry in enumerate(tensors):
            self._check_entry(version, index, entry)
        self._check_names(version, [entry.name for entry in tensors])

    def _check_version(self, version: int) -> None:
        newest = self.version
        if newest is not None and version <= newest:
            raise WeightsError(f"weights version must be > {newest}, the newest version in the store, got {version}")

    def _check_entry(self, version: int, index: int, entry: TensorEntry) -> None:
        if self._newest is None:
            return
        known = self._newest.tensors
        if index < len(known) and known[index] == entry:
            return
        expected = _describe(known[index]) if index < len(known) else f"absent, as the store has {len(known)} tensors"
        raise WeightsError(
            f"weights version {version}: tensor {index} must be {expected}, got {_describe(entry)}; "
            f"publish the same parameters in the same order"
        )

    def _check_names(self, version: int, names: list[str]) -> None:
        if len(set(names)) < len(names):
            duplicate = next(name for name in names if names.count(name) > 1)
            raise WeightsError(f"weights version {version}: tensor names must be unique, got {duplicate!r} twice")
        known = len(self._newest.tensors) if self._newest else len(names)
        if len(names) != known:
            raise WeightsError(
                f"weights version {version}: the number of tensors must be {known}, got {len(names)}; "
                f"publish the same parameters in the same order"
            )


class Incoming:
    """A version that is received bucket by bucket, from the first to the last.

    Readers see its buckets as they come (`StoreReader.bucket_or_delta`), and the version after `commit`.
    """

    def __init__(self, writer: StoreWriter, manifest: Manifest, record: IncomingRecord) -> None:
        self._writer, self._manifest, self._record = writer, manifest, record.record
        self.verified = record.verified  # number of buckets that are in the store
        store_layout.write_incoming(writer._fd, record)

    def put(self, index: int, data: bytes | bytearray | memoryview) -> None:
        """Write bucket `index`, the next one. Raises WeightsError, and misses it, if its checksum does not match."""
        assert index == self.verified, f"bucket {self.verified} comes next, not {index}"
        view, fd, state = memoryview(data), self._writer._fd, xxhash.xxh3_64()
        start = self._record.data + self._manifest.buckets[index].offset
        self._manifest.check_size(index, len(view))
        for offset in range(0, len(view), BLOCK_BYTES):  # hashed and written while it is in the core's cache
            block = view[offset : offset + BLOCK_BYTES]
            state.update(block)
            store_layout.write(fd, block, start + offset)
        self._manifest.check_sum(index, state.intdigest())
        self.verified += 1
        store_layout.write_incoming(fd, IncomingRecord(self._record, self.verified))

    @property
    def base(self) -> int | None:
        """The version that the store holds already; its tensors lie at the same offsets. None if there is none."""
        return self._writer.version

    def base_bytes(self, index: int) -> bytearray:
        """The bytes of version `base` where bucket `index` lies."""
        writer, bucket = self._writer, self._manifest.buckets[index]
        start = PAGE + (1 - writer._slot) * writer._stride
        return store_layout.read(writer._fd, bucket.nbytes, start + bucket.offset)

    def commit(self) -> None:
        """Make the version visible to readers; every bucket must have been written."""
        missing = len(self._manifest.buckets) - self.verified
        assert not missing, f"{missing} buckets are missing"
        self._writer._show(self._manifest, self._record)
        store_layout.erase_incoming(self._writer._fd)


def _describe(entry: TensorEntry) -> str:
    return f"{entry.name!r} {entry.dtype} {list(entry.shape)}"

"""Read a weight store while another process writes it, without a lock.

The reader copies the data first and validates afterwards: the copy is complete if its slot still holds the version.

A version that is still arriving can be passed on bucket by bucket: `offered`, `encoded_manifest` and `bucket_or_delta`
know it; for all other methods a version exists when it is complete.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sgpo_async.errors import Superseded
from sgpo_async.weights import store_layout
from sgpo_async.weights.delta import encode
from sgpo_async.weights.manifest import Bucket, Manifest, TensorEntry
from sgpo_async.weights.store_layout import Header, Record

if TYPE_CHECKING:
    import torch


class StoreReader:
    """Reads the store at a path; the store need not exist yet. Methods may be called from any thread."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._fd = -1
        self._cached: Manifest | None = None
        self._mapped: memoryview | None = None

    def version(self) -> int | None:
        """Return the newest complete version, or None if there is none."""
        records = self._header().complete
        return records[-1].version if records else None

    def offered(self) -> int | None:
        """Return the newest version of which buckets can be passed on, complete or not, or None if there is none."""
        newest = self._newest()
        return newest.version if newest else None

    def manifest(self) -> Manifest | None:
        """Return the manifest of the newest complete version, or None if there is none.

        Raises Superseded if it is overwritten while it is read, and WeightsError if it is damaged.
        """
        records = self._header().complete
        return self._manifest(records[-1]) if records else None

    def encoded_manifest(self) -> bytes | None:
        """Return the manifest of the version that `offered` names, undecoded and unchecked, for the receiver."""
        newest = self._newest()
        return self._encoded(newest) if newest else None

    def manifest_of(self, version: int) -> Manifest:
        """Return the manifest of one version. Raises Superseded if the store no longer holds it."""
        return self._manifest(self._record(version))

    def bucket(self, version: int, index: int) -> bytearray:
        """Return the bytes of one bucket, unchecked (see `Manifest.check`).

        Raises Superseded if the store no longer holds `version`.
        """
        record = self._record(version)
        bucket = self._manifest(record).buckets[index]
        data = store_layout.read(self._fd, bucket.nbytes, record.data + bucket.offset)
        self._check_unchanged(record)
        return data

    def bucket_or_delta(self, version: int, index: int, base: int | None) -> tuple[memoryview, bool] | None:
        """Return one bucket, or its difference to the same bytes of version `base`, and whether it is that.

        None if the version is still arriving and this bucket is not here yet. It is the whole bucket without a base, if
        the store does not hold it, or if the difference would not be smaller; see `weights.delta`. Raises Superseded if
        the store no longer holds `version`.

        A whole bucket is not copied: if the version is overwritten while it is sent, it will not match its checksum.
        """
        header = self._header()
        record = next((own for own in header.complete if own.version == version), None)
        if record is None:
            incoming = header.incoming
            if incoming is None or incoming.record.version != version:
                raise _superseded(version)
            if index >= incoming.verified:
                return None
            record = incoming.record
        bucket = self._manifest(record).buckets[index]
        new = self._view(header, record, bucket)
        earlier = None if base is None else next((own for own in header.complete if own.version == base), None)
        if earlier is None:
            return new, False
        delta = encode(self._view(header, earlier, bucket), new)
        if delta is None or earlier not in self._header().complete:
            return new, False
        return memoryview(bytearray(delta)), True

    def _view(self, header: Header, record: Record, bucket: Bucket) -> memoryview:
        """The bytes of a bucket in the file, read-only: a mapping that could be written would count as memory in use.

        Raises WeightsError if the file cannot be mapped.
        """
        end = store_layout.PAGE + store_layout.SLOTS * header.stride
        if self._mapped is None or len(self._mapped) != end:
            with store_layout.guarded("map the file"):
                self._mapped = memoryview(mmap.mmap(self._fd, end, access=mmap.ACCESS_READ))
        start = record.data + bucket.offset
        return self._mapped[start : start + bucket.nbytes]

    def copy(self, version: int, tensors: Iterable[TensorEntry], into: memoryview) -> None:
        """Copy the bytes of `tensors` of `version` into `into`, one after another without gaps.

        Raises Superseded if the version is overwritten before or during the copy.
        """
        record = self._record(version)
        done = 0
        for tensor in tensors:
            store_layout.read_into(self._fd, into[done : done + tensor.nbytes], record.data + tensor.offset)
            done += tensor.nbytes
        self._check_unchanged(record)

    def tensors(self, version: int) -> dict[str, torch.Tensor]:
        """Copy all of `version` to the CPU. Raises Superseded if it is overwritten before or during the copy."""
        import torch

        record = self._record(version)
        manifest = self._manifest(record)
        data = torch.empty(manifest.nbytes, dtype=torch.uint8)
        store_layout.read_into(self._fd, data.numpy().data, record.data)
        self._check_unchanged(record)
        return {
            t.name: data[t.offset : t.offset + t.nbytes].view(getattr(torch, t.dtype)).reshape(t.shape)
            for t in manifest.tensors
        }

    def close(self) -> None:
        """Close the store."""
        self._mapped = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _header(self) -> Header:
        if self._fd < 0:
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError, ProcessLookupError):  # the last two: its process is ending
                return Header()
        return store_layout.read_header(self._fd)

    def _newest(self) -> Record | None:
        """Where the newest version lies, complete or not."""
        header = self._header()
        records = [*header.complete, *([header.incoming.record] if header.incoming else [])]
        return max(records, key=lambda record: record.version, default=None)

    def _record(self, version: int) -> Record:
        for record in self._header().complete:
            if record.version == version:
                return record
        raise _superseded(version)

    def _check_unchanged(self, record: Record) -> None:
        header = self._header()
        if record not in header.complete and (header.incoming is None or header.incoming.record != record):
            raise Superseded(f"weights version {record.version}: overwritten while it was read; read the newest one")

    def _manifest(self, record: Record) -> Manifest:
        cached = self._cached
        if cached is not None and cached.version == record.version:
            return cached
        self._cached = manifest = Manifest.from_bytes(self._encoded(record))
        return manifest

    def _encoded(self, record: Record) -> bytes:
        data = bytes(store_layout.read(self._fd, record.manifest_nbytes, record.manifest))
        self._check_unchanged(record)
        return data


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """The tensors of one version, each copied on access, so that memory never holds a second copy of the model."""

    def __init__(self, reader: StoreReader, version: int) -> None:
        """Raises Superseded if the store no longer holds `version`."""
        self._reader, self._version = reader, version
        self._entries = {t.name: t for t in reader.manifest_of(version).tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Copy one tensor to the CPU. Raises Superseded if the version is overwritten before or during the copy."""
        import torch

        entry = self._entries[name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._reader.copy(self._version, [entry], data.numpy().data)
        return data.view(getattr(torch, entry.dtype)).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _superseded(version: int) -> Superseded:
    return Superseded(f"weights version {version}: no longer in the store; read the newest version")

"""The file format of a weight store: a header page, then two slots that hold one version each.

    page 0      magic, stride │ record of slot 0 │ record of slot 1 │ record of the incoming version
    slot k      at PAGE + k * stride: data, then the encoded manifest

A record states which complete version its slot holds, and at which offsets. The writer erases the record, writes data
and manifest, and only then writes the new record. This is a sequence lock with the version as sequence number, because
versions never repeat. A reader copies what it needs and then checks that the record is unchanged. Readers and writer
never wait for each other, so a killed process cannot block another one. A slot whose writer was killed counts as empty.
A record has its own checksum, so that a partly written record is recognised as invalid.

A version that arrives bucket by bucket has a record of its own while it is incomplete. It counts the buckets that are
already here and verified: they can be passed on, and if the writer is killed, the next one continues after them.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import xxhash

from sgpo_async.errors import WeightsError
from sgpo_async.weights.manifest import aligned

PAGE = 4096
MAGIC = b"SGPOWTS2"
SLOTS = 2
_HEADER = struct.Struct("<8sQ")  # magic, stride
_RECORD = struct.Struct("<qQQQ")  # version, data offset, manifest offset, manifest bytes
_RECORD_BYTES = 64
_INCOMING = struct.Struct("<QqQQQQ")  # slot, then as _RECORD, then the number of verified buckets
_SLACK = 256  # spare bytes, because the numbers in later manifests may be longer


@dataclass(frozen=True)
class Record:
    """The version in one slot and its offsets, which count from the start of the file."""

    slot: int
    version: int
    data: int
    manifest: int
    manifest_nbytes: int


@dataclass(frozen=True)
class IncomingRecord:
    """A version that is not complete yet: its buckets below `verified` are in the slot that `record` describes."""

    record: Record
    verified: int


@dataclass(frozen=True)
class Header:
    """What a store holds; without a version if it is not initialised."""

    stride: int = 0  # 0: the store is not initialised
    complete: tuple[Record, ...] = ()  # oldest first
    incoming: IncomingRecord | None = None


def read_header(fd: int) -> Header:
    """Read what the store holds."""
    page = os.pread(fd, PAGE, 0)
    if len(page) < PAGE:
        return Header()
    magic, stride = _HEADER.unpack_from(page)
    if magic != MAGIC:
        return Header()
    records = [
        Record(slot, *fields) for slot in range(SLOTS) if (fields := _unpack(_RECORD, page, _record_offset(slot)))
    ]
    incoming = None
    if fields := _unpack(_INCOMING, page, _record_offset(SLOTS)):
        *record, verified = fields
        incoming = IncomingRecord(Record(*record), verified)
    return Header(stride, tuple(sorted(records, key=lambda record: record.version)), incoming)


def write_header(fd: int, stride: int) -> None:
    """Initialise the store and reserve the space of both slots, so that no later version meets a full disk.

    A receiver does so before its first version arrives; a publisher after its first one, which tells it the size.
    """
    with guarded("reserve space"):
        os.posix_fallocate(fd, 0, PAGE + SLOTS * stride)
    write(fd, _HEADER.pack(MAGIC, stride), 0)


def write_record(fd: int, record: Record) -> None:
    """Make the version in a slot visible to readers."""
    body = _RECORD.pack(record.version, record.data, record.manifest, record.manifest_nbytes)
    write(fd, body + xxhash.xxh3_64_digest(body), _record_offset(record.slot))


def erase_record(fd: int, slot: int) -> None:
    """Mark a slot as empty."""
    write(fd, bytes(_RECORD_BYTES), _record_offset(slot))


def write_incoming(fd: int, incoming: IncomingRecord) -> None:
    """Let readers see the verified buckets of a version that is not complete yet."""
    own = incoming.record
    body = _INCOMING.pack(own.slot, own.version, own.data, own.manifest, own.manifest_nbytes, incoming.verified)
    write(fd, body + xxhash.xxh3_64_digest(body), _record_offset(SLOTS))


def erase_incoming(fd: int) -> None:
    """State that no version is incomplete."""
    erase_record(fd, SLOTS)


def stride_for(data_nbytes: int, manifest_nbytes: int) -> int:
    """Compute the size of one slot in bytes."""
    return aligned(aligned(data_nbytes) + manifest_nbytes + _SLACK, PAGE)


def read(fd: int, nbytes: int, offset: int) -> bytearray:
    """Read `nbytes`, or fewer if the file ends before."""
    buffer = bytearray(nbytes)
    return buffer[: read_into(fd, memoryview(buffer), offset)] if nbytes else buffer


def read_into(fd: int, view: memoryview, offset: int) -> int:
    """Read from `offset` into `view` until it is full or the file ends; return the number of bytes read."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`. Raises WeightsError if there is not enough space."""
    view = memoryview(data)
    with guarded("write"):
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turn an OSError of the file operation `what` into a WeightsError with a remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
        remedy = "; free some memory or disk space" if full else ""
        raise WeightsError(f"weight store: cannot {what}: {error.strerror}{remedy}") from None


def _record_offset(slot: int) -> int:
    return 64 + slot * _RECORD_BYTES


def _unpack(fields: struct.Struct, page: bytes, offset: int) -> tuple[int, ...] | None:
    """The fields of the record at `offset`; None if it is erased or was written only in part."""
    body = page[offset : offset + fields.size]
    checksum = page[offset + fields.size : offset + fields.size + 8]
    return fields.unpack(body) if xxhash.xxh3_64_digest(body) == checksum else None

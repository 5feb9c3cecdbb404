"""The bytes of a weight store: a header page, then two slots that hold one version each.

    page 0      magic, stride │ record of slot 0 │ record of slot 1
    slot k      at PAGE + k * stride: data, then the encoded manifest

A record says which version its slot holds whole, and where. Its writer erases it, writes data and manifest,
and only then writes it anew: a sequence lock whose sequence is the version, since versions never repeat. A
reader takes what it needs and then looks whether the record is still the same. Nobody ever waits for anybody,
so whoever is killed, nobody hangs; a slot whose writer was killed simply holds nothing. A record carries its
own checksum, so that half of one is none.
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
MAGIC = b"SGPOWTS1"
SLOTS = 2
_HEADER = struct.Struct("<8sQ")  # magic, stride
_RECORD = struct.Struct("<qQQQ")  # version, data offset, manifest offset, manifest bytes
_RECORD_BYTES = 64
_SLACK = 256  # room for the manifest's numbers to grow


@dataclass(frozen=True)
class Record:
    """What one slot holds; offsets count from the start of the file."""

    slot: int
    version: int
    data: int
    manifest: int
    manifest_nbytes: int


def read_header(fd: int) -> tuple[int, list[Record]]:
    """Stride (0: not yet made) and the records of the slots that hold a whole version, oldest first."""
    page = os.pread(fd, PAGE, 0)
    if len(page) < PAGE:
        return 0, []
    magic, stride = _HEADER.unpack_from(page)
    if magic != MAGIC:
        return 0, []
    records = [_unpack(slot, page[_place(slot) : _place(slot) + _RECORD_BYTES]) for slot in range(SLOTS)]
    return stride, sorted((r for r in records if r is not None), key=lambda r: r.version)


def write_header(fd: int, stride: int) -> None:
    """Make the store: reserve both slots, so that a full disk shows now and not at a later version."""
    with guarded("make room"):
        os.posix_fallocate(fd, 0, PAGE + SLOTS * stride)
    write(fd, _HEADER.pack(MAGIC, stride), 0)


def write_record(fd: int, record: Record) -> None:
    """Make a slot's version visible."""
    body = _RECORD.pack(record.version, record.data, record.manifest, record.manifest_nbytes)
    write(fd, body + xxhash.xxh3_64_digest(body), _place(record.slot))


def erase_record(fd: int, slot: int) -> None:
    """Declare that a slot holds nothing."""
    write(fd, bytes(_RECORD_BYTES), _place(slot))


def stride_for(data_nbytes: int, manifest_nbytes: int) -> int:
    """Bytes of one slot."""
    return aligned(aligned(data_nbytes) + manifest_nbytes + _SLACK, PAGE)


def read(fd: int, nbytes: int, offset: int) -> bytearray:
    """Read `nbytes`; fewer if the file ends before."""
    buffer = bytearray(nbytes)
    return buffer[: read_into(fd, memoryview(buffer), offset)] if nbytes else buffer


def read_into(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset` on; returns how many bytes the file had."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def write(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`. Raises WeightsError if there is no room."""
    view = memoryview(data)
    with guarded("write"):
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Turn an OSError of a file operation into a WeightsError with its remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
        remedy = "; free some memory or disk space" if full else ""
        raise WeightsError(f"weight store: cannot {what}: {error.strerror}{remedy}") from None


def _place(slot: int) -> int:
    return 64 + slot * _RECORD_BYTES


def _unpack(slot: int, data: bytes) -> Record | None:
    body, checksum = data[: _RECORD.size], data[_RECORD.size : _RECORD.size + 8]
    if xxhash.xxh3_64_digest(body) != checksum:
        return None
    return Record(slot, *_RECORD.unpack(body))

"""The ranks that hold one whole set of shards write a version into one store, in threads beside the training.

    every rank                                                rank 0 also
    -                                                         erase the record of the version before the newest
    ── round ──
    write a part of its own share; a rank that cannot         write the parts that were sent
    open the store, on another machine, sends it
    ── round ──  until every share is written
    -                                                         read back and hash a part of the version
    ── round ──  until the whole version is read              compare the hashes of shares, make the version visible
    ── round ──

A round ends with a collective in which every rank says whether it has failed. So all ranks raise the same error, and
the version before stays in service. No round lasts long, so the timeout of the collectives counts the time without
progress. A rank that is killed closes its connections, which ends the round on the others. They all use a process group
of their own, so they cannot interleave with the collectives of the training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sgpo_async.errors import WeightsError
from sgpo_async.learner.policy import rows_on
from sgpo_async.weights import Manifest, TensorEntry
from sgpo_async.weights.shares import ReadBack, share_of, size_of, write_padding, write_part
from sgpo_async.weights.store_file import machine
from sgpo_async.weights.store_layout import guarded

PART_BYTES = 64 * 2**20  # of each share, written or sent in one round
READ_BYTES = 512 * 2**20  # of the version, read back in one round
ROUND_S = 600.0  # longest wait for another rank in a round; for the first one, rank 0 may wait for an absent hub before

Value = TypeVar("Value")


class Store(Protocol):
    """The part of `weights.StoreWriter` that publishing uses."""

    @property
    def place(self) -> str:
        """A path at which other processes of this machine find the file as long as this process lives."""
        ...

    @property
    def contact(self) -> tuple[str, bytes]:
        """Where the hub finds the store as long as this process lives: a path, or tcp://HOST:PORT with a secret."""
        ...

    def begin(self, version: int, tensors: Sequence[TensorEntry]) -> int:
        """Start a version; return where in the file its data begin. Raises WeightsError."""
        ...

    def commit(self, manifest: Manifest) -> None:
        """Make the version visible. Raises WeightsError."""
        ...

    def close(self) -> None:
        """Free the store's resources."""


class ShareGroup:
    """The ranks over which the parameters on rank 0 are sharded; the shares are those of FSDP2.

    Attributes:
        member: whether this rank is one of them.
        rounds: how many rounds have ended, of all versions.
    """

    def __init__(self, mesh: DeviceMesh, store: Store | None, tensors: Sequence[TensorEntry]) -> None:
        """A collective of all ranks. `store` is None on all but rank 0; `tensors` is what every version has."""
        ranks = mesh.size(mesh.ndim - 1)
        self._members: list[int] = mesh.mesh.reshape(-1, ranks)[0].tolist()
        self._group = dist.new_group(self._members, backend="gloo", timeout=timedelta(seconds=ROUND_S))
        self.member, self.rounds = dist.get_rank() in self._members, 0
        self._store, self._tensors = store, tensors
        self._manifest: Manifest | None = None  # of the last version, on rank 0
        if self.member:
            own = range(ranks)
            self._shares = [share_of(tensors, partial(rows_on, rank=rank, ranks=ranks)) for rank in own]
            self._rank = dist.get_rank(self._group)
            self._fd = self._open()
            self._senders = [rank for rank, fd in enumerate(self._gathered(self._fd)) if fd < 0]
            self._arriving = torch.empty(PART_BYTES if store and self._senders else 0, dtype=torch.uint8)

    def publish(self, version: int, share: Tensor) -> Manifest | None:
        """Write `share`, the bytes of this rank, and return when the version is visible. A collective of the members.

        Returns the manifest on rank 0, None on the others. Raises WeightsError on all of them if one fails or is gone.
        """
        try:
            data = self._round(version, partial(self._begin, version))[0]
            hashes = self._write(version, data, share)
            reading = self._read_back(version, data, hashes)
            while not self._round(version, partial(next, reading, True))[0]:
                pass
            return self._manifest
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise WeightsError(f"weights version {version}: another rank is gone or stuck ({reason})") from None

    def _open(self) -> int:
        """Open rank 0's store; -1 if it is on another machine, or not open to this process."""
        where: list[Any] = [(machine(), self._store.place) if self._store else None]
        dist.broadcast_object_list(where, src=self._members[0], group=self._group)
        host, place = where[0]
        if self._store:
            with guarded(f"open {place}"):
                return os.open(place, os.O_RDWR | os.O_CLOEXEC)
        if host != machine():
            return -1
        try:
            return os.open(place, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return -1

    def _round(self, version: int, work: Callable[[], Value]) -> list[Value]:
        """Do this rank's work; return what it returned on each rank. Raises WeightsError on all ranks if it failed."""
        failure, value = "", None
        try:
            value = work()
        except WeightsError as error:
            failure = str(error)
        found = self._gathered((failure, value))
        self.rounds += 1
        for rank, (failure, _) in enumerate(found):
            if failure:
                raise WeightsError(f"weights version {version}: not published (rank {rank}: {failure})")
        return [value for _, value in found]

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * len(self._members)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _begin(self, version: int) -> int:
        if self._store is None:
            return 0
        data = self._store.begin(version, self._tensors)
        write_padding(self._fd, data, self._tensors)
        return data

    def _write(self, version: int, data: int, share: Tensor) -> list[int]:
        """Write all shares; return the hash of each."""
        state = xxhash.xxh3_64()

        def part(first: int) -> int:
            own = share[first : first + PART_BYTES]
            state.update(own.numpy().data)
            self._put(data, first, own)
            return state.intdigest()

        assert len(share) == size_of(self._shares[self._rank])
        hashes: list[int] = []
        for first in range(0, max(1, *map(size_of, self._shares)), PART_BYTES):
            hashes = self._round(version, partial(part, first))
        return hashes

    def _put(self, data: int, first: int, own: Tensor) -> None:
        """Write or send the part of this rank's share that begins at `first`; rank 0 also writes what it is sent.

        It receives every part before it raises an error, because the rank that sends one waits for that.
        """
        if self._fd < 0:
            if len(own):
                dist.send(own, self._members[0], group=self._group)
            return
        failures: list[WeightsError] = []
        for rank, part in self._parts(first, own):
            try:
                write_part(self._fd, data, self._shares[rank], first, part.numpy().data)
            except WeightsError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _parts(self, first: int, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the parts that this rank writes, with their ranks; each is valid until the next one."""
        yield self._rank, own
        for rank in self._senders if self._store else ():
            size = min(PART_BYTES, size_of(self._shares[rank]) - first)
            if size > 0:
                dist.recv(self._arriving[:size], self._members[rank], group=self._group)
                yield rank, self._arriving[:size]

    def _read_back(self, version: int, data: int, hashes: list[int]) -> Iterator[bool]:
        """Verify the version and make it visible; yield False after each part that is read, on other ranks for ever."""
        while self._store is None:
            yield False
        reading, read = ReadBack(self._fd, data, self._tensors, self._shares), 0
        for nbytes in reading.blocks():
            read += nbytes
            if read >= READ_BYTES:
                read = 0
                yield False
        for rank, (found, written) in enumerate(zip(reading.hashes(), hashes, strict=True)):
            if found != written:
                raise WeightsError(f"the store does not hold what rank {rank} has written; no one else may write to it")
        self._manifest = reading.manifest(version)
        self._store.commit(self._manifest)

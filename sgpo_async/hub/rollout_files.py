"""The rollouts to which the hub's journal refers, in files beside it: hub.journal.rollouts.1, ...

    add(rollout, frames) ─▶ place, sync     appended to the newest file; on disk after `sync`
    place_of(rollout) ────▶ place           where a rollout is that was added or read
    read(place) ──────────▶ rollout
    keep(places)                            begins a new file, and deletes the files that hold none of these

A rollout is written once, when it arrives. Only if less than NEEDED_SHARE of its file is still needed, it is written
again, to the newest file, so that the old one can be deleted. So the files take little more than the rollouts that the
hub holds, divided by NEEDED_SHARE, and what arrived since the last `keep`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

from sgpo_async.wire import decode, encode
from sgpo_async.wire.records import Rollout

PREFIX = "hub.journal.rollouts."
NEEDED_SHARE = 0.25
ANY_SIZE = 2**63  # for `decode`: the size was checked when the message arrived
_BUFFER_BYTES = 2**20

Place = tuple[int, int, tuple[int, ...]]
"""The number of the file, the offset in it, and the sizes of the message's frames, in bytes."""


class RolloutFiles:
    """Every method raises OSError if the disk is full or a file cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes = {number: self._path(number).stat().st_size for number in _numbers(self._folder)}
        self._needed = dict(self._sizes)  # bytes of each file that were needed at the last `keep`
        self._newest = max(self._sizes, default=0) + 1
        self._file: io.BufferedWriter | None = None  # the newest file, once something is added
        self._places: dict[int, tuple[Place, Rollout]] = {}  # by id of the rollout, which stays alive here

    def skip(self, folder: Path) -> None:
        """Begin no file with a number that a file in `folder` has: there are files that were deleted here."""
        self._newest = max([self._newest, *(number + 1 for number in _numbers(folder))])

    def add(self, rollout: Rollout, frames: Sequence[bytes]) -> Place:
        """Append a rollout, whose message has these frames."""
        file = self._file or self._begin()
        offset = self._sizes[self._newest]
        for frame in frames:
            file.write(frame)
        place = (self._newest, offset, tuple(len(frame) for frame in frames))
        self._sizes[self._newest] += sum(place[2])
        self._places[id(rollout)] = place, rollout
        return place

    def sync(self) -> None:
        """Return when all that was added is on disk."""
        if self._file:
            self._file.flush()
            os.fdatasync(self._file.fileno())

    def place_of(self, rollout: Rollout) -> Place:
        """Where this very object is; it is added if it is new, or if its file is hardly needed any more."""
        place, _ = self._places.get(id(rollout), (None, None))
        if place and self._needed.get(place[0], self._sizes[place[0]]) >= NEEDED_SHARE * self._sizes[place[0]]:
            return place
        return self.add(rollout, encode(rollout))

    def read(self, place: Place) -> Rollout:
        """The rollout at `place`."""
        number, offset, sizes = place
        with self._path(number).open("rb") as file:
            file.seek(offset)
            frames = [file.read(size) for size in sizes]
        rollout = cast(Rollout, decode(frames, max_bytes=ANY_SIZE))
        self._places[id(rollout)] = place, rollout
        return rollout

    def keep(self, places: Collection[Place]) -> None:
        """Forget all rollouts but these."""
        self.close()
        needed = dict.fromkeys(_numbers(self._folder), 0)
        for number, _, sizes in places:
            needed[number] += sum(sizes)
        for number in [number for number, size in needed.items() if not size]:
            self._path(number).unlink()
            del needed[number]
            self._sizes.pop(number, None)
        self._needed = needed
        self._places = {key: held for key, held in self._places.items() if held[0] in places}
        self._newest += 1

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(self._sizes.values())

    def close(self) -> None:
        """Close the newest file."""
        if self._file:
            file, self._file = self._file, None
            file.close()

    def _begin(self) -> io.BufferedWriter:
        descriptor = os.open(self._path(self._newest), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        folder = os.open(self._folder, os.O_RDONLY)  # a power failure must not lose the name of the file
        os.fsync(folder)
        os.close(folder)
        self._file = cast(io.BufferedWriter, os.fdopen(descriptor, "wb", buffering=_BUFFER_BYTES))
        self._sizes[self._newest] = 0
        return self._file

    def _path(self, number: int) -> Path:
        return self._folder / f"{PREFIX}{number}"


def _numbers(folder: Path) -> list[int]:
    return [int(path.name.removeprefix(PREFIX)) for path in folder.glob(f"{PREFIX}*")]

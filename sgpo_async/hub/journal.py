"""The hub's journal: its last saved state and the events since then, in an SQLite database in the run's folder.

    append(event) ... commit ──▶ entries      one transaction, on disk before any effect of its events is carried out
    save(state) ───────────────▶ state, rollouts; entries are deleted
    read ──────────────────────▶ state, rollouts, entries: the core of a killed hub, see `hub.recovery`

A buffered rollout is written at most twice: when it arrives, and at the first `save` at which the hub still holds it.

SQLite writes ahead (WAL) with `synchronous=FULL`: a committed transaction survives a power failure. The file is locked
as long as the hub lives, so two hubs cannot share a journal, and no shared-memory file is needed (which network file
systems do not support).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import msgpack

from sgpo_async.errors import HubError
from sgpo_async.files import FREE_SOME
from sgpo_async.wire import decode, encode
from sgpo_async.wire.records import Rollout

FILE = "hub.journal"
SAVE_BYTES = 256 * 2**20  # size of the entries at which a save is due
SAVE_ENTRIES = 20_000  # ... or their number; replaying so many takes about five seconds
ANY_SIZE = 2**63  # for `decode`: the size was checked when the message arrived
_BUSY_S = 2.0  # how long another hub may take to release the file
_REMEDIES = {
    sqlite3.SQLITE_BUSY: "another hub uses it: choose another name=NAME",
    sqlite3.SQLITE_CORRUPT: "delete it to start without it",
    sqlite3.SQLITE_NOTADB: "delete it to start without it",
    sqlite3.SQLITE_FULL: FREE_SOME,
}
_PRAGMAS = (
    "page_size=32768",
    "locking_mode=EXCLUSIVE",
    "journal_mode=WAL",
    "synchronous=FULL",
    "wal_autocheckpoint=2000",
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, at REAL NOT NULL, event BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS rollouts (task INTEGER, attempt INTEGER, slot INTEGER, version INTEGER, body BLOB NOT NULL,
    PRIMARY KEY (task, attempt, slot, version));
"""


StoredKey = tuple[int, int, int, int]


def stored_key(rollout: Rollout) -> StoredKey:
    """Task, attempt, slot and oldest version. A Restore shifts the versions of a rollout, and changes nothing else."""
    return rollout.task, rollout.attempt, rollout.slot, rollout.oldest_version


class Journal:
    """The journal at `folder`/hub.journal, which is created if it does not exist.

    Every method raises HubError if the disk is full, or if the file is damaged or in use.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._pending_bytes = self._pending_entries = 0  # since the last save
        self._added: list[tuple[float, bytes]] = []  # since the last commit
        self._saved: set[StoredKey] = set()  # rollouts in the database
        with self._reported():
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would make it readable for everybody
            self._db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, cached_statements=16)
            for pragma in _PRAGMAS:
                self._db.execute(f"PRAGMA {pragma}")
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN")

    # ---- write

    def append(self, at: float, event: bytes) -> None:
        """Add an event that happened at time `at` on the core's clock."""
        self._added.append((at, event))
        self._pending_bytes += len(event)
        self._pending_entries += 1

    def commit(self) -> None:
        """Commit what was added; then it is on disk."""
        added, self._added = self._added, []
        with self._reported():
            self._db.executemany("INSERT INTO entries (at, event) VALUES (?, ?)", added)
            self._db.execute("COMMIT")
            self._db.execute("BEGIN")

    @property
    def save_due(self) -> bool:
        """Whether there are so many entries that a restart would take long."""
        return self._pending_bytes > SAVE_BYTES or self._pending_entries > SAVE_ENTRIES

    def save(self, state: bytes, rollouts: Mapping[StoredKey, Rollout]) -> None:
        """Replace state and entries by `state`, which refers to `rollouts`; commit."""
        self._added = []  # the state has them
        with self._reported():
            gone = self._saved - rollouts.keys()
            new = rollouts.keys() - self._saved
            self._db.executemany(
                "DELETE FROM rollouts WHERE task = ? AND attempt = ? AND slot = ? AND version = ?", gone
            )
            rows = ((*key, msgpack.packb(encode(rollouts[key]))) for key in new)
            self._db.executemany("INSERT INTO rollouts VALUES (?, ?, ?, ?, ?)", rows)
            self._db.execute("DELETE FROM entries")
            self.set("state", state)
            self.commit()
        self._saved = set(rollouts)
        self._pending_bytes = self._pending_entries = 0

    def set(self, name: str, value: bytes) -> None:
        """Store one named value; the caller commits."""
        with self._reported():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    # ---- read

    def get(self, name: str) -> bytes | None:
        """The value of this name, or None."""
        with self._reported():
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return bytes(row[0]) if row else None

    def rollouts(self) -> dict[StoredKey, Rollout]:
        """All saved rollouts."""
        with self._reported():
            bodies = self._db.execute("SELECT body FROM rollouts").fetchall()
        rollouts = [cast(Rollout, decode(msgpack.unpackb(body), max_bytes=ANY_SIZE)) for (body,) in bodies]
        self._saved = {stored_key(rollout) for rollout in rollouts}
        return {stored_key(rollout): rollout for rollout in rollouts}

    def entries(self) -> Iterator[tuple[float, bytes]]:
        """The events since the last save, in order, each with its time."""
        with self._reported():
            for at, event in self._db.execute("SELECT at, event FROM entries ORDER BY number"):
                self._pending_bytes += len(event)
                self._pending_entries += 1
                yield at, event

    # ---- end

    def clear(self) -> None:
        """Delete everything; the caller commits."""
        with self._reported():
            for table in ("facts", "entries", "rollouts"):
                self._db.execute(f"DELETE FROM {table}")

    def close(self) -> None:
        """Close, without what was not committed: an event that the core could not handle is not handled again."""
        self._db.close()

    def remove(self) -> None:
        """Close the journal and delete its files, because the run is over."""
        self.close()
        for suffix in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(FILE + suffix).unlink(missing_ok=True)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary result code
            remedy = _REMEDIES.get(code, "check the disk and its free space")
            raise HubError(f"{self.path}: {error}; {remedy}") from None

"""The hub's journal: its last saved state and the events since then, in an SQLite database in the run's folder.

    append(event) ... commit ──▶ entries      one transaction, on disk before any effect of its events is carried out
    save(state) ───────────────▶ state        entries are deleted
    rollouts ──────────────────▶ files to which entries and state refer, see `rollout_files`
    get, entries ──────────────▶ the core of a killed hub, see `hub.recovery`

SQLite writes ahead (WAL) with `synchronous=FULL`: a committed transaction survives a power failure. The file is locked
as long as the hub lives, so two hubs cannot share a journal, and no shared-memory file is needed (which network file
systems do not support).
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sgpo_async.errors import HubError, WireError
from sgpo_async.files import FREE_SOME
from sgpo_async.hub.rollout_files import Place, RolloutFiles
from sgpo_async.wire.records import Rollout

FILE = "hub.journal"
FORMAT = 2  # a journal of another format is not read
SAVE_BYTES = 256 * 2**20  # size of the entries, with their rollouts, at which a save is due
SAVE_ENTRIES = 8_000  # ... or their number; replaying so many takes one or two seconds
SAVE_SHARE = 0.1  # at most this share of the hub's time is spent on saving
_BUSY_S = 2.0  # how long another hub may take to release the file
_REMEDIES = {
    sqlite3.SQLITE_BUSY: "another hub uses it: choose another name=NAME",
    sqlite3.SQLITE_CORRUPT: "delete it to start without it",
    sqlite3.SQLITE_NOTADB: "delete it to start without it",
    sqlite3.SQLITE_FULL: FREE_SOME,
}
_PRAGMAS = (
    "locking_mode=EXCLUSIVE",
    "journal_mode=WAL",
    "synchronous=FULL",
    "wal_autocheckpoint=2000",
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, at REAL NOT NULL, event BLOB NOT NULL);
"""


def in_use(folder: Path) -> bool:
    """Whether a hub, on whatever machine, has the journal in `folder` open: it holds a lock as long as it lives."""
    try:
        address = f"{(folder / FILE).absolute().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=0.0, isolation_level=None)) as db:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
            db.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:  # without a journal: SQLITE_CANTOPEN
        return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
    return False


class Journal:
    """The journal at `folder`/hub.journal, which is created if it does not exist.

    Every method raises HubError if the disk is full, or if the file is damaged or in use.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._pending_bytes = self._pending_entries = 0  # since the last save
        self._saved_at, self._save_s = -math.inf, 0.0  # when the last save ended, and how long it took
        self._added: list[tuple[float, bytes]] = []  # since the last commit
        with self.reported():
            self.rollouts = RolloutFiles(folder)
            self._pending_bytes = self.rollouts.nbytes  # a restarted hub does not know which of them the state holds
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite would make it readable for everybody
            self._db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, cached_statements=16)
            for pragma in _PRAGMAS:
                self._db.execute(f"PRAGMA {pragma}")
            self._db.executescript(_SCHEMA)
            self._db.execute("BEGIN")

    # ---- write

    def append(self, at: float, event: bytes, *, place: Place | None = None) -> None:
        """Add an event that happened at time `at` on the core's clock; `place`: of its rollout, if it has one."""
        self._added.append((at, event))
        self._pending_bytes += len(event) + (sum(place[2]) if place else 0)
        self._pending_entries += 1

    def add_rollout(self, rollout: Rollout, frames: Sequence[bytes]) -> Place:
        """Add a received rollout to the files."""
        with self.reported():
            return self.rollouts.add(rollout, frames)

    def commit(self) -> None:
        """Commit what was added; then it is on disk."""
        added, self._added = self._added, []
        with self.reported():
            self.rollouts.sync()
            self._db.executemany("INSERT INTO entries (at, event) VALUES (?, ?)", added)
            self._db.execute("COMMIT")
            self._db.execute("BEGIN")

    @property
    def save_due(self) -> bool:
        """Whether there are so many entries that a restart would take long, and the last save was long enough ago."""
        due = self._pending_bytes > SAVE_BYTES or self._pending_entries > SAVE_ENTRIES
        return due and self._save_s <= SAVE_SHARE * (time.monotonic() - self._saved_at)

    def save(self, dump: Callable[[], tuple[bytes, Collection[Place]]]) -> None:
        """Replace state and entries by the state that `dump` returns, with the places of its rollouts; commit."""
        began = time.monotonic()
        self._added = []  # the state has them
        with self.reported():
            state, places = dump()
            self._db.execute("DELETE FROM entries")
            self.set("state", state)
            self.commit()
            self.rollouts.keep(places)
        self._pending_bytes = self._pending_entries = 0
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - began

    def set(self, name: str, value: bytes) -> None:
        """Store one named value; the caller commits."""
        with self.reported():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    # ---- read

    def get(self, name: str) -> bytes | None:
        """The value of this name, or None."""
        with self.reported():
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return bytes(row[0]) if row else None

    def entries(self, table: str = "entries") -> Iterator[tuple[float, bytes]]:
        """The events since the last save, in order, each with its time on the core's clock in seconds.

        `table`: another one with the same columns, e.g. `history` of `sgpo_async.chaos.recording`, with earlier events.
        """
        with self.reported():
            for at, event in self._db.execute(f"SELECT at, event FROM {table} ORDER BY number"):
                self._pending_bytes += len(event)
                self._pending_entries += 1
                yield at, event

    # ---- end

    def clear(self) -> None:
        """Delete everything; the caller commits."""
        with self.reported():
            for table in ("facts", "entries"):
                self._db.execute(f"DELETE FROM {table}")

    def close(self) -> None:
        """Close, without what was not committed: an event that the core could not handle is not handled again."""
        with contextlib.suppress(OSError):  # a full disk was reported by `commit`
            self.rollouts.close()
        self._db.close()

    def remove(self) -> None:
        """Close the journal and delete its files, because the run is over."""
        self.close()
        for path in self.path.parent.glob(f"{FILE}*"):
            path.unlink()

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turn errors of the database and the files into a HubError of one line."""
        try:
            yield
        except (sqlite3.Error, OSError, WireError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary result code
            full = getattr(error, "errno", 0) == errno.ENOSPC
            remedy = FREE_SOME if full else _REMEDIES.get(code, "check the disk and its free space")
            raise HubError(f"{self.path}: {error}; {remedy}") from None

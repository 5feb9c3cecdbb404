"""Every finished item, appended and on the disk before the next is begun: what was paid for is never lost.

One JSON object per line; of several with the same key the last counts. A kill may leave half a line at the end: it is
cut off when the journal is opened again, and its item is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sgpo_async.errors import DataError
from sgpo_async.metrics.files import telling
from sgpo_async.tasks.base import Problem

Record = dict[str, Any]


def key_of(problem: Problem) -> str:
    """Identity of an item: what it is made of."""
    content = json.dumps([problem.problem, problem.answer, problem.response])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


class Journal:
    """The work file of one library."""

    def __init__(self, path: Path) -> None:
        """Read what is there. Raises DataError for a line that is none of ours, SgpoError if it cannot be written."""
        self.path = path
        self.records: dict[str, Record] = {}
        with telling(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.read_bytes() if path.exists() else b""
            end = whole.rfind(b"\n") + 1
            for number, line in enumerate(whole[:end].splitlines(), 1):
                self._read(number, line)
            self._file = path.open("ab")
            self._file.truncate(end)

    def append(self, record: Record) -> None:
        """Add one record, durably. Raises SgpoError if it cannot be written."""
        self.records[record["key"]] = record
        with telling(self.path):
            self._file.write(json.dumps(record, ensure_ascii=True).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def done(self, key: str) -> bool:
        """Whether this item needs no further work."""
        return key in self.records and not self.records[key].get("failed")

    def close(self) -> None:
        """No further records."""
        self._file.close()

    def _read(self, number: int, line: bytes) -> None:
        try:
            record = json.loads(line)
            self.records[record["key"]] = record
        except (ValueError, TypeError, LookupError):
            raise DataError(f"{self.path}:{number}: no record of this command; name another work file") from None

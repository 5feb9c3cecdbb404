"""Appends every reply and every finished item durably to a file, so that no reply that was paid for is ever lost.

Each line is a JSON object of one of two kinds. A reply, {"key": ..., "reply": {...}}, is written as soon as it arrives:
its text, its token counts, and the model that wrote it. A record holds a whole item and is written when the item is
finished. Of several records with the same key the last one counts; its token counts include all replies before it. If
the process is killed, the last line may be incomplete; it is removed when the journal is opened again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from sgpo_async.errors import DataError
from sgpo_async.files import JsonLinesReader, JsonLinesWriter, reporting_write_errors
from sgpo_async.tasks.base import Problem

Record = dict[str, Any]
BY = ("model", "endpoint", "prompts", "version", "time")
"""The origin of a reply: the extractor for a candidate, the judge for a ranking."""
TOKENS = ("prompt_tokens", "completion_tokens")


def key_of(problem: Problem) -> str:
    """The identity of an item: a digest of problem, answer and response."""
    content = json.dumps([problem.problem, problem.answer, problem.response])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


def same(one: Record, other: Record) -> bool:
    """Whether both were made by the same model on the same server, with the same prompt."""
    return all(one.get(name) == other.get(name) for name in ("model", "endpoint", "prompts"))


class Journal:
    """The work file from which one library is written."""

    def __init__(self, path: Path) -> None:
        """Read the file if it exists. Raises DataError for a foreign line, SgpoError if the file is not writable."""
        self.path = path
        self.records: dict[str, Record] = {}
        self.spent: dict[str, Counter[str]] = defaultdict(Counter)  # token counts of each item, finished or not
        self._replies: dict[str, list[Record]] = defaultdict(list)
        with reporting_write_errors(path):
            for number, line in JsonLinesReader(path).poll():
                self._read(number, line)
        self._lines = JsonLinesWriter(path, durable=True)

    def note(self, key: str, reply: Record) -> None:
        """Write one reply durably. Raises SgpoError if the file cannot be written."""
        self._take(key, reply)
        self._lines.append({"key": key, "reply": reply})

    def append(self, record: Record) -> None:
        """Write one record durably, with the token counts of its item so far. Raises SgpoError if that fails."""
        record |= {name: self.spent[record["key"]][name] for name in TOKENS}
        self.records[record["key"]] = record
        self._lines.append(record)

    def replies(self, key: str, of: str) -> list[Record]:
        """The replies for this item that are candidates, or rankings, in the order of their numbers."""
        return sorted((one for one in self._replies[key] if one["of"] == of), key=lambda one: one["number"])

    def done(self, key: str) -> bool:
        """Whether this item needs no further work."""
        return key in self.records and not self.records[key].get("failed")

    def close(self) -> None:
        """Close the file; no records can be added afterwards."""
        self._lines.close()

    def _take(self, key: str, reply: Record) -> None:
        self._replies[key].append(reply)
        self.spent[key].update({name: reply[name] for name in TOKENS})

    def _read(self, number: int, found: Any) -> None:
        try:
            if "reply" in found:
                self._take(found["key"], found["reply"])
                return
            self.spent[found["key"]] = Counter({name: found[name] for name in TOKENS})
            self.records[found["key"]] = _with_origin(found)
        except (ValueError, TypeError, LookupError):
            raise DataError(
                f"{self.path}:{number}: not a record of `sgpo-async strategies`; name another work file"
            ) from None


def _with_origin(record: Record) -> Record:
    """Older work files name only the model of the last run: use it as both extractor and judge."""
    if "extractors" in record:
        return record
    by = {name: record.get(name) for name in BY}
    return record | {"extractors": [by for _ in record["candidates"]], "judge": by if "scores" in record else None}

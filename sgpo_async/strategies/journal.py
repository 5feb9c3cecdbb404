"""Every reply and every finished item, appended and on the disk at once: what was paid for is never lost.

One JSON object per line, of two kinds. A reply, {"key": ..., "reply": {...}}, stands there as soon as it has come: its
text, what it cost, who wrote it. A record has all of an item when it is finished; of several with the same key the last
counts, and its tokens are those of all replies before it. A kill may leave half a line at the end: it is cut off when
the journal is opened again.
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
"""Who wrote a reply: of a candidate the extractor, of a ranking the judge."""
TOKENS = ("prompt_tokens", "completion_tokens")


def key_of(problem: Problem) -> str:
    """Identity of an item: what it is made of."""
    content = json.dumps([problem.problem, problem.answer, problem.response])
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


def same(one: Record, other: Record) -> bool:
    """Whether both are by the same model of the same server, with the same prompt."""
    return all(one.get(name) == other.get(name) for name in ("model", "endpoint", "prompts"))


class Journal:
    """The work file of one library."""

    def __init__(self, path: Path) -> None:
        """Read what is there. Raises DataError for a line that is none of ours, SgpoError if it cannot be written."""
        self.path = path
        self.records: dict[str, Record] = {}
        self.spent: dict[str, Counter[str]] = defaultdict(Counter)  # tokens of each item, finished or not
        self._replies: dict[str, list[Record]] = defaultdict(list)
        with reporting_write_errors(path):
            for number, line in JsonLinesReader(path).poll():
                self._read(number, line)
        self._lines = JsonLinesWriter(path, durable=True)

    def note(self, key: str, reply: Record) -> None:
        """Add one reply, durably. Raises SgpoError if it cannot be written."""
        self._take(key, reply)
        self._lines.append({"key": key, "reply": reply})

    def append(self, record: Record) -> None:
        """Add one record, durably, with what its item has cost so far. Raises SgpoError if it cannot be written."""
        record |= {name: self.spent[record["key"]][name] for name in TOKENS}
        self.records[record["key"]] = record
        self._lines.append(record)

    def replies(self, key: str, of: str) -> list[Record]:
        """What has come for this item: its candidates, or its rankings, by number."""
        return sorted((one for one in self._replies[key] if one["of"] == of), key=lambda one: one["number"])

    def done(self, key: str) -> bool:
        """Whether this item needs no further work."""
        return key in self.records and not self.records[key].get("failed")

    def close(self) -> None:
        """No further records."""
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
            raise DataError(f"{self.path}:{number}: no record of this command; name another work file") from None


def _with_origin(record: Record) -> Record:
    """Work files of old name one model, that of the last run: take it for both."""
    if "extractors" in record:
        return record
    by = {name: record.get(name) for name in BY}
    return record | {"extractors": [by for _ in record["candidates"]], "judge": by if "scores" in record else None}

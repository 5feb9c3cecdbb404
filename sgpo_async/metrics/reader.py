"""Reading a run's numbers back, while it writes them or after it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgpo_async.errors import DataError

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """All whole lines of metrics.jsonl, empty without the file; a last line cut short by a crash is left out.

    Raises DataError (file, line, reason) for a broken line before the last.
    """
    return MetricsTail(folder).poll()


def read_summary(folder: str | Path) -> dict[str, Any]:
    """summary.json, empty if the run has not written one. Raises DataError if it is not JSON."""
    path = Path(folder) / SUMMARY
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); delete it and make the report again") from None
    return summary


class MetricsTail:
    """Follows metrics.jsonl: each `poll` returns the lines that have become whole since the last."""

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / METRICS
        self._offset = 0
        self._line = 0

    def poll(self) -> list[dict[str, Any]]:
        """New whole lines. Starts over if the file has been begun anew (it is shorter than what was read)."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = self._line = 0
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [self._parse(text) for text in whole.splitlines()]

    def _parse(self, text: bytes) -> dict[str, Any]:
        self._line += 1
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{self._path}:{self._line}: is not JSON ({error}); remove the line") from None
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise DataError(f"{self._path}:{self._line}: is no object with an integer 'step'; remove the line")
        return values

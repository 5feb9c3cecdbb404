"""Read the metrics of a run, while the run writes them or after it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgpo_async.errors import DataError

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return all complete lines of metrics.jsonl, [] without the file; skip a last line that a crash has truncated.

    Raises DataError (file, line, reason) for an invalid complete line.
    """
    return MetricsTail(folder).poll()


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Return summary.json, {} if the run has not written it. Raises DataError if it is not JSON."""
    path = Path(folder) / SUMMARY
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); delete the file and make the report again") from None
    return summary


class MetricsTail:
    """Follows metrics.jsonl: each `poll` returns the lines that were completed since the last one."""

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / METRICS
        self._offset = 0
        self._line = 0

    def poll(self) -> list[dict[str, Any]]:
        """Return new complete lines. Start over if the file is shorter than before: a new run has replaced it."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = self._line = 0
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [self._parse(text) for text in complete.splitlines()]

    def _parse(self, text: bytes) -> dict[str, Any]:
        self._line += 1
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{self._path}:{self._line}: is not JSON ({error}); remove the line") from None
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise DataError(f"{self._path}:{self._line}: must be an object with an integer 'step'; remove the line")
        return values

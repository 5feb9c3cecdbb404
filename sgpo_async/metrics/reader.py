"""Read the metrics of a run, while the run writes them or after it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgpo_async.errors import DataError
from sgpo_async.files import JsonLinesReader

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
        self._lines = JsonLinesReader(Path(folder) / METRICS)

    def poll(self) -> list[dict[str, Any]]:
        """Return new complete lines; all if a new run has replaced the file. Raises DataError if one is invalid."""
        return [self._checked(number, values) for number, values in self._lines.poll()]

    def _checked(self, number: int, values: Any) -> dict[str, Any]:
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise DataError(f"{self._lines.path}:{number}: must be an object with an integer 'step'; remove the line")
        return values

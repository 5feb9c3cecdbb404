"""Reading a run's numbers back, while it writes them or after it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sgpo_async.errors import DataError
from sgpo_async.files import JsonLinesReader

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
        self._lines = JsonLinesReader(Path(folder) / METRICS)

    def poll(self) -> list[dict[str, Any]]:
        """New whole lines; all of them if the file has been begun anew. Raises DataError for a broken one."""
        return [self._checked(number, values) for number, values in self._lines.poll()]

    def _checked(self, number: int, values: Any) -> dict[str, Any]:
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise DataError(f"{self._lines.path}:{number}: is no object with an integer 'step'; remove the line")
        return values

"""Results as files: written under the identity of their trial, found by what they hold."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sgpo_async.experiments.identity import identity
from sgpo_async.experiments.plan import Result

log = logging.getLogger(__name__)


def read_results(folder: Path) -> dict[str, Result]:
    """Identity -> result, of all files in `folder`; what holds no configuration is told in one line and left alone.

    A file's name was right when it was written. The identity may have changed since, by a key that has come.
    """
    results: dict[str, Result] = {}
    unknown: list[Path] = []
    for file in sorted(folder.glob("*.json")):
        record = _read(file)
        if isinstance(record.get("config"), dict):
            results.setdefault(identity(record["config"]), record)
        else:
            unknown.append(file)
    if unknown:
        first, more = unknown[0], len(unknown) - 1
        holds = f"{first} and {more} more hold" if more else f"{first}: holds"
        log.warning(
            "%s no configuration; not counted, so the trial is run again: move such files out of %s", holds, folder
        )
    return results


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}

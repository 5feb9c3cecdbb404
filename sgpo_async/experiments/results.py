"""Result files: named by the identity of their trial, but read by the configuration that they hold."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sgpo_async.experiments.identity import identity
from sgpo_async.experiments.plan import Result

log = logging.getLogger(__name__)


def read_results(folder: Path) -> dict[str, Result]:
    """Identity -> result, for all files in `folder`; files without a configuration are not counted, with one warning.

    The identity is computed again: a file's name is outdated if keys have been added since the file was written.
    """
    results: dict[str, Result] = {}
    ignored: list[Path] = []
    for file in sorted(folder.glob("*.json")):
        record = _read(file)
        if isinstance(record.get("config"), dict):
            results.setdefault(identity(record["config"]), record)
        else:
            ignored.append(file)
    if ignored:
        first, more = ignored[0], len(ignored) - 1
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

"""Writing to the run folder: strict JSON, atomic replacement of files, errors of one line when a disk is full."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgpo_async.errors import SgpoError

FULL_BYTES = 2**16  # a disk with less free space than this counts as full
FREE_SOME = "free some space, or choose another folder with out=DIR"


def to_json(values: Mapping[str, Any]) -> str:
    """One line of strict JSON; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_plain(values), allow_nan=False)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # scalars and arrays of NumPy and torch, without importing either
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: a reader sees the old file or the new one, never a part of it."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with reporting_write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def disk_full(path: Path) -> bool:
    """Whether the disk of `path` is so full that the end of the last file written may be missing."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free < FULL_BYTES


@contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a SgpoError of one line that names the file, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SgpoError(f"{path}: cannot be written ({reason}); {FREE_SOME}") from error

"""Writing to the run folder: values made plain, whole files or nothing, a full disk told in one line."""

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

FULL_BYTES = 2**16
FREE_SOME = "free some space, or choose another place with out=DIR"


def to_json(values: Mapping[str, Any]) -> str:
    """One line of strict JSON; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_plain(values), allow_nan=False)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy and torch, scalars and arrays, without importing either
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` atomically: a reader sees the old file or the new one, never a part."""
    content = content.encode() if isinstance(content, str) else content
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with telling(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def disk_full(path: Path) -> bool:
    """Whether the disk of `path` is so full that what was written last may lack its end."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free < FULL_BYTES


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Turn an OSError into one line that names the file, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SgpoError(f"{path}: cannot be written ({reason}); {FREE_SOME}") from error

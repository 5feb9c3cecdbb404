"""Files of a run: strict JSON, JSON lines, atomic replacement, errors of one line when a disk is full."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from sgpo_async.errors import DataError, SgpoError

FULL_BYTES = 2**16  # a disk with less free space than this counts as full
FREE_SOME = "free some space, or choose another folder with out=DIR"


def to_json(values: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Strict JSON, one line unless `indent` is given; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_plain(values), allow_nan=False, indent=indent)


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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` atomically: a reader sees the old file or the new one, never a part of it."""
    content = content.encode() if isinstance(content, str) else content
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with reporting_write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


def step_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, by step; the name of one that is being written begins with a dot."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which the checkpoint was taken."""
    return int(checkpoint.name.removeprefix("step-"))


def written_since(path: Path, since: float) -> bool:
    """Whether the file exists and was written at `since` (seconds since the epoch) or later."""
    try:
        return path.stat().st_mtime >= since
    except (FileNotFoundError, NotADirectoryError):
        return False


def set_usual_modes(folder: Path) -> None:
    """Give the files below `folder` the mode of new files, as the umask says: some libraries write them with 0600."""
    probe = folder / f".mode.{os.getpid()}"
    probe.touch()  # a new file shows the mode; os.umask would change it for all threads for a moment
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_mode != mode:
            file.chmod(mode)


def set_aside(path: Path) -> Path:
    """Rename a file or folder to the first free name, e.g. metrics.jsonl to metrics.earlier-1.jsonl; return this name.

    Raises SgpoError if it cannot be renamed.
    """
    names = (path.with_name(f"{path.stem}.earlier-{number}{path.suffix}") for number in count(1))
    with reporting_write_errors(path):
        return path.rename(next(name for name in names if not name.exists()))


class JsonLinesReader:
    """Reads a file of JSON values, one a line, while it grows or after its writer was killed.

    Only lines that end in a newline count: a kill may leave a part of one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0  # bytes of whole lines that have been read
        self._number = 0
        self._inode = 0  # of the file that has been read; `write_whole` replaces it by another

    def poll(self) -> list[tuple[int, Any]]:
        """(line number, value) of the lines that have become whole since the last call; none without the file.

        Starts over if the file was replaced or has become shorter, as it does when a run begins anew. Raises DataError
        (file, line, reason) for a line that is not JSON.
        """
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if file.seek(0, 2) < self.end or inode != self._inode:
                    self.end, self._number, self._inode = 0, 0, inode
                file.seek(self.end)
                new = file.read()
        except FileNotFoundError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self.end += len(whole)
        return [self._parse(line) for line in whole.splitlines()]

    def _parse(self, line: bytes) -> tuple[int, Any]:
        self._number += 1
        try:
            return self._number, json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.path}:{self._number}: is not JSON ({error}); remove the line") from None


class JsonLinesWriter:
    """Appends JSON values behind the last whole line of a file, and cuts off a part of a line that a kill has left.

    Every method raises SgpoError (file, reason, remedy) when the file cannot be written.
    """

    def __init__(self, path: Path, *, durable: bool = False) -> None:
        """With `durable` a line is on the disk when `append` returns, and survives a crash of the machine."""
        self._path, self._durable = path, durable
        with reporting_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def append(self, values: Mapping[str, Any]) -> None:
        """Add one line; readers see it when this returns."""
        with reporting_write_errors(self._path):
            self._file.write(to_json(values).encode() + b"\n")
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """No further lines."""
        with reporting_write_errors(self._path):
            self._file.close()


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

"""Writes problems as JSON Lines or Parquet for `tasks.source=file`; files are replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sgpo_async.files import reporting_write_errors, write_whole
from sgpo_async.tasks.base import Problem

Format = Literal["jsonl", "parquet"]
COLUMNS = ("problem", "answer", "strategy", "response", "source")


def problem_record(problem: Problem) -> dict[str, str | None]:
    """The record of a problem; `source` is the FILE:LINE it was read from."""
    values = (problem.problem, problem.answer, problem.strategy, problem.response, problem.id)
    return dict(zip(COLUMNS, values, strict=True))


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write problems in the format that the suffix of `path` names. Raises SgpoError if writing fails."""
    write_records(path, [problem_record(problem) for problem in problems], columns=COLUMNS)


def write_records(path: Path, records: Sequence[Mapping[str, Any]], *, columns: Sequence[str]) -> None:
    """Write records in the format that the suffix of `path` names. Raises SgpoError if writing fails.

    Args:
        columns: columns of a Parquet file; they are written even if they have no values.
    """
    if path.suffix == ".parquet":
        _write_parquet(path, records, columns)
    else:
        write_lines(path, records)


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line; keys without a value are left out."""
    present = ({key: value for key, value in record.items() if value is not None} for record in records)
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in present))


def sha256(path: str | Path, records: Iterable[Any] = ()) -> str:
    """The digest of a file's bytes, or, if the dataset is not a file, of its `records` as JSON, one per line."""
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _write_parquet(path: Path, records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    arrays = [pyarrow.array([record.get(name) for record in records]) for name in columns]
    arrays = [array.cast(pyarrow.string()) if pyarrow.types.is_null(array.type) else array for array in arrays]
    table = pyarrow.Table.from_arrays(arrays, names=list(columns))
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with reporting_write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, new)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)

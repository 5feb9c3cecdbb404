"""Records of a file or dataset, one at a time: the memory that they take does not depend on the size of the records.

    .jsonl, .csv                 the position of each record in the file; a record is read when it is asked for
    .jsonl.gz, .csv.gz           the same, of an unpacked temporary copy
    .parquet                     row groups; those read last stay in memory, up to CACHED_BYTES
    anything else                a Hugging Face dataset, which maps its files into memory (needs `datasets`)

Upper and lower case make no difference in suffixes. A record comes with its place, FILE:LINE. Every error is a
DataError, one line that begins with that place.
"""

from __future__ import annotations

import bisect
import csv
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sgpo_async.errors import DataError
from sgpo_async.files import reporting_write_errors

Row = tuple[str, Any]
"""(FILE:LINE, record)"""

CACHED_BYTES = 256 * 2**20
UTF8 = "is not UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8"


def open_rows(path: str, *, config: str = "", split: str = "") -> Sequence[Row]:
    """The records of a file, or of the split of a Hugging Face dataset.

    Args:
        config, split: of a dataset; empty: its default configuration, its split train.

    Raises DataError if it cannot be read; an access to a record, if the record is malformed or the file has changed.
    """
    kind = next((kind for suffixes, kind in KINDS.items() if path.lower().endswith(suffixes)), None)
    if kind is None:
        return DatasetRows(path, config=config, split=split)
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file")
    if config or split:
        key = "dataset_config" if config else "split"
        raise DataError(f"{path}: tasks.{key} is for Hugging Face datasets, and this is one file; remove it")
    return kind(path)


class _TextRows(Sequence[Row], ABC):
    """Records that lie one after another in a text file, at known positions."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = _unpacked(path) if path.lower().endswith(".gz") else Path(path).open("rb")  # noqa: SIM115
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
        self._state = self._stat()
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("Q")
        for start, end, line in self._index(self._file):
            self._starts.append(start)
            self._ends.append(end)
            self._lines.append(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = f"{self._path}:{self._lines[index]}"
        start, end = self._starts[index], self._ends[index]
        content = os.pread(self._file.fileno(), end - start, start)
        if self._stat() != self._state:
            raise DataError(f"{place}: the file has changed since it was opened; start again")
        return place, self._parse(place, content)

    @abstractmethod
    def _index(self, file: IO[bytes]) -> Iterator[tuple[int, int, int]]:
        """(start, end, number of the first line) of each record; positions in bytes."""

    @abstractmethod
    def _parse(self, place: str, content: bytes) -> Any:
        """The record."""

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


class JsonLines(_TextRows):
    """One JSON value per line; empty lines are skipped."""

    def _index(self, file: IO[bytes]) -> Iterator[tuple[int, int, int]]:
        start, number = 0, 0
        for chunk in file:
            for line in chunk.splitlines(keepends=True):
                number += 1
                if line.strip():
                    yield start, start + len(line), number
                start += len(line)

    def _parse(self, place: str, content: bytes) -> Any:
        try:
            return json.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: byte {error.start + 1} {UTF8}") from error
        except RecursionError:
            raise DataError(f"{place}: the JSON is nested too deeply; flatten or remove that column") from None
        except ValueError as error:
            raise DataError(f"{place}: not JSON: {error}") from error


class CsvLines(_TextRows):
    """Comma-separated values with a header. A field may contain line breaks; an empty field counts as absent."""

    def __init__(self, path: str) -> None:
        csv.field_size_limit(sys.maxsize)
        self._header: list[str] = []
        super().__init__(path)

    def _index(self, file: IO[bytes]) -> Iterator[tuple[int, int, int]]:
        position, line = 0, 0

        def lines() -> Iterator[str]:
            nonlocal position, line
            for chunk in file:
                position += len(chunk)
                line += 1
                yield self._decoded(chunk, line)

        start, first = 0, 1
        reader = csv.reader(lines(), strict=True)
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{self._path}:{first}: not CSV: {error}") from None
            if fields is None:
                return
            if not self._header:
                self._header = fields
                if len(set(fields)) < len(fields):
                    raise DataError(f"{self._path}:{first}: the header has a name twice; rename one of the columns")
            elif fields:
                yield start, position, first
            start, first = position, line + 1

    def _parse(self, place: str, content: bytes) -> Any:
        (fields,) = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
        if len(fields) != len(self._header):
            raise DataError(f"{place}: {len(fields)} fields, but the header has {len(self._header)}; quote commas")
        return {name: value or None for name, value in zip(self._header, fields, strict=True)}

    def _decoded(self, chunk: bytes, line: int) -> str:
        try:
            return chunk.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}:{line}: byte {error.start + 1} {UTF8}") from error


class ParquetRows(Sequence[Row]):
    """The rows of a Parquet file, read by row groups."""

    def __init__(self, path: str) -> None:
        import pyarrow
        from pyarrow import parquet

        self._path, self._errors = path, (pyarrow.ArrowException, OSError)
        try:
            self._file = parquet.ParquetFile(path)
        except self._errors as error:
            raise self._unreadable(error) from error
        meta = self._file.metadata
        sizes = [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]
        self._ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        self._cached: OrderedDict[int, Any] = OrderedDict()  # row groups as Arrow tables, the last used one at the end

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        table = self._group(number)
        row = index - (self._ends[number] - table.num_rows)
        return f"{self._path}:{index + 1}", table.slice(row, 1).to_pylist()[0]

    def _group(self, number: int) -> Any:
        if number in self._cached:
            self._cached.move_to_end(number)
            return self._cached[number]
        try:
            table = _with_doubles(self._file.read_row_group(number))
        except self._errors as error:
            raise self._unreadable(error) from error
        self._cached[number] = table
        while len(self._cached) > 1 and sum(one.nbytes for one in self._cached.values()) > CACHED_BYTES:
            self._cached.popitem(last=False)
        return table

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self._path}: not readable as Parquet: {_first_line(error)}")


class DatasetRows(Sequence[Row]):
    """One split of a Hugging Face dataset: a saved dataset, a dataset's name, or a folder of data files."""

    def __init__(self, name: str, *, config: str, split: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{name}: not .jsonl, .csv or .parquet, and a Hugging Face dataset needs `pip install datasets`"
            ) from error
        wanted = split or "train"
        saved = Path(name, "dataset_info.json").exists() or Path(name, "dataset_dict.json").exists()
        try:
            data = (
                datasets.load_from_disk(name) if saved else datasets.load_dataset(name, *([config] if config else []))
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise DataError(f"{name}: cannot be read as a dataset: {_first_line(error)}") from error
        if isinstance(data, datasets.DatasetDict):
            if wanted not in data:
                raise DataError(
                    f"{name}: no dataset with a {wanted} split; there are {', '.join(data) or 'none'}: set tasks.split"
                )
            data = data[wanted]
        elif split:
            raise DataError(f"{name}: the dataset has no splits; remove tasks.split")
        self._name, self._data = name, data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return f"{self._name}:{index + 1}", self._data[index]


KINDS: dict[tuple[str, ...], Callable[[str], Sequence[Row]]] = {
    (".jsonl", ".jsonl.gz"): JsonLines,
    (".csv", ".csv.gz"): CsvLines,
    (".parquet",): ParquetRows,
}
"""The kind of a file, by its suffix."""


def _with_doubles(table: Any) -> Any:
    """The table with columns of float32 as float64 that have the same digits: 0.1, instead of 0.10000000149011612."""
    import pyarrow

    for index, field in enumerate(table.schema):
        if pyarrow.types.is_float32(field.type):
            column = table.column(index).cast(pyarrow.string()).cast(pyarrow.float64())
            table = table.set_column(index, field.name, column)
    return table


def _unpacked(path: str) -> IO[bytes]:
    """A temporary file with the content of a gzip file; it is removed when it is closed."""
    with reporting_write_errors(Path(tempfile.gettempdir())):
        copy = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with gzip.open(path) as packed:
            shutil.copyfileobj(packed, copy, 2**20)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked: {_first_line(error)}") from error
    copy.seek(0)
    return copy


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Reads a user's own problems: JSON Lines, Parquet, or a Hugging Face dataset (folder or name, needs `datasets`).

Columns: problem, answer, and optionally strategy and response; other columns are ignored. math-verify
computes the rewards.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sgpo_async.errors import DataError
from sgpo_async.tasks.base import SPLIT_SEED, Problem

Row = tuple[str, Any]
"""(FILE:LINE, record)"""


def read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error


def read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        records = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {_first_line(error)}") from error
    for number, record in enumerate(records, start=1):
        yield f"{path}:{number}", record


def read_dataset(name: str) -> Iterator[Row]:
    """The split `train` of a Hugging Face dataset: a saved dataset, a dataset name, or a folder of data files."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name}: not .jsonl or .parquet, and a Hugging Face dataset needs `pip install datasets`"
        ) from error
    try:
        saved = Path(name, "dataset_info.json").exists() or Path(name, "dataset_dict.json").exists()
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
        rows = data["train"] if isinstance(data, datasets.DatasetDict) else data
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{name}: no dataset with a train split: {_first_line(error)}") from error
    for number, record in enumerate(rows, start=1):
        yield f"{name}:{number}", record


def read_rows(path: str) -> Iterator[Row]:
    file = Path(path)
    readers = {".jsonl": read_jsonl, ".parquet": read_parquet}
    if file.suffix not in readers:
        return read_dataset(path)
    if not file.is_file():
        raise DataError(f"{path}: no such file")
    return readers[file.suffix](file)


def to_problem(place: str, record: Any) -> Problem:
    """The problem of one record; raises DataError `FILE:LINE: reason`."""
    if not isinstance(record, dict):
        raise DataError(f"{place}: a record must be an object, got {type(record).__name__}")
    return Problem(
        id=place,
        problem=_text(place, record, "problem"),
        answer=_answer(place, record),
        strategy=_optional_text(place, record, "strategy"),
        response=_optional_text(place, record, "response"),
    )


def read_problems(path: str) -> list[Problem]:
    """All problems of a file or dataset; raises DataError for the first bad line."""
    return [to_problem(place, record) for place, record in read_rows(path)]


class Split(NamedTuple):
    """The problems of a file in two parts; no problem text is in both."""

    training: list[Problem]
    held_out: list[Problem]


def read_split(path: str, *, held_out: int) -> Split:
    """Hold out `held_out` of the distinct problem texts, so that repeated problems are all in the same part.

    The selection depends only on the texts and their order, so every run with this file holds out the same problems.
    They are returned in the random order of the draw: any slice of them is a random sample, even if the file is sorted.

    Raises DataError for a bad line, and if no problem would be left for training.
    """
    problems = read_problems(path)
    texts = list(dict.fromkeys(problem.problem for problem in problems))
    random.Random(f"held-out {SPLIT_SEED}").shuffle(texts)
    reserved = {text: index for index, text in enumerate(texts[:held_out])}
    training = [problem for problem in problems if problem.problem not in reserved]
    if not training:
        raise DataError(
            f"{path}: {len(texts)} distinct problems leave none for training with tasks.held_out={held_out}"
        )
    held = [problem for problem in problems if problem.problem in reserved]
    return Split(training, sorted(held, key=lambda problem: reserved[problem.problem]))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _text(place: str, record: dict[str, Any], column: str) -> str:
    if column not in record:
        raise DataError(f"{place}: no column {column!r}; there are {', '.join(map(repr, record)) or 'none'}")
    value = record[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {column!r} must be a text that is not empty, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {column!r} must be valid Unicode, got half a surrogate pair at character {error.start}"
        ) from error
    return value


def _answer(place: str, record: dict[str, Any]) -> str:
    value = record.get("answer")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _text(place, record, "answer")


def _optional_text(place: str, record: dict[str, Any], column: str) -> str | None:
    return None if record.get(column) is None else _text(place, record, column)


class FileSource:
    """Problems of a file or dataset, reshuffled in every epoch; a fixed part is held out (see `read_split`)."""

    verifier = "math"

    def __init__(self, path: str, *, held_out: int, seed: int) -> None:
        """Read the problems. Raises DataError (see `read_split`)."""
        self._training, self._held_out = read_split(path, held_out=held_out)
        self.has_responses = any(problem.response is not None for problem in self._training)
        self._order = lru_cache(maxsize=4)(self._shuffled)
        self._seed = seed

    def training(self, position: int) -> Problem:
        epoch, index = divmod(position, len(self._training))
        return self._training[self._order(epoch)[index]]

    def training_problems(self) -> Sequence[Problem]:
        return self._training

    def held_out(self) -> Sequence[Problem]:
        return self._held_out

    def _shuffled(self, epoch: int) -> list[int]:
        count = len(self._training)
        return random.Random(f"epoch {epoch} {self._seed}").sample(range(count), count)

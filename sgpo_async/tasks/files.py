"""A user's own problems: JSON Lines, CSV, Parquet, or a Hugging Face dataset (see `sgpo_async.tasks.rows`).

Columns: problem, answer, and optionally strategy and response, or what `tasks.columns` calls them; other columns are
ignored, unless a reward function of the user reads them.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Iterable, MutableSequence, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xxhash

from sgpo_async.errors import DataError
from sgpo_async.tasks.base import SPLIT_SEED, Problem
from sgpo_async.tasks.records import Form
from sgpo_async.tasks.rows import Row, open_rows

OWN = Form()


def read_problems(path: str, *, form: Form = OWN) -> list[Problem]:
    """All problems of a file or dataset; raises DataError for the first bad line."""
    return [form.problem(place, record) for place, record in open_rows(path)]


class Split(NamedTuple):
    """The problems of a file in two parts; no problem text is in both."""

    training: Sequence[Problem]
    held_out: Sequence[Problem]
    strategies: int  # training problems with a strategy
    responses: int  # ... with a response
    lengths: Sequence[int]  # of each training problem: characters, with those of its strategy


class Problems(Sequence[Problem]):
    """Some problems of a file, each read when it is asked for."""

    def __init__(self, rows: Sequence[Row], form: Form, indices: Sequence[int]) -> None:
        self._rows, self._form, self._indices = rows, form, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return self._form.problem(*self._rows[self._indices[index]])


def read_split(rows: Sequence[Row], path: str, *, held_out: int, form: Form = OWN) -> Split:
    """Hold out `held_out` of the distinct problem texts, so that repeated problems are all in the same part.

    The selection depends only on the texts and their order, so every run with this file holds out the same problems.
    They are returned in the random order of the draw: any slice of them is a random sample, even if the file is sorted.
    Every record is read and checked once, and none is kept: the memory needed is a few numbers for each record.

    Raises DataError for a bad line, and if no problem would be left for training.
    """
    digests, strategies, responses = bytearray(), bytearray(), bytearray()  # of each record's text; whether it has one
    lengths = array("I")
    for place, record in rows:
        problem = form.problem(place, record)
        digests += xxhash.xxh3_128_digest(problem.problem.encode())
        strategies.append(problem.strategy is not None)
        responses.append(problem.response is not None)
        lengths.append(len(problem.problem) + len(problem.strategy or ""))
    numbers, count = _numbered(digests)
    order = _shuffled(range(count), f"held-out {SPLIT_SEED}")
    rank = {number: rank for rank, number in enumerate(order[:held_out])}
    training = array("I", (index for index, number in enumerate(numbers) if number not in rank))
    if not training:
        remedy = f"set tasks.held_out below {count}" if count > 1 else "add problems"
        raise DataError(
            f"{path}: {count} distinct problems leave none for training with tasks.held_out={held_out}; {remedy}"
        )
    held = sorted((index for index, number in enumerate(numbers) if number in rank), key=lambda i: rank[numbers[i]])
    return Split(
        Problems(rows, form, training),
        list(Problems(rows, form, held)),
        sum(strategies[index] for index in training),
        sum(responses[index] for index in training),
        array("I", (lengths[index] for index in training)),
    )


class FileSource:
    """Problems of a file or dataset, reshuffled in every epoch; a fixed part is held out (see `read_split`)."""

    verifier = "math"

    def __init__(self, path: str, *, held_out: int, seed: int, form: Form = OWN, part: tuple[str, str] = ("", "")):
        """Read the problems; `part`: configuration and split of a dataset. Raises DataError (see `read_split`)."""
        rows = open_rows(path, config=part[0], split=part[1])
        split = read_split(rows, path, held_out=held_out, form=form)
        self._training, self._held_out, self._lengths = split.training, split.held_out, split.lengths
        self.strategies, self.responses = split.strategies, split.responses
        self._order = lru_cache(maxsize=4)(self._shuffled)
        self._seed = seed

    def training(self, position: int) -> Problem:
        epoch, index = divmod(position, len(self._training))
        return self._training[self._order(epoch)[index]]

    def training_problems(self) -> Sequence[Problem]:
        return self._training

    def longest_problems(self, count: int) -> Sequence[Problem]:
        chosen = heapq.nlargest(count, range(len(self._lengths)), key=self._lengths.__getitem__)
        return [self._training[index] for index in chosen]

    def held_out(self) -> Sequence[Problem]:
        return self._held_out

    def _shuffled(self, epoch: int) -> Sequence[int]:
        count = len(self._training)
        return array("I", random.Random(f"epoch {epoch} {self._seed}").sample(range(count), count))


def _numbered(digests: bytes | bytearray) -> tuple[Sequence[int], int]:
    """Number the distinct digests in the order of their first occurrence: (the number of each record, how many)."""
    if not digests:
        return array("I"), 0
    low, high = np.frombuffer(digests, np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: of equal digests, the first one of the file comes first
    new = np.ones(len(order), bool)
    new[1:] = (low[order[1:]] != low[order[:-1]]) | (high[order[1:]] != high[order[:-1]])
    group = np.cumsum(new) - 1
    number = np.empty(int(new.sum()), np.uint32)  # of each group, by its first record
    number[np.argsort(order[new])] = np.arange(len(number))
    numbers = np.empty(len(order), np.uint32)
    numbers[order] = number[group]
    return array("I", numbers.tobytes()), len(number)


def _shuffled(numbers: Iterable[int], seed: str) -> MutableSequence[int]:
    order = array("I", numbers)
    random.Random(seed).shuffle(order)
    return order

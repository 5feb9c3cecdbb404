"""From a record of a file to a problem: which columns it reads, and what they may hold. Every error names FILE:LINE."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sgpo_async.config.schema import Tasks
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.rewards import has_own_code

USUAL = {  # what public datasets call our columns
    "problem": ("question", "prompt", "query", "instruction", "input"),
    "answer": ("final_answer", "solution", "ground_truth", "target", "label", "output"),
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form of the records of a file. The default is our own."""

    columns: Mapping[str, str] = field(default_factory=dict)  # our name -> theirs, where they differ
    answer_after: str = ""  # the answer is the text after the last occurrence of this in its column; "": all of it
    others: bool = False  # keep the other columns, for a reward function or an environment
    is_set: bool = False  # whether the user can name the columns of this file, by tasks.columns

    @classmethod
    def of(cls, tasks: Tasks) -> Form:
        """The form of the file `tasks.path`."""
        others = has_own_code(tasks)
        return cls(columns=tasks.columns, answer_after=tasks.answer_after, others=others, is_set=True)

    def column(self, name: str) -> str:
        """The name that the file gives to our column `name`."""
        return self.columns.get(name, name)

    def problem(self, place: str, record: Any) -> Problem:
        """The problem of one record; raises DataError `FILE:LINE: reason`."""
        if not isinstance(record, dict):
            raise DataError(f"{place}: a record must be an object, got {type(record).__name__}")
        return Problem(
            id=place,
            problem=self._text(place, record, "problem"),
            answer=self._answer(place, record),
            strategy=self._optional(place, record, "strategy"),
            response=self._optional(place, record, "response"),
            columns=self._others(place, record) if self.others else "",
        )

    def _answer(self, place: str, record: dict[str, Any]) -> str:
        column = self.column("answer")
        number = number_text(place, repr(column), record.get(column))
        answer = self._text(place, record, "answer") if number is None else number
        if not self.answer_after:
            return answer
        _, found, rest = answer.rpartition(self.answer_after)
        if not found or not rest.strip():
            raise DataError(
                f"{place}: {column!r} must have an answer after {self.answer_after!r} (tasks.answer_after), "
                f"got {answer[-40:]!r}"
            )
        return rest.strip()

    def _optional(self, place: str, record: dict[str, Any], name: str) -> str | None:
        return None if record.get(self.column(name)) is None else self._text(place, record, name)

    def _text(self, place: str, record: dict[str, Any], name: str) -> str:
        column = self.column(name)
        if column not in record:
            found = ", ".join(map(repr, record)) or "none"
            raise DataError(f"{place}: no column {column!r}; there are {found}; {self._proposal(name, record)}")
        return text(place, repr(column), record[column])

    def _proposal(self, name: str, record: dict[str, Any]) -> str:
        """How to name the column in tasks.columns: with the file's usual name for it, if it has one."""
        if not self.is_set:
            return f"rename the column to {name!r}"
        names = {column.casefold(): column for column in record}
        near = [names[usual] for usual in (name, *USUAL[name]) if usual in names]
        mapping = dict(self.columns) | {name: near[0] if near else "THEIR-NAME"}
        return f"set tasks.columns={{{', '.join(f'{ours}: {theirs}' for ours, theirs in mapping.items())}}}"

    def _others(self, place: str, record: dict[str, Any]) -> str:
        known = {self.column(name) for name in ("problem", "answer")}
        try:
            return json.dumps({key: value for key, value in record.items() if key not in known}, default=str)
        except (ValueError, RecursionError, TypeError) as error:
            raise DataError(f"{place}: the other columns cannot be given to tasks.reward: {error}") from None


def text(place: str, what: str, value: Any) -> str:
    """The value, which must be a text that is not empty and can be encoded. Raises DataError."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {what} must be a text that is not empty, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {what} must be valid Unicode, got half a surrogate pair at character {error.start}"
        ) from error
    return value


def number_text(place: str, what: str, value: Any) -> str | None:
    """The decimal digits of a number, without an exponent: 0.00001, 300; 27.0 becomes 27. None if it is no number.

    Raises DataError for NaN and infinities.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise DataError(f"{place}: {what} must be a finite number, got {value}")
    digits = f"{Decimal(repr(value)) if isinstance(value, float) else value:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits

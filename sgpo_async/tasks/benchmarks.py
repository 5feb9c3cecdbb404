"""Reads benchmarks in the layouts of their public datasets, from JSON Lines, CSV or Parquet files of the user.

The columns identify the layout; the file name does not matter:

    MATH-500        problem   answer                  unique_id    (solution, subject, level)
    AIME 2024       problem   answer                  id           (solution, url, year)
                    Problem   Answer                  ID           (Solution)
                    problem   solution: \\boxed{...}   id           (url)
    AMC 2023        question  answer                  id           (url)
    OlympiadBench   question  final_answer: a list    id           (error, context, unit, answer_type, ...)
    one's own       problem   answer                  -            (strategy, response)

A column `strategy` is read in every layout. math-verify checks the answers; OlympiadBench answers that have a tolerance
(column `error`) are correct within it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from sgpo_async.config.schema import Evaluation
from sgpo_async.errors import DataError
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.records import number_text, text
from sgpo_async.tasks.rows import open_rows
from sgpo_async.tasks.tolerance import Tolerant

VERIFIER = "math"
TOLERANT = "math-tolerance"
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?=,\d{3}(?!\d))")  # digits before a thousands separator (not 0.5,100)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Problems that are evaluated together, each with `samples` completions."""

    name: str
    problems: Sequence[Problem]
    samples: int
    verifier: str = VERIFIER  # in the text form of `sgpo_async.tasks.rewards`
    solved_at: float = 1.0  # a completion is correct if its reward is at least this

    @property
    def digest(self) -> str:
        """A digest of ids, problems, answers and strategies in their order."""
        texts = [text for p in self.problems for text in (p.id, p.problem, p.answer, p.strategy or "")]
        return xxhash.xxh3_64_hexdigest("\0".join(texts).encode())


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names and the meaning of a dataset's columns."""

    name: str
    problem: str
    answer: str
    id: str | None  # None: the number of the record in the file
    to_answer: Callable[[str, Any], str]  # (FILE:LINE, answer column) -> answer for the verifier
    tolerance: str | None = None  # column that may be absent or null

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a record must have."""
        return tuple(column for column in (self.problem, self.answer, self.id) if column)


def plain_answer(place: str, value: Any) -> str:
    """The answer from a text or a number."""
    number = number_text(place, "the answer", value)
    return text(place, "the answer", value) if number is None else number


def boxed_answer(place: str, value: Any) -> str:
    r"""The content of the last \boxed{...} of a solution, with balanced braces."""
    _, box, rest = text(place, "the solution", value).rpartition("\\boxed{")
    depth = 1
    for end, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if box and depth == 0:
            return text(place, "the content of the last \\boxed{...}", rest[:end])
    raise DataError(f"{place}: the record has no answer column, and its solution has no \\boxed{{...}}")


def listed_answers(place: str, value: Any) -> str:
    """All answers of a list as one text, `3, 5`, in any order. Proofs have no answer and are rejected."""
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{place}: 'final_answer' must be a list of answers, got {value!r:.60}; proofs cannot be verified: "
            "use the open-ended problems, OE_TO_maths_en_COMP"
        )
    if len(value) == 1:
        text(place, "the answer", text(place, "the answer", value[0]).strip().strip("$"))
        return str(value[0])
    bare = [text(place, "the answer", one).strip().strip("$") for one in value]
    return ", ".join(text(place, "the answer", one) for one in bare)


def tolerances(place: str, value: Any, *, answers: int) -> list[float | None]:
    """OlympiadBench's `error`: one tolerance for all answers, or one for each, `1e-1,,5`; empty means exact.

    Raises DataError for an invalid number, or if the number of tolerances is neither 1 nor the number of answers.
    """
    try:
        parsed = [float(one) if one.strip() else None for one in str(value).split(",")]
        valid = all(one is None or (one >= 0 and math.isfinite(one)) for one in parsed)
    except ValueError:
        parsed, valid = [], False
    if isinstance(value, bool) or not valid or len(parsed) not in (1, answers):
        raise DataError(
            f"{place}: 'error' must be one number >= 0, or {answers} (one per answer) separated by commas, "
            f"got {value!r:.60}"
        )
    return parsed * answers if len(parsed) == 1 else parsed


def separated(answer: str) -> list[str]:
    """The answers that a text lists: split at commas outside of brackets, except thousands separators (1,234)."""
    within = {match.end() for match in THOUSANDS.finditer(answer)}  # positions of thousands separators
    cuts, depth = [-1], 0
    for place, letter in enumerate(answer):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0 and place not in within:
            cuts.append(place)
    parts = [answer[start + 1 : end] for start, end in zip(cuts, [*cuts[1:], len(answer)], strict=True)]
    return [part.strip().strip("$") for part in parts]


LAYOUTS = (  # the first layout whose columns are all present is used
    Layout(name="MATH-500", problem="problem", answer="answer", id="unique_id", to_answer=plain_answer),
    Layout(
        name="OlympiadBench",
        problem="question",
        answer="final_answer",
        id="id",
        to_answer=listed_answers,
        tolerance="error",
    ),
    Layout(name="AMC 2023", problem="question", answer="answer", id="id", to_answer=plain_answer),
    Layout(name="AIME 2024", problem="problem", answer="answer", id="id", to_answer=plain_answer),
    Layout(name="AIME 2024", problem="Problem", answer="Answer", id="ID", to_answer=plain_answer),
    Layout(name="one's own", problem="problem", answer="answer", id=None, to_answer=plain_answer),
    Layout(name="AIME 2024", problem="problem", answer="solution", id="id", to_answer=boxed_answer),
)


def open_benchmark(name: str, path: str, *, samples: int) -> Benchmark:
    """Read the benchmark in the file at `path`; its first record determines the layout.

    Raises DataError, one line with file and line, for an unreadable file or record, a record with pictures, and an
    id that occurs twice.
    """
    rows = open_rows(path)
    if not len(rows):
        raise DataError(f"{path}: the file contains no problems")
    layout = layout_of(*rows[0])
    problems: dict[str, Problem] = {}
    for number, (place, record) in enumerate(rows, start=1):
        problem = to_problem(place, record, layout=layout, number=number)
        if problem.id in problems:
            raise DataError(f"{place}: the id {problem.id!r} occurs twice; remove one of the records")
        problems[problem.id] = problem
    return Benchmark(name=name, problems=tuple(problems.values()), samples=samples)


def open_benchmarks(settings: Evaluation) -> list[Benchmark]:
    """The benchmarks that a run evaluates during training. Raises DataError."""
    return [
        open_benchmark(name, file.path, samples=file.samples or settings.samples)
        for name, file in settings.benchmarks.items()
    ]


def layout_of(place: str, record: Any) -> Layout:
    """The layout of a record. Raises DataError if no known layout matches."""
    for layout in LAYOUTS:
        if isinstance(record, dict) and all(column in record for column in layout.columns):
            return layout
    known = "; ".join(f"{', '.join(layout.columns)} ({layout.name})" for layout in LAYOUTS)
    found = ", ".join(record) or "no columns" if isinstance(record, dict) else type(record).__name__
    raise DataError(f"{place}: the columns match no known layout, got {found}; known layouts: {known}")


def to_problem(place: str, record: Any, *, layout: Layout, number: int) -> Problem:
    """The problem of one record, the `number`-th of its file. Raises DataError `FILE:LINE: reason`."""
    missing = [column for column in layout.columns if not isinstance(record, dict) or column not in record]
    if missing:
        raise DataError(f"{place}: no column {missing[0]!r}, which the first record has")
    if record.get("modality") == "Multimodal" or record.get("image_1") is not None:
        raise DataError(f"{place}: the problem contains pictures, which prompts do not support; use text-only problems")
    strategy = record.get("strategy")
    answer = layout.to_answer(place, record[layout.answer])
    tolerance = record.get(layout.tolerance) if layout.tolerance else None
    tolerant = tolerance not in (None, "")
    return Problem(
        id=str(record[layout.id]) if layout.id else str(number),
        problem=_with_context(record, text(place, repr(layout.problem), record[layout.problem])),
        answer=_with_tolerance(place, answer, tolerance) if tolerant else answer,
        strategy=None if strategy is None else text(place, "'strategy'", strategy),
        verifier=TOLERANT if tolerant else None,
    )


def _with_tolerance(place: str, answer: str, tolerance: Any) -> str:
    """The answers with their tolerances, in the text form that the verifier `math-tolerance` reads."""
    parts = separated(answer)
    given = tolerances(place, tolerance, answers=len(parts))
    return Tolerant(answer=answer, parts=tuple(zip(parts, given, strict=True))).to_text()


def _with_context(record: dict[str, Any], problem: str) -> str:
    """Put OlympiadBench's `context`, which a series of problems shares, before the problem."""
    context = record.get("context")
    return f"{context}\n\n{problem}" if isinstance(context, str) and context.strip() else problem

"""Compares answers within a tolerance, which some OlympiadBench problems define.

An answer is within its tolerance t if |answer - found| <= 1.01 t, which is the rule of OlympiadBench's own judge: the
extra 1 % absorbs floating-point errors. Tuples and intervals are compared element by element. math-verify compares
everything that is not a real number.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sympy import Basic, Expr

SLACK = 1.01
SMALL = 1e-3


@dataclass(frozen=True, kw_only=True)
class Tolerant:
    """An answer for the verifier `math-tolerance`. `to_text` encodes it as the one answer text of a lease."""

    answer: str  # the whole answer, as the verifier `math` reads it
    parts: tuple[tuple[str, float | None], ...]  # (answer, tolerance; None: exact), in any order

    def to_text(self) -> str:
        """JSON: [answer, [[part, tolerance], ...]]."""
        return json.dumps([self.answer, self.parts])

    @staticmethod
    def from_text(text: str) -> Tolerant:
        """The inverse of `to_text`; any other text is an exact answer."""
        with contextlib.suppress(ValueError, TypeError):
            answer, parts = json.loads(text)
            if isinstance(answer, str):
                return Tolerant(answer=answer, parts=tuple((part, tolerance) for part, tolerance in parts))
        return Tolerant(answer=text, parts=((text, None),))


def elements(expression: Basic) -> list[Basic]:
    """The elements of a set such as {3, 5} (`3, 5` is read as this set); otherwise the expression itself."""
    from sympy import FiniteSet

    return list(expression.args) if isinstance(expression, FiniteSet) else [expression]


def all_within(answers: Sequence[tuple[Basic, float | None]], found: Sequence[Basic]) -> bool:
    """Whether answers and found expressions can be matched one to one, each within its tolerance."""
    if len(found) == 1 and len(answers) > 1 and (listed := _parts(found[0])) and not listed[0]:
        found = listed[1]  # all answers in one pair of parentheses
    return len(found) == len(answers) and _paired(answers, found)


def _paired(answers: Sequence[tuple[Basic, float | None]], found: Sequence[Basic]) -> bool:
    """Try all matchings: tolerances may overlap, so the first expression that is near enough may be the wrong one."""
    if not answers:
        return True
    (answer, tolerance), *rest = answers
    return any(
        is_within(answer, one, tolerance) and _paired(rest, [*found[:i], *found[i + 1 :]])
        for i, one in enumerate(found)
    )


def is_within(answer: Basic, found: Basic, tolerance: float | None) -> bool:
    """Whether two expressions are equal; numbers are compared within the tolerance."""
    from math_verify import verify

    if verify([answer], [found], timeout_seconds=None):
        return True
    if tolerance is None:
        return False
    answer, found = _unassigned(answer, found)
    mine, theirs = _parts(answer), _parts(found)
    if mine and theirs:
        return (
            mine[0] == theirs[0]
            and len(mine[1]) == len(theirs[1])
            and all(is_within(a, b, tolerance) for a, b in zip(mine[1], theirs[1], strict=True))
        )
    return any(_near(a, b, tolerance) for a, b in _readings(answer, found))


def are_small_and_different(answer: Basic, found: Basic) -> bool:
    """Whether these are numbers below SMALL that differ by more than rounding.

    math-verify compares the first six decimals, so it finds 0.00000002 and 0.00000001 equal, and 1/2006! and 1/2004!.
    Of numbers written in decimals three significant digits must agree, of exact ones nine.
    """
    from math_verify.grader import get_pct_val
    from sympy import Float

    answer, found = _unassigned(answer, found)
    if get_pct_val(answer) is not None or get_pct_val(found) is not None:
        return False  # 9 % equals 9 and 0.09
    a, b = _real(answer), _real(found)
    if a is None or b is None or not 0 < max(abs(a), abs(b)) < SMALL:
        return False
    if min(getattr(a, "_prec", 53), getattr(b, "_prec", 53)) < 2:
        return False  # not one digit is certain
    decimals = answer.has(Float) or found.has(Float)
    return bool(abs(a - b) > (1e-3 if decimals else 1e-9) * max(abs(a), abs(b)))


def _near(answer: Basic, found: Basic, tolerance: float) -> bool:
    a, b = _real(answer), _real(found)
    return a is not None and b is not None and bool(abs(a - b) <= tolerance * SLACK)


def _real(expression: Basic) -> Expr | None:
    """The value of the expression if it is a finite real number, else None."""
    from sympy import Expr

    if not isinstance(expression, Expr):
        return None
    value = expression.doit().evalf()
    return value if value.is_Number and value.is_finite else None


def _readings(answer: Basic, found: Basic) -> list[tuple[Basic, Basic]]:
    """Pairs of numbers to compare, on the scale in which the answer is written: 9 % may mean 9 or 0.09."""
    from math_verify.grader import get_pct_val

    a, b = get_pct_val(answer), get_pct_val(found)
    if a is not None and b is not None:
        return [(a, b)]
    if a is not None:
        return [(a, found), (a, 100 * found)] if _real(found) is not None else []
    return [(answer, found)] if b is None else [(answer, b), (answer, b / 100)]


def _parts(expression: Basic) -> tuple[str, list[Basic]] | None:
    """(closed ends, elements) of a tuple or interval, else None. math-verify reads (3, 5) as an open interval."""
    from sympy import Interval, Tuple

    if isinstance(expression, Tuple):
        return "", list(expression.args)
    if not isinstance(expression, Interval):
        return None
    closed = ("" if expression.left_open else "[") + ("" if expression.right_open else "]")
    return closed, [expression.start, expression.end]


def _unassigned(answer: Basic, found: Basic) -> tuple[Basic, Basic]:
    """The right-hand sides of assignments such as `x = 3`; unchanged if both assign to different names."""
    from math_verify.grader import is_assignment_relation, take_first_relation, unwrap_eq

    both = is_assignment_relation(answer) and is_assignment_relation(found)
    if both and take_first_relation(answer).lhs != take_first_relation(found).lhs:
        return answer, found
    return unwrap_eq(answer), unwrap_eq(found)

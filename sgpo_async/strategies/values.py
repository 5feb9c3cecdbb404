"""Finds the numbers in a text by value and sign, in whatever form they are written. Pure functions.

Equal values, for example: 1,200 and 1200; 1/2, \\frac{1}{2}, 0.5, 50 % and "half";
12 and "twelve"; 5\\sqrt{3}, 5√3 and \\sqrt{75}.

A minus is a sign if no operand precedes it (-5, x = -5, f(-5)). It is not a sign in a range (2-5) or at the start of
a list item ("- 5 apples"). An irrational square root is a value of its own; its radicand is not counted, but its factor
is. These are not numbers: the numbering of steps ("2." or "(2)" at the beginning of a line), ordinals (2nd, "second"),
the word "one", and digits that belong to a name (x1, a_2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import NamedTuple

_UP_TO_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_WORDS = {word: Fraction(value) for value, word in enumerate(_UP_TO_TWENTY.split()) if word != "one"}
_TENS = {
    word: Fraction(10 * value)
    for value, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_PARTS = {"half": Fraction(1, 2), "halves": Fraction(1, 2), "quarter": Fraction(1, 4), "quarters": Fraction(1, 4)}
_MANY = {"dozen": Fraction(12), "hundred": Fraction(100), "thousand": Fraction(1000), "million": Fraction(10**6)}

_NUMBERING = re.compile(r"^[ \t]*(?:[-*][ \t]*)?(?:step[ \t]+)?\(?\d{1,2}[.):](?=\s)", re.IGNORECASE | re.MULTILINE)
_ORDINAL = re.compile(r"\b\d+(?:st|nd|rd|th)\b", re.IGNORECASE)
_ENDLESS = re.compile(r"\d{400,}")  # too long to be compared; Python refuses to convert much longer ones
_NAMED = re.compile(r"(?<!\w)[A-Za-z]_?\{?\d+\}?")  # x1, a_2, a_{12}
_BELOW = r"(?:\s*/\s*(?P<below>\d+)(?!\d|\.\d))?"  # a full stop may follow the denominator
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?P<whole>\d{1,3}(?:(?:,|\{,\}|\u202f|\u00a0)\d{3})+|\d+)(?P<part>\.\d+)?|(?P<bare>\.\d+))"
    rf"{_BELOW}(?P<percent>\s*%|\s+per\s?cent\b)?"
)
_ROOT = re.compile(
    r"(?:(?<![\w.])(?P<times>\d+(?:\.\d+)?(?:/\d+)?)\s*(?P<how>[*/]?)\s*)?"
    rf"sqrt\((?P<under>\d+(?:\.\d+)?(?:/\d+)?)\){_BELOW}"
)
_WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)?")
_MINUS = re.compile(
    r"(?:(?<![\w)\]}|!%'°-])-"  # directly before the number, after no operand
    r"|(?<=[=(\[{,:;<>≤≥≈*/+^&])[ \t]*-[ \t]*"
    r"|\bnegative[ \t]+|\b(?:is|are|be|equals?|gives?|get|to|by|of|or|and|as)[ \t]+minus[ \t]+)\Z",
    re.IGNORECASE,
)
_EITHER = re.compile(r"±[ \t]*\Z")
_LONGEST_SIGN = 24  # number of characters before a number that are searched for its sign

_BARE = re.compile(r"\A-?[\d.,]*(?:sqrt\([\d./]+\))?\Z")  # needs no parentheses as numerator or denominator
# Libraries may hold commands whose first letters were read as escapes of JSON: \frac as a form feed or a space and
# "rac", \boxed as a backspace (\x08) and "oxed".
_FRAC = re.compile(r"(?:\\[dtc]?f|(?<![A-Za-z\\])f?)rac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_SQRT = re.compile(
    r"(?:(?<=[\d})])\s*(?:\*|times(?: the)?)?\s*)?"
    r"(?:\\sqrt|√|(?<![A-Za-z\\])sqrt|\bsquare root of(?: the)?)\s*"
    r"(?:\{([^{}]*)\}|\((\d+(?:\.\d+)?)\)|(\d+(?:\.\d+)?))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Root:
    """An irrational square root."""

    square: Fraction
    negative: bool = False

    def __neg__(self) -> Root:
        return Root(self.square, not self.negative)

    def __str__(self) -> str:
        return f"{'-' if self.negative else ''}√{self.square}"


Value = Fraction | Root


class Found(NamedTuple):
    """One number of a text: its position (sign included) and its possible values (50 % is 50 and 1/2)."""

    start: int
    end: int
    values: set[Value]


def numbers(text: str) -> set[Value]:
    """All values of the numbers in `text`."""
    return {value for found in find(plain(text)) for value in found.values}


def sizes(values: Iterable[Value]) -> set[Value]:
    """The values without their signs."""
    return {Root(value.square) if isinstance(value, Root) else abs(value) for value in values}


def find(text: str) -> list[Found]:
    """The numbers of a text that `plain` has converted."""
    for pattern_to_skip, filler in ((_ENDLESS, "x"), (_NUMBERING, " "), (_ORDINAL, " "), (_NAMED, "x")):
        text = _without(pattern_to_skip, text, filler)
    found = [_signed(text, match, _root(match)) for match in _ROOT.finditer(text)]
    text = _without(_ROOT, text, "x")
    readers: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], set[Value]]], ...] = (
        (_NUMBER, _number),
        (_WORD, _spelled),
    )
    for pattern, read in readers:
        found += [_signed(text, match, values) for match in pattern.finditer(text) if (values := read(match))]
    return sorted(found, key=lambda one: one.start)


def plain(text: str) -> str:
    """Convert LaTeX to plain text: remove wrappers and spacing commands, write out fractions and roots."""
    text = re.sub(r"(?:\\(?:boxed|text|textbf|mathrm|mbox|mathbf)|\x08oxed)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|displaystyle|!|,|;|:|quad|qquad)(?![a-zA-Z])", "", text.replace("\\\\", " "))
    text = re.sub(r"\\(?:cdot|times)(?![a-zA-Z])\s*|[·×]", "*", text).replace("\\pm", "±")
    text = re.sub("[−–]", "-", text)
    for _ in range(2):  # twice, for a root in a fraction and a fraction in a root
        text = _SQRT.sub(lambda match: f"sqrt({match[1] or match[2] or match[3]})", text)
        text = _FRAC.sub(_written_out, text)
    return text.replace("\\", "").replace("$", "").replace("π", "pi")


def _written_out(match: re.Match[str]) -> str:
    """3/4 for \\frac34, and (a+b)/(c) in general; with a space where an adjacent letter or digit would join it."""
    parts = ["".join(part or "" for part in both) for both in (match.group(1, 2), match.group(3, 4))]
    above, below = (part.strip() if _BARE.match(part.strip()) else f"({part})" for part in parts)
    head, tail = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    return f"{' ' if head.isalnum() else ''}{above}/{below}{' ' if tail.isdigit() else ''}"


def _without(pattern: re.Pattern[str], text: str, filler: str) -> str:
    """The text with `filler` in place of every match; all other positions stay the same."""
    return pattern.sub(lambda match: filler * len(match[0]), text)


def _signed(text: str, match: re.Match[str], values: set[Value]) -> Found:
    before = text[max(0, match.start() - _LONGEST_SIGN) : match.start()]
    opposite = {-value for value in values}
    either, minus = _EITHER.search(before), _MINUS.search(before)
    sign = either or minus
    start = match.start() - (len(sign[0]) if sign else 0)
    return Found(start, match.end(), values | opposite if either else opposite if minus else values)


def _number(match: re.Match[str]) -> set[Value]:
    whole = re.sub(r"\D", "", match["whole"] or "")
    value = Fraction((whole or "0") + (match["part"] or match["bare"] or ""))
    if match["below"] and int(match["below"]):
        value /= int(match["below"])
    return {value, value / 100} if match["percent"] else {value}


def _root(match: re.Match[str]) -> set[Value]:
    times, under = _ratio(match["times"] or "1"), _ratio(match["under"])
    square = times**2 / under if match["how"] == "/" and under else times**2 * under
    square /= (int(match["below"] or 1) or 1) ** 2
    root = Fraction(isqrt(square.numerator), isqrt(square.denominator))
    if root**2 == square:
        return {root}
    return {Root(square), times} if times != 1 else {Root(square)}


def _ratio(text: str) -> Fraction:
    above, _, below = text.partition("/")
    return Fraction(above) / (int(below or 1) or 1)


def _spelled(match: re.Match[str]) -> set[Value]:
    word = match[0].lower()
    head, _, tail = word.partition("-")
    if head in _TENS and tail in {*_WORDS, "one"}:
        return {_TENS[head] + _WORDS.get(tail, Fraction(1))}
    return {table[word] for table in (_WORDS, _TENS, _PARTS, _MANY) if word in table}

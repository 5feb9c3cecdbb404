"""Finds what a strategy leaks: the answer, or a number of the response that is not in the problem.

Numbers are compared by value, in whatever form they are written (values.py). A number in a strategy is a leak if

    - it is the answer or a part of the answer (3 and 5 are parts of (3, 5)), and the problem does not contain the
      number with this sign; or
    - the response contains it and the problem does not, with any sign, unless it is 0, 1, 2, 3 or the square root of
      one of these ("two cases", x^2, "the third root"); or
    - the strategy calls it the answer ("the answer is 12", "12 as the result") and this is true, even if the problem
      contains the number.

An answer that is more than one number also leaks if the strategy contains the whole answer and the problem does not,
or if the strategy calls it the answer. Both texts are normalised first (no LaTeX, \\sqrt{3} as sqrt(3), no spaces).
An answer of one letter (multiple choice) leaks only if the strategy calls it the answer ("option C").

In doubt the check rejects: another candidate costs little, but a policy that is shown answers learns to rely on them.
"""

from __future__ import annotations

import re
from fractions import Fraction

from sgpo_async.strategies.values import Root, Value, find, numbers, plain, sizes

STRUCTURAL: frozenset[Value] = frozenset({*map(Fraction, range(4)), Root(Fraction(2)), Root(Fraction(3))})

_CLAIM = re.compile(  # matches up to the position where the answer would begin
    r"\b(?:answer|result|solution|option|choice)s?\b"
    r"(?:[ \t]*(?:(?:is|are|equals?|be|must|will|should|comes?|to|as|therefore|thus|then|just)\b|[:=,*\"'(\[{]))*"
    r"[ \t]*",
    re.IGNORECASE,
)
_CALLED = re.compile(  # matches directly after the answer
    r"""(?i:[)\]}*"' \t]*\b(?:is|as|for|be)\s+(?:the|our|your)\s+(?:\w+\s+)?(?:answer|result|solution)\b)"""
)
_LETTER = re.compile(r"\A\(?([A-Za-z])\)?\Z")


def leaks(strategy: str, *, problem: str, answer: str, response: str) -> list[str]:
    """Descriptions of everything that `strategy` leaks; empty if it leaks nothing."""
    answer = re.sub(r"\A\s*([-−])\s+", r"\1", answer)  # here a minus is a sign, not the mark of a list
    given, told, of_answer = numbers(problem), numbers(strategy), numbers(answer)
    shown = (told & of_answer) - given
    shown |= (sizes(told) & sizes(of_answer)) - sizes(given) - sizes(shown)
    found = [f"the answer's number {value}" for value in sorted(shown, key=str)]
    hidden = sizes(numbers(response)) - sizes(given) - STRUCTURAL - sizes(of_answer)
    found += [f"the response's number {value}" for value in sorted(sizes(told) & hidden, key=str)]
    if _contains(strategy, problem, answer) or _claims(strategy, answer, of_answer - shown):
        found.append(f"the answer {answer.strip()!r:.60}")
    return found


def _contains(strategy: str, problem: str, answer: str) -> bool:
    """Whether the strategy, but not the problem, contains an answer that is more than one number or letter."""
    wanted = plain(answer).strip().strip(".")
    if not wanted or _LETTER.match(wanted) or _is_number(wanted):
        return False
    shape = _shape(wanted, before=r"(?<!\w)")
    return bool(shape.search(_tight(plain(strategy)))) and not shape.search(_tight(plain(problem)))


def _claims(strategy: str, answer: str, values: set[Value]) -> bool:
    """Whether the strategy calls the answer, or one of its `values`, the answer."""
    text = plain(re.sub(r"(?:\\b|\x08)oxed\b", " answer ", strategy))
    claims = [match.end() for match in _CLAIM.finditer(text)]
    for found in find(text):
        if found.values & values and (found.start in claims or _CALLED.match(text, found.end)):
            return True
    wanted = plain(answer).strip().strip(".")
    letter = _LETTER.match(wanted)
    if letter:
        named = re.compile(rf"\b{letter[1]}\b")
        return _is_called(named, text) or any(named.match(text, end) for end in claims)
    wanted = wanted.lstrip("([{")
    if not wanted:
        return False
    if _is_called(_shape(wanted, before=r"(?<!\w)"), _tight(text)):
        return True
    shape = _shape(wanted)
    return any(shape.match(_tight(text[end:])) for end in claims)


def _is_called(shape: re.Pattern[str], text: str) -> bool:
    return re.search(shape.pattern + _CALLED.pattern, text) is not None


def _is_number(answer: str) -> bool:
    """Whether the answer is one number and nothing else."""
    found = find(answer)
    return len(found) == 1 and not re.search(r"[^\s()+]", answer[: found[0].start] + answer[found[0].end :])


def _shape(wanted: str, *, before: str = "") -> re.Pattern[str]:
    """A pattern for `wanted` in a text from `_tight`. Word boundaries count only at letters and digits."""
    tight = _tight(wanted)
    ends = (before if tight[:1].isalnum() else "", r"(?!\w)" if tight[-1:].isalnum() else "")
    return re.compile(ends[0] + re.escape(tight) + ends[1])


def _tight(text: str) -> str:
    """The text in lower case, without spaces around signs and with one space between words."""
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.casefold().split()))

"""What a strategy gives away: the answer, or a number of the response that is not in the problem.

The rule. Numbers are compared by value, whatever their form: 1,200 and 1200; 1/2, \\frac{1}{2}, 0.5, 50 % and "half";
12 and "twelve". A number in a strategy is a leak if

    - it is the answer's value, or a part of the answer (of (3, 5) both), and the problem does not have it; or
    - the response has it and the problem does not, unless it is 0, 1, 2 or 3 ("two cases", x^2, "the third root").

Not numbers: the numbering of steps ("2." or "(2)" at the beginning of a line), ordinals (2nd, "second"), "one", and
what is part of a name (x1, a_2). An answer that is no number is a leak if it stands in the strategy as a whole, both
brought into one form (LaTeX dropped, \\sqrt{3} as sqrt(3), no spaces), and the problem does not have it. An answer of a
single letter, as of a multiple choice, leaks only where the strategy says "answer", "option" or "choice" before it.

It errs on the side of rejecting: another candidate costs little, and a policy that is told answers learns to be told.
"""

from __future__ import annotations

import re
from fractions import Fraction

STRUCTURAL = frozenset(map(Fraction, range(4)))
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
_NAMED = re.compile(r"(?<![\\\w])[A-Za-z]_?\{?\d+\}?")  # x1, a_2, a_{12}
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|\\[dt]?frac\s*(\d)\s*(\d)")
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?P<whole>\d{1,3}(?:(?:,|\\,|\{,\}|\u202f|\u00a0)\d{3})+|\d+)(?P<part>\.\d+)?|(?P<bare>\.\d+))"
    r"(?:\s*/\s*(?P<below>\d+)(?![\d.]))?(?P<percent>\s*\\?%|\s+per\s?cent\b)?"
)
_WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)?")
_LETTER = re.compile(r"\A[A-Za-z]\Z")


def numbers(text: str) -> set[Fraction]:
    """The values that stand in `text`, without signs; a percentage counts as 50 and as 1/2."""
    text = _ORDINAL.sub(" ", _NUMBERING.sub(" ", text))
    found: set[Fraction] = set()

    def fraction(match: re.Match[str]) -> str:
        above, below = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
        if int(below):
            found.add(abs(Fraction(int(above), int(below))))
        return " "

    text = _NAMED.sub(" ", _FRAC.sub(fraction, text))
    for match in _NUMBER.finditer(text):
        found |= _values(match)
    return found | _spelled(text)


def leaks(strategy: str, *, problem: str, answer: str, response: str) -> list[str]:
    """What `strategy` gives away, in words; empty if nothing."""
    given, told = numbers(problem), numbers(strategy)
    of_answer = numbers(plain(answer))
    found = [f"the answer's number {_show(value)}" for value in sorted((told & of_answer) - given)]
    hidden = numbers(response) - given - STRUCTURAL - of_answer
    found += [f"the response's number {_show(value)}" for value in sorted(told & hidden)]
    if _says(strategy, problem, answer, numeric=_is_number(answer)):
        found.append(f"the answer {answer.strip()!r:.60}")
    return found


def plain(text: str) -> str:
    """LaTeX as plain signs: what wraps and spaces is dropped, fractions and roots are written out."""
    text = re.sub(r"\\(?:boxed|text|textbf|mathrm|mbox|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)", text)
    text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)", text).replace("√", "sqrt")
    text = re.sub(r"\\(?:left|right|displaystyle|!|,|;|:|quad|qquad)(?![a-zA-Z])", "", text)
    return text.replace("\\", "").replace("$", "").replace("π", "pi")


def _values(match: re.Match[str]) -> set[Fraction]:
    whole = re.sub(r"\D", "", match["whole"] or "")
    value = Fraction((whole or "0") + (match["part"] or match["bare"] or ""))
    if match["below"] and int(match["below"]):
        value /= int(match["below"])
    return {value, value / 100} if match["percent"] else {value}


def _spelled(text: str) -> set[Fraction]:
    found: set[Fraction] = set()
    for match in _WORD.finditer(text.lower()):
        head, _, tail = match[0].partition("-")
        if head in _TENS and tail in {*_WORDS, "one"}:
            found.add(_TENS[head] + _WORDS.get(tail, Fraction(1)))
            continue
        found |= {table[match[0]] for table in (_WORDS, _TENS, _PARTS, _MANY) if match[0] in table}
    return found


def _is_number(answer: str) -> bool:
    return re.sub(r"[-+\s\d.,/%()]|sqrt", "", plain(answer)) == ""


def _says(strategy: str, problem: str, answer: str, *, numeric: bool) -> bool:
    """Whether an answer that is no number stands in the strategy."""
    wanted = plain(answer).strip().strip(".")
    if numeric or not wanted:
        return False
    if _LETTER.match(wanted.strip("()")):
        letter = wanted.strip("()")
        return bool(re.search(rf"\b(?:answer|option|choice)\W+(?:is\W+)?\(?{letter}\b", strategy))
    shape = re.compile(rf"(?<!\w){re.escape(_tight(wanted))}(?!\w)")
    return bool(shape.search(_tight(plain(strategy)))) and not shape.search(_tight(plain(problem)))


def _tight(text: str) -> str:
    """Without the spaces around signs; between words one stays."""
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.casefold().split()))


def _show(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"

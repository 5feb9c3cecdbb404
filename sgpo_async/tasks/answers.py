r"""Answers in the notation that math-verify reads: what a text gives as its answer, and other spellings of the same.

    final("So \boxed{5}. That was wrong: \boxed{7}.")    "7"
    plain(r"\$32,\!348")                                 "32,348"

`plain` changes only spellings that mean the same wherever they stand in an answer; docs/own-tasks.md lists them.
"""

from __future__ import annotations

import re
import unicodedata

BOX = "\\boxed"
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]")  # a brace after a backslash is a character
_CONNECTED = re.compile(
    r"(?:[\s,;.$*]|\\[()\[\],;! ]|\b(?:and|or)\b|\\text\{\s*(?:and|or)\s*\}|[A-Za-z](?:_\{?\w+\}?)?\s*=)*"
)

_SIGNS = {
    "√": "\\sqrt ", "π": "\\pi ", "∞": "\\infty ", "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ",
    "÷": "\\div ", "≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ",
    "°": "^{\\circ}", "\u2009": "\\,", "\u202f": "\\,", "\u00a0": " ",
}  # fmt: skip
_SIGN = re.compile("|".join(_SIGNS))
_ROOT = re.compile(r"\\sqrt (?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")  # from √: of brackets, a number or a letter
_RAISED = {digit: unicodedata.normalize("NFKC", digit) for digit in "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"}
_LOWERED = {digit: unicodedata.normalize("NFKC", digit) for digit in "₀₁₂₃₄₅₆₇₈₉"}
_FRACTIONS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"

_GROUPS = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\})+(?=\d{3}(?!\d))")  # between the digits of one number: 12\,345
_SPACED = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_CURRENCY = re.compile(r"(?<!\\)\$(?=\s*[\d.])")
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:[CF]\b)?")
_ANGLE = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)")
_MIXED = re.compile(r"(?<![\w.}^/])(\d+)\s*\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))(?![\w.^!])")
_MIXED_SLASH = re.compile(r"(?<![\w.}^/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\w.^!])")
_UNIT = re.compile(  # a number and words; a word of few letters may be a product: 2 xy
    r"(?P<number>-?\d[\d.,]*(?:\s*/\s*\d+)?)\s+"
    r"(?P<unit>(?:[A-Za-z]{4,}|cm|mm|km|kg|mg|ml|ft|yd|mi|mph|kph|lbs?|oz|hrs?|min|sec|gal|sq|cu)(?:[ /][A-Za-z]+)*)\.?"
)
_NO_UNIT = re.compile(
    r"\b(?:pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|inf|infinity|percent|percentage|pct|and|or|mod|to|base|"
    r"hundred|thousand|million|billion|trillion|dozen)\b"
)
_BASE = re.compile(r"([0-9A-Za-z]+)_(?:\{\s*(\d+)\s*\}|(\d+))")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|\.|:)?|\(?([A-J])\)\s*\S.*")


def final(text: str) -> str | None:
    r"""The content of the last box of a text, or of the last boxes if only `,`, `and` or `or` is between them.

    None if there is no box, or if the last one is not closed. An intermediate result in an earlier box does not count.
    """
    boxes = _boxes(text)
    if not boxes or text.find(BOX, boxes[-1][1]) >= 0:
        return None
    contents, first = [text[boxes[-1][2] : boxes[-1][1]].strip()], boxes[-1][0]
    for start, end, inner in reversed(boxes[:-1]):
        if not _CONNECTED.fullmatch(text, end + 1, first):
            break
        content = text[inner:end].strip()
        if content != contents[0]:
            contents.insert(0, content)
        first = start
    return ", ".join(contents)


def plain(answer: str) -> str:
    """An answer without delimiters, in ASCII and LaTeX, with one spelling for each of the kinds above."""
    text = _bare(readable(answer))
    text = text.replace("\\$", "").replace("\\!", "")
    text = text if _is_delimited(text) else _CURRENCY.sub("", text)
    text = _PI.sub(r"\\pi ", _GROUPS.sub("", text)).strip()
    text = text.replace(" ", "") if _SPACED.fullmatch(text) else text
    text = text if _ANGLE.search(text) else _DEGREES.sub("", text)
    text = _MIXED.sub(lambda found: _mixed(found[0], *[group for group in found.groups() if group]), text)
    text = _MIXED_SLASH.sub(lambda found: _mixed(found[0], *found.groups()), text)
    text = re.sub(r"(?<=[\w)}\]])\s*\.$", "", text.strip())
    unit = _UNIT.fullmatch(text)
    return unit["number"] if unit and not _NO_UNIT.search(unit["unit"]) else text


def readable(text: str) -> str:
    """The text with LaTeX instead of mathematical signs of Unicode: √3, x², ½, π."""
    if text.isascii():
        return text
    for fraction in _FRACTIONS:
        above, _, below = unicodedata.normalize("NFKC", fraction).partition("\u2044")
        text = text.replace(fraction, f"\\frac{{{above}}}{{{below}}}")
    for marks, sign in ((_RAISED, "^"), (_LOWERED, "_")):
        run = re.compile(f"[{''.join(marks)}]+")
        text = run.sub(lambda found, marks=marks, sign=sign: f"{sign}{{{''.join(marks[c] for c in found[0])}}}", text)  # type: ignore[misc]
    text = _SIGN.sub(lambda found: _SIGNS[found[0]], text)
    return _ROOT.sub(lambda found: f"\\sqrt{{{found[1] or found[2]}}}", text)


def in_base(answer: str) -> tuple[int, int] | None:
    """(value, base) of a number with its base as a subscript, such as 10110_2; None if it is none."""
    found = _BASE.fullmatch(answer.replace(" ", ""))
    if not found:
        return None
    base = int(found[2] or found[3])
    try:
        return int(found[1], base), base
    except ValueError:
        return None


def choice(answer: str) -> str | None:
    r"""The letter of a multiple-choice answer: B, (B), \text{B}, \textbf{(B)} 12; None if it is none."""
    text = without_fonts(answer).replace("\\ ", " ").strip(" *")
    found = _CHOICE.fullmatch(text)
    return (found[1] or found[2]) if found else None


def without_fonts(text: str) -> str:
    r"""The text without the commands of \text{...}, \textbf{...}, \mathrm{...} and \mathbf{...}."""
    return re.sub(r"\\(?:text|textbf|mathrm|mathbf)\{\s*([^{}]*?)\s*\}", r"\1", text)


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start, position of the closing brace, start of the content) of each closed box that is in no other box."""
    boxes: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int] | None] = []  # the open braces: start and content of a box, None for another brace
    for found in _BRACE.finditer(text):
        if found[0].endswith("{") and len(found[0]) != 2:
            opened.append((found.start(), found.end()) if len(found[0]) > 2 else None)
        elif found[0] == "}" and opened and (box := opened.pop()):
            while boxes and boxes[-1][0] > box[0]:
                boxes.pop()  # within this one
            boxes.append((box[0], found.start(), box[1]))
    return boxes


def _bare(answer: str) -> str:
    r"""The answer without what surrounds it as a whole: \boxed{...}, $...$, \(...\), \[...\]."""
    text = answer.strip()
    while True:
        inner = text
        for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            if len(text) > len(opening) and text.startswith(opening) and text.endswith(closing):
                inner = text[len(opening) : -len(closing)]
                break
        if boxes := _boxes(text):
            start, end, content = boxes[0]
            inner = text[content:end] if (start, end) == (0, len(text) - 1) else inner
        if inner == text or ("$" in inner.replace("\\$", "")):
            return text
        text = inner.strip()


def _is_delimited(text: str) -> bool:
    """Whether the dollar signs delimit mathematics, as in `$3$, $5$`; in `$3, $5` they are a currency."""
    parts = text.split("$")
    return len(parts) % 2 == 1 and all(_CONNECTED.fullmatch(part) for part in parts[::2])


def _mixed(text: str, whole: str, above: str, below: str) -> str:
    """A mixed number as a sum in brackets; unchanged if the fraction is not a proper one, as in a product."""
    return f"({whole}+\\frac{{{above}}}{{{below}}})" if int(above) < int(below) else text

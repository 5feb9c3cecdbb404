"""Compares problem texts by words and n-grams: whether they are equal, nearly equal, or one contains the other.

The words of a text are its runs of letters and digits in lower case, so `$x^2$` and `\\(x^{2}\\)` have the same words.
An operator belongs to the operand that follows it: `1 * 7` has the words `1` and `*7`, and differs from `1 - 7`. Where
a script writes no spaces (Chinese, Japanese), each character is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

Words = tuple[str, ...]
Gram = tuple[str, ...]

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_SIGNS = {  # other ways to write the operators
    "\\times": "*", "\\cdot": "*", "\\ast": "*", "×": "*", "·": "*", "⋅": "*", "\\div": "/", "÷": "/", "−": "-",
    "–": "-", "\\le": "<=", "\\leq": "<=", "≤": "<=", "\\ge": ">=", "\\geq": ">=", "≥": ">=", "\\lt": "<", "\\gt": ">",
    "\\ne": "!=", "\\neq": "!=", "≠": "!=", "\\pm": "±",
}  # fmt: skip
_OPERATOR = re.compile("|".join(rf"{re.escape(sign)}{'(?![a-z])' * (len(sign) > 1)}" for sign in _SIGNS))
_SIGN = re.compile(r"[-+*/=<>^!±%]")
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")


def normalised(text: str) -> str:
    """The text in Unicode form NFC, in lower case, with single spaces. Signs are kept: 3 + 5 is not 3 - 5."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def words_of(text: str) -> Words:
    """The words of `text`, in order, each with the operators between it and the word before it."""
    words, end = [], 0
    text = _OPERATOR.sub(lambda found: f" {_SIGNS[found[0]]} ", normalised(text))
    for match in _WORD.finditer(text):
        gap = text[end : match.start()]
        signs = "".join(_SIGN.findall(gap)) if _is_operand(match[0], gap) else ""
        words.append(signs + match[0])
        end = match.end()
    return tuple(words)


def _is_operand(word: str, gap: str) -> bool:
    """Whether signs before the word are operators: not the hyphen of well-known, nor the asterisk of **bold**."""
    return word[0].isdigit() or len(word) == 1 or gap.endswith("\\")


def grams_of(words: Words, size: int) -> set[Gram]:
    """All n-grams of `size` words; a shorter text is one n-gram as a whole."""
    if len(words) <= size:
        return {words} if words else set()
    return {words[start : start + size] for start in range(len(words) - size + 1)}


@dataclass(frozen=True, kw_only=True)
class Match:
    """A text that matches the given one."""

    index: int  # of the other text
    overlap: float  # in (0, 1]
    shared: str  # an n-gram that both texts have


class Nearest:
    """An index of kept texts that finds those which are nearly equal to a further text.

    The measure is Jaccard similarity: n-grams in both texts, divided by n-grams in either. A text that reaches
    `least` with another shares one of its rarest (1 - least) n-grams with it (prefix filter), so only those are looked
    up. Rarity is counted over all texts in `every`.
    """

    def __init__(self, every: Sequence[Words], *, size: int, least: float) -> None:
        self._grams = [grams_of(words, size) for words in every]
        self._least = least
        self._count = Counter(gram for grams in self._grams for gram in grams)
        self._kept: dict[Gram, list[int]] = defaultdict(list)

    def keep(self, index: int) -> None:
        """Add this text to the index."""
        for gram in self._rarest(index):
            self._kept[gram].append(index)

    def matches(self, index: int) -> list[Match]:
        """The kept texts that nearly equal this one, the most similar first, then the earliest."""
        mine = self._grams[index]
        found = []
        for other in sorted({other for gram in self._rarest(index) for other in self._kept.get(gram, [])}):
            both = mine & self._grams[other]
            overlap = len(both) / len(mine | self._grams[other])
            if overlap >= self._least:
                found.append(Match(index=other, overlap=overlap, shared=" ".join(min(both))))
        return sorted(found, key=lambda match: -match.overlap)

    def _rarest(self, index: int) -> list[Gram]:
        grams = sorted(self._grams[index], key=lambda gram: (self._count[gram], gram))
        # Prefix filter: floor with a margin, so that rounding errors can only add n-grams to the lookup.
        return grams[: len(grams) - int(self._least * len(grams) - 1e-9)]


class Contained:
    """An index of evaluation texts that finds those which share n-grams with a training text, or contain it.

    For two texts of at least `size` words, the overlap is the number of common n-grams divided by the smaller number of
    n-grams. A shorter text has overlap 1 with every text that contains it.
    """

    def __init__(self, texts: Sequence[Words], *, size: int) -> None:
        self._size = size
        self._joined = [_joined(words) for words in texts]
        self._short = [index for index, words in enumerate(texts) if 0 < len(words) < size]
        self._grams = [grams_of(words, size) if len(words) >= size else set() for words in texts]
        self._holders: dict[Gram, list[int]] = defaultdict(list)
        for index, grams in enumerate(self._grams):
            for gram in grams:
                self._holders[gram].append(index)

    def best(self, words: Words) -> Match | None:
        """The evaluation text with the largest overlap, the earliest of several; None if there is no overlap."""
        if not words:
            return None
        mine, joined = grams_of(words, self._size), _joined(words)
        if len(words) < self._size:
            whole = [index for index, text in enumerate(self._joined) if joined in text or self._within(index, joined)]
            return Match(index=whole[0], overlap=1.0, shared=joined.strip()) if whole else None
        for index in self._short:
            if self._within(index, joined):
                return Match(index=index, overlap=1.0, shared=self._joined[index].strip())
        shared: dict[int, list[Gram]] = defaultdict(list)
        for gram in mine:
            for index in self._holders.get(gram, []):
                shared[index].append(gram)
        if not shared:
            return None
        overlap = {index: len(both) / min(len(mine), len(self._grams[index])) for index, both in shared.items()}
        index = min(overlap, key=lambda index: (-overlap[index], index))
        return Match(index=index, overlap=overlap[index], shared=" ".join(min(shared[index])))

    def _within(self, index: int, joined: str) -> bool:
        return self._joined[index] != "" and self._joined[index] in joined


def _joined(words: Words) -> str:
    return f" {' '.join(words)} " if words else ""

"""From replies to the candidates worth ranking, and from scores to the best: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sgpo_async.strategies.leaks import leaks
from sgpo_async.strategies.parse import Unreadable, parse_strategy
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.overlap import grams_of, words_of

SAME = 0.8  # share of word trigrams that two candidates have in common (Jaccard) to count as one


@dataclass(frozen=True, kw_only=True)
class Sifted:
    """What became of the replies of one problem."""

    kept: list[str] = field(default_factory=list)  # texts, in order
    places: list[int] = field(default_factory=list)  # of the replies that they are
    rejected: list[dict[str, str]] = field(default_factory=list)  # reason ("unreadable", "leak", "duplicate"), detail


def sift(replies: Sequence[str], problem: Problem) -> Sifted:
    """Read each reply, and drop what leaks and what an earlier one said already."""
    sifted = Sifted()
    for place, reply in enumerate(replies):
        try:
            text = parse_strategy(reply).text()
        except Unreadable as reason:
            sifted.rejected.append({"reason": "unreadable", "detail": str(reason), "text": reply[:500]})
            continue
        given_away = leaks(text, problem=problem.problem, answer=problem.answer, response=problem.response or "")
        if given_away:
            sifted.rejected.append({"reason": "leak", "detail": "; ".join(given_away), "text": text})
        elif any(alike(text, other) for other in sifted.kept):
            sifted.rejected.append({"reason": "duplicate", "detail": "says what an earlier one says", "text": text})
        else:
            sifted.kept.append(text)
            sifted.places.append(place)
    return sifted


def alike(one: str, other: str) -> bool:
    """Whether two candidates are nearly the same words."""
    a, b = (grams_of(words_of(text), 3) for text in (one, other))
    return len(a & b) >= SAME * len(a | b)


def best_of(scores: Sequence[dict[str, Any]]) -> int:
    """The place of the highest sum; of equals the one with the higher worst score, then the first."""
    return max(range(len(scores)), key=lambda i: (sum(scores[i].values()), min(scores[i].values()), -i))

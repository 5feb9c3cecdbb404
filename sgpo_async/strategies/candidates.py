"""Filters replies down to the candidates worth ranking, and picks the best one by its scores. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sgpo_async.strategies.leaks import leaks
from sgpo_async.strategies.parse import Unreadable, parse_strategy
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.overlap import grams_of, words_of

SAME = 0.8  # two candidates are duplicates from this Jaccard similarity of their word trigrams on


@dataclass(frozen=True, kw_only=True)
class FilteredReplies:
    """The replies to one problem, split into kept candidates and rejected ones."""

    kept: list[str] = field(default_factory=list)  # candidate texts, in the order of the replies
    indices: list[int] = field(default_factory=list)  # for each kept candidate, the index of its reply
    rejected: list[dict[str, str]] = field(default_factory=list)  # reason ("unreadable", "leak", "duplicate"), detail


def filter_replies(replies: Sequence[str], problem: Problem) -> FilteredReplies:
    """Parse each reply, and reject unreadable replies, leaks, and duplicates of an earlier candidate."""
    filtered = FilteredReplies()
    for index, reply in enumerate(replies):
        try:
            text = parse_strategy(reply).text()
        except Unreadable as reason:
            filtered.rejected.append({"reason": "unreadable", "detail": str(reason), "text": reply[:500]})
            continue
        leaked = leaks(text, problem=problem.problem, answer=problem.answer, response=problem.response or "")
        if leaked:
            filtered.rejected.append({"reason": "leak", "detail": "; ".join(leaked), "text": text})
        elif any(alike(text, other) for other in filtered.kept):
            filtered.rejected.append(
                {"reason": "duplicate", "detail": "nearly the same text as an earlier candidate", "text": text}
            )
        else:
            filtered.kept.append(text)
            filtered.indices.append(index)
    return filtered


def alike(one: str, other: str) -> bool:
    """Whether two candidates consist of nearly the same words (Jaccard similarity of trigrams >= SAME)."""
    a, b = (grams_of(words_of(text), 3) for text in (one, other))
    return len(a & b) >= SAME * len(a | b)


def best_of(scores: Sequence[dict[str, Any]]) -> int:
    """The index of the highest sum. Ties go to the higher worst score, then to the lower index."""
    return max(range(len(scores)), key=lambda i: (sum(scores[i].values()), min(scores[i].values()), -i))

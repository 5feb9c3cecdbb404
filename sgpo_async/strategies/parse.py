"""Strict reading of what a model replied: one JSON object of the form asked for, or the reason why it is not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgpo_async.strategies.prompts import CRITERIA, SCORES, STEPS

LONGEST = 600  # characters of one part: a strategy is no solution
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)
_NUMBERING = re.compile(r"\A\s*(?:step\s+)?\(?\d{1,2}[.):]\s+", re.IGNORECASE)  # not 3.5


class Unreadable(Exception):
    """A reply that is not what was asked for; says how."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A candidate that could be read."""

    type: str
    strategy: str
    steps: tuple[str, ...]

    def text(self) -> str:
        """As it stands before a problem."""
        steps = "\n".join(f"{number}. {step}" for number, step in enumerate(self.steps, 1))
        return f"Problem type: {self.type}\nStrategy: {self.strategy}\nSteps:\n{steps}"


def parse_strategy(reply: str) -> Strategy:
    """Raises Unreadable."""
    found = _object(reply, {"type", "strategy", "steps"})
    steps = found["steps"]
    if not isinstance(steps, list) or len(steps) not in STEPS:
        raise Unreadable(f"steps is no list of {STEPS.start} to {STEPS.stop - 1}")
    return Strategy(
        type=_sentence(found["type"], "type"),
        strategy=_sentence(found["strategy"], "strategy"),
        steps=tuple(_NUMBERING.sub("", _sentence(step, "a step")) for step in steps),
    )


def parse_scores(reply: str, candidates: int) -> list[dict[str, int]]:
    """The four scores of each candidate, 1 to 5. Raises Unreadable."""
    scores = _object(reply, {"scores"})["scores"]
    if not isinstance(scores, list) or len(scores) != candidates:
        raise Unreadable(f"scores is no list of {candidates}")
    for one in scores:
        if not isinstance(one, dict) or set(one) != set(CRITERIA):
            raise Unreadable(f"a score has not the keys {', '.join(CRITERIA)}")
        for name, value in one.items():
            if isinstance(value, bool) or not isinstance(value, int) or value not in SCORES:
                raise Unreadable(f"the score {name} is no whole number from 1 to 5")
    return scores


def _object(reply: str, keys: set[str]) -> Mapping[str, Any]:
    text = reply.strip()
    fenced = _FENCE.match(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise Unreadable("not one JSON object") from None
    if not isinstance(found, dict):
        raise Unreadable("not one JSON object")
    if set(found) != keys:
        raise Unreadable(f"the keys are not {', '.join(sorted(keys))}")
    return found


def _sentence(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Unreadable(f"{name} is no text")
    if len(value) > LONGEST:
        raise Unreadable(f"{name} is longer than {LONGEST} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unreadable(f"{name} is no Unicode text") from None
    return " ".join(value.split())

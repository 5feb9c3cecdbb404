"""Parses the replies of a model strictly: one JSON object of the requested form, or the reason why it is invalid."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgpo_async.strategies.prompts import CRITERIA, SCORES, STEPS

LONGEST = 600  # characters of one field: a strategy must not be a whole solution
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)
_NUMBERING = re.compile(r"\A\s*(?:step\s+)?\(?\d{1,2}[.):]\s+", re.IGNORECASE)  # does not match 3.5


class Unreadable(Exception):
    """The reply does not have the requested form; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A parsed candidate."""

    type: str
    strategy: str
    steps: tuple[str, ...]

    def text(self) -> str:
        """The text that a guided prompt shows before the problem."""
        steps = "\n".join(f"{number}. {step}" for number, step in enumerate(self.steps, 1))
        return f"Problem type: {self.type}\nStrategy: {self.strategy}\nSteps:\n{steps}"


def parse_strategy(reply: str) -> Strategy:
    """The candidate in `reply`. Raises Unreadable."""
    found = _object(reply, {"type", "strategy", "steps"})
    steps = found["steps"]
    if not isinstance(steps, list) or len(steps) not in STEPS:
        raise Unreadable(f"steps must be a list of {STEPS.start} to {STEPS.stop - 1} texts")
    return Strategy(
        type=_sentence(found["type"], "type"),
        strategy=_sentence(found["strategy"], "strategy"),
        steps=tuple(_NUMBERING.sub("", _sentence(step, "a step")) for step in steps),
    )


def parse_scores(reply: str, candidates: int) -> list[dict[str, int]]:
    """The four scores of each candidate, 1 to 5. Raises Unreadable."""
    scores = _object(reply, {"scores"})["scores"]
    if not isinstance(scores, list) or len(scores) != candidates:
        raise Unreadable(f"scores must be a list of {candidates} objects")
    for one in scores:
        if not isinstance(one, dict) or set(one) != set(CRITERIA):
            raise Unreadable(f"each score must have the keys {', '.join(CRITERIA)}")
        for name, value in one.items():
            if isinstance(value, bool) or not isinstance(value, int) or value not in SCORES:
                raise Unreadable(f"the score {name} must be a whole number from 1 to 5")
    return scores


def _object(reply: str, keys: set[str]) -> Mapping[str, Any]:
    text = reply.strip()
    fenced = _FENCE.match(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise Unreadable("the reply must be one JSON object") from None
    if not isinstance(found, dict):
        raise Unreadable("the reply must be one JSON object")
    if set(found) != keys:
        raise Unreadable(f"the keys must be {', '.join(sorted(keys))}")
    return found


def _sentence(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Unreadable(f"{name} must be text")
    if len(value) > LONGEST:
        raise Unreadable(f"{name} must have at most {LONGEST} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unreadable(f"{name} must be valid Unicode") from None
    return " ".join(value.split())

"""Parses the replies of a model: the one JSON object of the requested form, or the reason why there is none.

A model may think first, write prose or a fence around the object, and leave backslashes of LaTeX undoubled. The object
itself is read strictly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sgpo_async.strategies.latex import keep_commands
from sgpo_async.strategies.prompts import CRITERIA, SCORES, STEPS

LONGEST = 600  # characters of one field: a strategy must not be a whole solution
_DECODER = json.JSONDecoder(strict=False)  # accepts line breaks in a text
# Thoughts before the reply. Some chat templates put the tag that begins them into the prompt. Thoughts without an end
# were cut off, and with them the reply.
_THOUGHTS = re.compile(r"\A(?:.*?</(think|thinking|reasoning)>|\s*<(think|thinking|reasoning)>.*)", re.DOTALL | re.I)
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
    """The object of the reply that has these keys."""
    objects = list(_objects(keep_commands(_THOUGHTS.sub("", reply))))
    found = [one for one in objects if set(one) == keys]
    if len(found) == 1:
        return found[0]
    if objects and not found:
        raise Unreadable(f"the keys must be {', '.join(sorted(keys))}")
    raise Unreadable(f"the reply must be one JSON object, got {len(found) or 'none'}")


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, without those inside of others."""
    start = text.find("{")
    while start >= 0:
        try:
            found, end = _DECODER.raw_decode(text, start)
            yield found
        except RecursionError:
            return
        except ValueError:
            end = start + 1
        start = text.find("{", end)


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

"""The prompts for extraction and ranking. The paper (arXiv 2606.24064) gives contents and criteria, not the wording."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

EXTRACT = """You are given a problem and a correct solution of it. Describe the strategy of the solution, so that a
student who has not seen it could solve this problem, and others of its kind, alone.

Write three things:
- "type": what type of problem this is, as specific as a textbook would put it.
- "strategy": the approach, in one or two sentences: the key idea and why it fits.
- "steps": two to eight general steps in order, each one sentence.

Rules:
- Never state the answer, nor any result that is computed on the way.
- No number that is not in the problem itself. Name quantities instead of giving their values.
- General enough for other problems of this type, specific enough to be a help with this one.

Reply with one JSON object and nothing else:
{{"type": "...", "strategy": "...", "steps": ["...", "..."]}}

Problem:
{problem}

Solution:
{response}"""

RANK = """Below are a problem, a correct solution, and {count} candidate strategies for a student who will not see the
solution. Judge each candidate by four criteria, each with a whole number from 1 (bad) to 5 (very good):
- "type": the type of problem is named correctly and specifically.
- "approach": the approach is appropriate to the problem and not trivial.
- "abstraction": the level is right: neither a solution in disguise nor empty advice.
- "clean": no intermediate result and no answer is given away.

Reply with one JSON object and nothing else, one entry for each candidate, in order:
{{"scores": [{{"type": 3, "approach": 3, "abstraction": 3, "clean": 3}}]}}

Problem:
{problem}

Solution:
{response}

{candidates}"""

SCORES = [1, 2, 3, 4, 5]
STEPS = range(2, 9)
CRITERIA = ("type", "approach", "abstraction", "clean")
EXTRACT_DIGEST, RANK_DIGEST = (hashlib.blake2b(p.encode(), digest_size=6).hexdigest() for p in (EXTRACT, RANK))
"""Digests of the prompts; recorded as part of a strategy's provenance."""


class Prompt(NamedTuple):
    """The text of a request, and the form of its reply."""

    text: str
    schema: Mapping[str, Any]  # JSON schema


def extract_prompt(problem: str, response: str) -> Prompt:
    """The prompt that requests one candidate."""
    text = {"type": "string"}
    steps = _list(text, STEPS.start, STEPS.stop - 1)
    schema = _object({"type": text, "strategy": text, "steps": steps})
    return Prompt(EXTRACT.format(problem=problem, response=response), schema)


def rank_prompt(problem: str, response: str, candidates: Sequence[str]) -> Prompt:
    """The prompt that requests the scores of all candidates."""
    count = len(candidates)
    numbered = "\n\n".join(f"Candidate {i}:\n{text}" for i, text in enumerate(candidates, 1))
    score = _object({name: {"type": "integer", "enum": SCORES} for name in CRITERIA})
    schema = _object({"scores": _list(score, count, count)})
    return Prompt(RANK.format(problem=problem, response=response, count=count, candidates=numbered), schema)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    """A schema that requires all `properties` and allows no others, as servers demand for strict schemas."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _list(items: dict[str, Any], least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}

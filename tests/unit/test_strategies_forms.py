"""The JSON schema of a request and the parser of its reply agree, except for the length of texts."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.strategies.parse import LONGEST, parse_scores, parse_strategy
from sgpo_async.strategies.prompts import extract_prompt, rank_prompt

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=LONGEST).filter(str.strip)


def values_matching(schema: Any) -> st.SearchStrategy[Any]:
    """Values that match a JSON schema; supports only the schema keywords that this package uses."""
    if schema["type"] == "object":
        assert schema["required"] == list(schema["properties"]) and schema["additionalProperties"] is False
        return st.fixed_dictionaries({name: values_matching(inner) for name, inner in schema["properties"].items()})
    if schema["type"] == "array":
        return st.lists(values_matching(schema["items"]), min_size=schema["minItems"], max_size=schema["maxItems"])
    return st.sampled_from(schema["enum"]) if "enum" in schema else TEXTS


@given(st.data())
def test_the_parser_accepts_a_candidate_that_matches_its_schema(data: st.DataObject) -> None:
    reply = data.draw(values_matching(extract_prompt("p", "r").schema))
    read = parse_strategy(json.dumps(reply))
    assert (read.type, len(read.steps)) == (" ".join(reply["type"].split()), len(reply["steps"]))


@given(st.integers(1, 5), st.data())
def test_the_parser_accepts_scores_that_match_their_schema(candidates: int, data: st.DataObject) -> None:
    reply = data.draw(values_matching(rank_prompt("p", "r", ["c"] * candidates).schema))
    assert parse_scores(json.dumps(reply), candidates) == reply["scores"]

"""The validation and test problems of a trial."""

import json
from pathlib import Path

import pytest
import xxhash

from sgpo_async.experiments.trial import STREAM_SEED, split_held_out
from sgpo_async.tasks.sources import open_source


def test_validation_and_test_share_no_text_even_if_the_file_repeats_texts(tmp_path: Path) -> None:
    """The file has twenty texts, each twice; validation and test get three texts each, with their duplicates."""
    path = tmp_path / "sums.jsonl"
    rows = [{"problem": f"{number} + 1", "answer": str(number + 1)} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    source = open_source("file", path=str(path), held_out=6, seed=STREAM_SEED)
    validation, test = split_held_out(source.held_out(), 3)
    assert (len(validation), len(test)) == (6, 6)
    texts, others = ({problem.problem for problem in part} for part in (validation, test))
    assert (len(texts), len(others)) == (3, 3) and not texts & others


@pytest.mark.parametrize(
    ("count", "digests"),
    [
        (4, ["070848708e3693fa", "497ade2a18dfcb4e"]),
        (200, ["dc15b6b513d9d8d4", "99522257417ba4bf"]),
    ],
)
def test_the_built_in_problems_do_not_change(count: int, digests: list[str]) -> None:
    """The committed results were measured on these problems."""
    source = open_source("cues", path="", held_out=2 * count, seed=STREAM_SEED)
    parts = split_held_out(source.held_out(), count)
    assert [len(part) for part in parts] == [count, count]
    texts = ["\n".join(problem.id + problem.problem for problem in part) for part in parts]
    assert [xxhash.xxh64(text.encode()).hexdigest() for text in texts] == digests

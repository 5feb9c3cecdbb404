"""`sgpo-async strategies check` on strategies of the user's own."""

import json
from pathlib import Path

import pytest

from sgpo_async.cli.main import main


def test_a_strategy_without_a_response_is_checked_for_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"problem": "What is 3 + 4?", "answer": "7", "strategy": "The answer is 7."},
        {"problem": "What is 3 + 5?", "answer": "8", "strategy": "Add 2, then 3 more."},
        {"problem": "What is 3 + 6?", "answer": "9", "strategy": "Go to 5 first.", "response": "3 + 2 = 5, 5 + 4 = 9"},
        {"problem": "What is 3 + 7?", "answer": "10"},
    ]
    library = tmp_path / "own.jsonl"
    library.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["strategies", "check", str(library)]) == 1
    assert capsys.readouterr().out == (
        f"{library}:1: the answer's number 7; the answer '7'\n"
        f"{library}:3: the response's number 5\n"
        "4 problems, 3 with a strategy, 2 of which leak\n"
        "2 have no response: only the answer was looked for in their strategies\n"
    )

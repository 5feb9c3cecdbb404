"""Demonstrations: the responses of problems, read and tokenised by the learner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sgpo_async.config.schema import Algorithm, Run, Tasks
from sgpo_async.errors import DataError
from sgpo_async.learner.demonstrations import Demonstrations
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.tasks.verify import VERIFIERS

LUFFY = Algorithm(objective="luffy")


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_tokenizer(model_folder("builtin:cues"))


def file_run(path: Path, responses: list[str | None]) -> Run:
    rows = [{"problem": f"problem {i}", "answer": "1", "response": text} for i, text in enumerate(responses)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return Run(tasks=Tasks(source="file", path=str(path), held_out=1), algorithm=LUFFY)


def test_a_demonstration_is_the_correct_response_to_the_problem_of_its_task(tokenizer: object) -> None:
    run = Run(seed=3, algorithm=LUFFY)
    source = source_of(run)
    demonstrations, task_sampler = Demonstrations(run, source, tokenizer), TaskSampler(run, source)
    for number in (0, 7, 1000):
        tokens = demonstrations.tokens(number)
        assert tokens is not None
        assert (tokens.dtype, tokens[-1]) == ("int32", tokenizer.eos_token_id)
        text, task = tokenizer.decode(tokens, skip_special_tokens=True), task_sampler.task(number)
        assert text == task.problem.response
        assert VERIFIERS["cues"](task.problem.answer, text)


def test_a_problem_without_a_response_has_no_demonstration(tmp_path: Path, tokenizer: object) -> None:
    run = file_run(tmp_path / "some.jsonl", ["raise 1", None, "raise 2", None, None])
    source = source_of(run)
    demonstrations, task_sampler = Demonstrations(run, source, tokenizer), TaskSampler(run, source)
    found = [demonstrations.tokens(number) is not None for number in range(8)]
    assert found == [task_sampler.task(number).problem.response is not None for number in range(8)]
    assert len(set(found)) == 2


def test_a_response_beyond_the_positions_of_the_model_is_left_out_with_one_warning(
    tmp_path: Path, tokenizer: object, caplog: pytest.LogCaptureFixture
) -> None:
    run = file_run(tmp_path / "some.jsonl", ["raise 1", "raise " * 30] * 3)
    source = source_of(run)
    problems = [TaskSampler(run, source).task(number).problem for number in range(8)]
    for longest, some in (
        (33, False),
        (32, True),
        (4, True),
    ):  # the prompt has two tokens, the longer response 31 with its end token
        caplog.clear()
        demonstrations = Demonstrations(run, source, tokenizer, longest=longest)
        expected = [2 + len(problem.response.split()) + 1 > longest for problem in problems]
        assert any(expected) == some
        assert [demonstrations.tokens(number) is None for number in range(8)] == expected
        assert [demonstrations.tokens(number) is None for number in range(8)] == expected
        left_out = {problem.id for problem, out in zip(problems, expected, strict=True) if out}
        assert len(caplog.messages) == len(left_out)  # one for each problem
        assert all("the response is left out" in message for message in caplog.messages)


def test_the_error_for_a_source_without_any_response_is_one_line(tmp_path: Path, tokenizer: object) -> None:
    run = file_run(tmp_path / "none.jsonl", [None, None, None])
    with pytest.raises(
        DataError, match=r"none\.jsonl: algorithm\.objective=luffy needs responses, but no training problem has one"
    ) as caught:
        source_of(run)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_token_is_rejected(tokenizer: object) -> None:
    without_end = load_tokenizer(model_folder("builtin:cues"))
    without_end.eos_token = None
    with pytest.raises(DataError, match=r"model\.path: .*: the tokenizer has no end token; set its eos_token"):
        Demonstrations(replace(Run(), algorithm=LUFFY), source_of(Run()), without_end)

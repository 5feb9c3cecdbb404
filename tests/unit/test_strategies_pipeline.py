"""The pipeline with a scripted endpoint: failures, the requests that the next run sends, recorded provenance."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sgpo_async.cli import strategies as command
from sgpo_async.errors import DataError, EndpointError
from sgpo_async.strategies.endpoint import Declined, Endpoint, Reply, Server, _read, _RetryLater
from sgpo_async.strategies.journal import Journal
from sgpo_async.strategies.library import journal_metrics, write_library
from sgpo_async.strategies.pipeline import Pipeline
from sgpo_async.strategies.prompts import Prompt
from sgpo_async.tasks.base import Problem

PROBLEMS = [
    Problem(id=f"p{i}", problem=f"How many of {'abc'[i]}?", answer="37", response="111 - 74 = 37.") for i in range(3)
]
KINDS = ("Isolate the unknown", "Draw a picture", "Work backwards", "Look for symmetry", "Count in two ways")
HIGH, LOW = (dict.fromkeys(("type", "approach", "abstraction", "clean"), value) for value in (5, 2))


def candidate(text: str) -> str:
    return json.dumps({"type": text, "strategy": f"{text}, then finish.", "steps": ["Begin.", f"{text} again."]})


def scores(first: dict[str, int], rest: dict[str, int]) -> Callable[[int], str]:
    return lambda count: json.dumps({"scores": [first, *[rest] * (count - 1)]})


class Scripted:
    """An endpoint with one model. `extract` and `rank` get the number of earlier requests of their kind."""

    def __init__(self, model: str = "EXTRACTOR", *, extract: object = None, rank: object = None) -> None:
        self.server = Server(url="http://host/v1", model=model)
        self.extract = extract or (lambda index: candidate(KINDS[index % 5]))
        self.rank = rank or (lambda index: scores(HIGH, LOW))
        self.extracted: list[int] = []  # seeds
        self.ranked: list[tuple[float, int]] = []  # temperatures and seeds
        self.paid = [0, 0]

    async def chat(self, request: Prompt, *, temperature: float, seed: int) -> Reply:
        await asyncio.sleep(0)
        prompt = request.text
        if "candidate strategies" in prompt:
            self.ranked.append((temperature, seed))
            text = self.rank(len(self.ranked) - 1)
            text = text(prompt.count("Candidate ")) if callable(text) else text
        else:
            self.extracted.append(seed)
            text = self.extract(len(self.extracted) - 1)
        if isinstance(text, Exception):
            raise text
        reply = Reply(text, len(prompt), len(text))
        self.paid[0] += reply.prompt_tokens
        self.paid[1] += reply.completion_tokens
        return reply


def run(path: Path, endpoint: Scripted, action: str = "extract", problems: list[Problem] = PROBLEMS[:1]) -> Journal:
    """Run the pipeline, and return the journal as the next command reads it."""
    journal = Journal(path)
    pipeline = Pipeline(endpoint, journal, concurrency=1)
    try:
        asyncio.run(pipeline.extract(problems) if action == "extract" else pipeline.rank())
    finally:
        journal.close()
    journal = Journal(path)
    journal.close()
    return journal


def only_record(journal: Journal) -> dict:
    (record,) = journal.records.values()
    return record


def row(journal: Journal, path: Path) -> dict:
    assert write_library(path, journal.records.values()) == 1
    return json.loads(path.read_text())


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work.jsonl"


def test_the_library_names_the_extractor_and_the_judge(work: Path, tmp_path: Path) -> None:
    before = row(run(work, Scripted()), tmp_path / "before.jsonl")
    assert (before["model"], before["judge"]) == ("EXTRACTOR", "EXTRACTOR")
    judge = Scripted("JUDGE", rank=lambda index: scores(LOW, HIGH))
    after = row(run(work, judge, "rank"), tmp_path / "after.jsonl")
    assert (after["model"], after["judge"]) == ("EXTRACTOR", "JUDGE")
    assert after["strategy"] != before["strategy"]
    unchanged = ("model", "endpoint", "prompts", "version", "time", "response", "candidates")
    assert [after[name] for name in unchanged] == [before[name] for name in unchanged]
    assert before["prompts"] != before["judge_prompts"] == after["judge_prompts"]


def test_a_reranking_that_fails_keeps_the_older_scores(work: Path, tmp_path: Path) -> None:
    before = row(run(work, Scripted()), tmp_path / "before.jsonl")
    journal = run(work, Scripted("JUDGE", rank=lambda index: "nonsense"), "rank")
    assert row(journal, tmp_path / "after.jsonl") == before
    assert only_record(journal)["rerank_failed"]["model"] == "JUDGE"
    assert "unreadable scores: the reply must be one JSON object" in only_record(journal)["rerank_failed"]["reason"]
    assert journal_metrics(journal)["old_scores"] == 1
    journal = run(work, Scripted("JUDGE"), "rank")
    assert "rerank_failed" not in only_record(journal)
    assert row(journal, tmp_path / "after.jsonl")["judge"] == "JUDGE"


def test_an_interrupted_ranking_resumes_where_it_stopped(work: Path) -> None:
    run(work, Scripted(), problems=PROBLEMS)
    first = Scripted("JUDGE", rank=lambda index: scores(LOW, HIGH) if index < 2 else EndpointError("gone"))
    with pytest.raises(EndpointError):
        run(work, first, "rank")
    second = Scripted("JUDGE")
    journal = run(work, second, "rank")
    assert len(second.ranked) == 1
    assert {record["judge"]["model"] for record in journal.records.values()} == {"JUDGE"}
    third = Scripted("JUDGE")
    run(work, third, "rank")
    assert third.ranked == []


def test_a_declined_request_costs_only_its_own_candidate(work: Path) -> None:
    endpoint = Scripted(extract=lambda index: Declined("status 400") if index == 2 else candidate(KINDS[index]))
    record = only_record(run(work, endpoint))
    assert record["failed"] is None
    assert len(record["candidates"]) == 4
    assert len(endpoint.ranked) == 1


def test_the_next_run_requests_only_the_missing_candidates(work: Path) -> None:
    replies = ["nonsense", Declined("status 400"), "nonsense", "nonsense", Declined("status 400")]
    first = Scripted(extract=lambda index: replies[index])
    assert only_record(run(work, first))["failed"] == "extraction: status 400"
    second = Scripted()
    record = only_record(run(work, second))
    assert second.extracted == [first.extracted[1], first.extracted[4]]
    assert len(record["candidates"]) == 2
    assert [rejection["reason"] for rejection in record["rejected"]] == ["unreadable"] * 3


def test_the_next_run_requests_new_candidates_if_all_were_rejected(work: Path) -> None:
    first, second = Scripted(extract=lambda index: "nonsense"), Scripted()
    assert only_record(run(work, first))["failed"] == "no candidate is left (unreadable)"
    assert len(only_record(run(work, second))["candidates"]) == 5
    assert len(second.extracted) == 5
    assert not set(second.extracted) & set(first.extracted)  # the same seeds might produce the same replies


def test_after_a_failed_ranking_the_candidates_are_not_requested_again(work: Path) -> None:
    assert only_record(run(work, Scripted(rank=lambda index: Declined("too long"))))["failed"] == "ranking: too long"
    second = Scripted()
    assert only_record(run(work, second))["failed"] is None
    assert (len(second.extracted), len(second.ranked)) == (0, 1)


def test_an_unreadable_ranking_is_retried_at_a_temperature_above_zero(work: Path) -> None:
    first, second = Scripted(rank=lambda index: "nonsense"), Scripted()
    assert only_record(run(work, first))["failed"].startswith("ranking: unreadable scores")
    run(work, second)
    temperatures, seeds = zip(*first.ranked, *second.ranked, strict=True)
    assert temperatures[0] == 0
    assert min(temperatures[1:]) > 0
    assert len(set(seeds)) == len(temperatures) == 4


def test_replies_before_an_interruption_are_used_and_counted(work: Path) -> None:
    first = Scripted(extract=lambda index: EndpointError("gone") if index == 3 else candidate(KINDS[index]))
    with pytest.raises(EndpointError):
        run(work, first)
    journal = Journal(work)
    journal.close()
    assert journal_metrics(journal)["interrupted"] == 1
    assert [journal_metrics(journal)[name] for name in ("prompt_tokens", "completion_tokens")] == first.paid
    second = Scripted(extract=lambda index: candidate(KINDS[3]))
    assert len(only_record(run(work, second))["candidates"]) == 5
    assert second.extracted == [first.extracted[3]]


def test_the_metrics_count_the_tokens_of_all_runs(work: Path) -> None:
    runs = [
        (Scripted(extract=lambda index: "nonsense"), "extract"),
        (Scripted(extract=lambda index: Declined("no") if index % 2 else candidate(KINDS[index % 5])), "extract"),
        (Scripted("JUDGE", rank=lambda index: "nonsense"), "rank"),
        (Scripted("JUDGE"), "rank"),
    ]
    for endpoint, action in runs:
        journal = run(work, endpoint, action, PROBLEMS)
    found = journal_metrics(journal, prompt_price=1e6, completion_price=1e6)
    paid = [sum(endpoint.paid[index] for endpoint, _ in runs) for index in (0, 1)]
    assert [found["prompt_tokens"], found["completion_tokens"]] == paid
    assert found["cost"] == sum(paid)


def test_a_reply_without_text_is_not_requested_again() -> None:
    body = {"choices": [{"message": {"content": None}}], "usage": {"prompt_tokens": 9, "completion_tokens": 1024}}
    assert _read(json.dumps(body)) == Reply("", 9, 1024)


def test_a_reply_that_the_server_aborted_is_requested_again() -> None:
    choice = {"message": {"content": "{"}, "finish_reason": "abort"}
    with pytest.raises(_RetryLater, match="the server aborted the reply"):
        _read(json.dumps({"choices": [choice]}))
    assert _read(json.dumps({"choices": [choice | {"finish_reason": "length"}]})).text == "{"


def test_a_request_has_the_fields_given_on_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    extra = '{"max_tokens": null, "max_completion_tokens": 4096, "reasoning_effort": "low"}'
    arguments = ["extract", "x.jsonl", "--url", "http://host/v1", "--model", "m"]
    endpoint = Endpoint(command._server(parser.parse_args([*arguments, "--max-tokens", "2048"])))
    prompt = Prompt("p", {"type": "object"})
    assert endpoint._request(prompt, 1.0, 3)["max_tokens"] == 2048
    endpoint = Endpoint(command._server(parser.parse_args([*arguments, "--extra", extra])))
    messages = [{"role": "user", "content": "p"}]
    assert endpoint._request(prompt, 1.0, 3) == {
        **{"model": "m", "messages": messages, "temperature": 1.0, "seed": 3},
        **{"max_completion_tokens": 4096, "reasoning_effort": "low"},
    }
    endpoint = Endpoint(command._server(parser.parse_args([*arguments, "--structured"])))
    schema = {"name": "reply", "strict": True, "schema": {"type": "object"}}
    constraint = endpoint._request(prompt, 1.0, 3)["response_format"]
    assert constraint == {"type": "json_schema", "json_schema": schema}


def test_an_older_work_file_is_readable(work: Path, tmp_path: Path) -> None:
    record = only_record(run(work, Scripted()))
    judge = record.pop("judge")
    del record["extractors"]
    work.write_text(json.dumps(record | judge) + "\n")
    second = Scripted()
    journal = run(work, second)
    assert second.extracted == []
    assert row(journal, tmp_path / "library.jsonl")["model"] == "EXTRACTOR"
    work.write_text('{"key": "k"}\n')
    with pytest.raises(DataError, match="1: not a record of `sgpo-async strategies`; name another work file"):
        Journal(work)

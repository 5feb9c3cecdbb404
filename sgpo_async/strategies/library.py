"""Writes the finished library, computes its metrics, and checks its strategies for leaks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sgpo_async.strategies.journal import BY, TOKENS, Journal, Record
from sgpo_async.strategies.leaks import leaks
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.overlap import normalised
from sgpo_async.tasks.writing import write_records

COLUMNS = (
    *("problem", "answer", "strategy", "response", "source", "model", "endpoint", "prompts", "version"),
    *("time", "judge", "judge_endpoint", "judge_prompts", "candidates", "score"),
)


def write_library(path: Path, records: Iterable[Record]) -> int:
    """Write the best strategy of each distinct problem as .jsonl or .parquet. Returns the number of problems.

    Raises SgpoError if the file cannot be written.
    """
    rows: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record["key"]):
        if not record["failed"]:
            rows.setdefault(normalised(record["problem"]), _row(record))
    write_records(path, list(rows.values()), columns=COLUMNS)
    return len(rows)


def check(problems: Iterable[Problem]) -> Iterator[tuple[str, str]]:
    """(FILE:LINE, description of the leak) for every strategy that leaks; without a response, only of the answer."""
    for problem in problems:
        if problem.strategy is None:
            continue
        text, response = problem.problem, problem.response or ""
        found = leaks(problem.strategy, problem=text, answer=problem.answer, response=response)
        if found:
            yield problem.id, "; ".join(found)


def journal_metrics(journal: Journal, *, prompt_price: float = 0.0, completion_price: float = 0.0) -> dict[str, Any]:
    """Counts, cost (the prices are per million tokens), and a histogram of the mean scores."""
    records = list(journal.records.values())
    rejected = Counter(one["reason"] for record in records for one in record["rejected"])
    tokens = {name: sum(spent[name] for spent in journal.spent.values()) for name in TOKENS}
    cost = (tokens["prompt_tokens"] * prompt_price + tokens["completion_tokens"] * completion_price) / 1e6
    scores = Counter(round(_score(record)) for record in records if not record["failed"])
    return {
        "items": len(journal.spent.keys() | journal.records.keys()),
        "finished": sum(not record["failed"] for record in records),
        "failed": dict(Counter(_kind(record["failed"]) for record in records if record["failed"])),
        "interrupted": len(journal.spent.keys() - journal.records.keys()),
        "old_scores": sum("rerank_failed" in record for record in records if not record["failed"]),
        "candidates": sum(len(record["candidates"]) for record in records),
        "rejected": dict(rejected),
        **tokens,
        "cost": cost,
        "scores": {score: scores.get(score, 0) for score in range(1, 6)},
    }


def _kind(reason: str) -> str:
    """The reason without the details that differ from item to item."""
    return re.split(r"[:(]", reason, maxsplit=1)[0].strip()


def _row(record: Record) -> dict[str, Any]:
    kept = {name: record[name] for name in ("problem", "answer", "response", "source")}
    made, judge = record["extractors"][record["best"]], record["judge"]
    kept |= {name: made[name] for name in BY}
    kept |= {"judge": judge["model"], "judge_endpoint": judge["endpoint"], "judge_prompts": judge["prompts"]}
    own = {"strategy": record["candidates"][record["best"]], "score": _score(record)}
    return kept | own | {"candidates": len(record["candidates"])}


def _score(record: Record) -> float:
    """Mean of the four criteria of the best candidate."""
    scores = record["scores"][record["best"]].values()
    return float(sum(scores) / len(scores))

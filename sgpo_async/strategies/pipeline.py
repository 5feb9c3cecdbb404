"""Sends items to the endpoint concurrently, and journals each reply when it arrives and each item when it finishes.

problems ─▶ semaphore ─▶ 5 extractions ─▶ filter ─▶ one ranking ─▶ journal      one failed item leaves others alone;
                                                                              an EndpointError ends the run

One candidate is enough for the ranking, so a declined request loses only its own candidate. An item that failed or was
interrupted resumes where it stopped: with the missing candidates, with new candidates if all were rejected, or with the
ranking.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from sgpo_async import __version__
from sgpo_async.strategies.candidates import FilteredReplies, best_of, filter_replies
from sgpo_async.strategies.endpoint import Declined, Endpoint
from sgpo_async.strategies.journal import BY, Journal, Record, key_of, same
from sgpo_async.strategies.parse import Unreadable, parse_scores
from sgpo_async.strategies.prompts import EXTRACT_DIGEST, RANK_DIGEST, Prompt, extract_prompt, rank_prompt
from sgpo_async.tasks.base import Problem

RANKINGS = 3  # tries to get readable scores
RETRY_TEMPERATURE = 0.7  # from the second try on: at temperature 0 the same request gets the same reply
CANDIDATE, RANKING = "candidate", "ranking"
OnRecord = Callable[[Record], None]


class Pipeline:
    """Extracts and ranks strategies with one endpoint.

    Args:
        on_record: called with each record after it is journalled, and with each record that was finished before.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        journal: Journal,
        *,
        candidates: int = 5,
        concurrency: int = 8,
        on_record: OnRecord | None = None,
    ) -> None:
        self._endpoint, self._journal, self._candidates = endpoint, journal, candidates
        self._concurrency, self._on_record = concurrency, on_record or (lambda _record: None)

    async def extract(self, problems: Sequence[Problem]) -> None:
        """Process all unfinished items. Raises EndpointError, one line, if the endpoint cannot serve any request."""
        items = {key_of(problem): problem for problem in problems}
        missing = {key: problem for key, problem in items.items() if not self._journal.done(key)}
        self._skip(self._journal.records[key] for key in items.keys() - missing.keys())
        await self._all([self._process(key, problem) for key, problem in missing.items()])

    async def rank(self) -> None:
        """Rank the candidates of every journalled item that this judge has not scored yet. Raises EndpointError."""
        records = [record for record in self._journal.records.values() if record["candidates"]]
        judge = self._by(RANK_DIGEST)
        scored = [record for record in records if not record["failed"] and same(record["judge"], judge)]
        self._skip(scored)
        skipped = {record["key"] for record in scored}
        await self._all([self._rerank(record) for record in records if record["key"] not in skipped])

    def _skip(self, finished: Iterable[Record]) -> None:
        for record in finished:
            self._on_record(record)

    async def _all(self, jobs: Sequence[Coroutine[Any, Any, None]]) -> None:
        gate = asyncio.Semaphore(self._concurrency)

        async def one(job: Coroutine[Any, Any, None]) -> None:
            async with gate:
                await job

        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(one(job))
        except BaseExceptionGroup as several:
            raise _first(several) from None
        finally:
            for job in jobs:
                job.close()  # closes those that never started

    async def _process(self, key: str, problem: Problem) -> None:
        began = time.time()
        record = self._journal.records.get(key) or _empty(key, problem)
        record = record | {"failed": None}
        if not record["candidates"]:
            refused = await self._ask(key, problem)
            self._set_candidates(record, problem, refused)
        if record["candidates"]:
            await self._score(record)
        self._finish(record, began)

    async def _rerank(self, old: Record) -> None:
        began = time.time()
        record = old | {}
        await self._score(record)
        self._finish(record, began)

    async def _ask(self, key: str, problem: Problem) -> str:
        """Request the missing candidates; returns the reason of one declined request, or an empty string."""
        prompt = extract_prompt(problem.problem, problem.response or "")
        arrived = {reply["number"] for reply in self._journal.replies(key, CANDIDATE)}
        refused: list[str] = []

        async def one(number: int) -> None:
            try:
                await self._request(key, CANDIDATE, number, prompt, temperature=1.0)
            except Declined as declined:
                refused.append(str(declined))

        numbers = _missing(arrived, self._candidates, none_left=not self._filtered(key, problem)[1].kept)
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(one(number))
        return min(refused, default="")

    def _filtered(self, key: str, problem: Problem) -> tuple[list[Record], FilteredReplies]:
        replies = self._journal.replies(key, CANDIDATE)
        return replies, filter_replies([reply["text"] for reply in replies], problem)

    def _set_candidates(self, record: Record, problem: Problem, refused: str) -> None:
        """Filter all replies to this item, those of earlier runs included, and set the candidates of the record."""
        replies, filtered = self._filtered(record["key"], problem)
        made = [{name: replies[index][name] for name in BY} for index in filtered.indices]
        record |= {"candidates": filtered.kept, "extractors": made, "rejected": filtered.rejected}
        if not filtered.kept:
            reasons = sorted({one["reason"] for one in filtered.rejected})
            record["failed"] = f"extraction: {refused}" if refused else f"no candidate is left ({', '.join(reasons)})"

    async def _score(self, record: Record) -> None:
        """Request scores until they are readable. If that fails, keep the older scores and record the reason."""
        prompt = rank_prompt(record["problem"], record["response"], record["candidates"])
        judge = self._by(RANK_DIGEST)
        record.pop("rerank_failed", None)
        tried = sum(same(reply, judge) for reply in self._journal.replies(record["key"], RANKING))
        reason = ""
        for number in range(tried, tried + RANKINGS):
            temperature = RETRY_TEMPERATURE if number else 0.0
            try:
                text = await self._request(record["key"], RANKING, number, prompt, temperature=temperature)
                scores = parse_scores(text, len(record["candidates"]))
                record |= {"scores": scores, "best": best_of(scores), "judge": judge, "failed": None}
                return
            except Unreadable as unreadable:
                reason = f"unreadable scores: {unreadable}"
            except Declined as declined:
                reason = str(declined)
                break
        if "scores" in record:
            record["rerank_failed"] = judge | {"reason": reason}
        else:
            record["failed"] = f"ranking: {reason}"

    async def _request(self, key: str, of: str, number: int, prompt: Prompt, *, temperature: float) -> str:
        """Request one reply, journal it, and return its text."""
        seed = _seed(key, number if of == CANDIDATE else -1 - number)
        reply = await self._endpoint.chat(prompt, temperature=temperature, seed=seed)
        by = self._by(EXTRACT_DIGEST if of == CANDIDATE else RANK_DIGEST)
        self._journal.note(key, {"of": of, "number": number} | reply._asdict() | by)
        return reply.text

    def _by(self, prompts: str) -> Record:
        server = self._endpoint.server
        values = (server.model, server.known_as, prompts, __version__, round(time.time()))
        return dict(zip(BY, values, strict=True))

    def _finish(self, record: Record, began: float) -> None:
        record["seconds"] = round(time.time() - began, 3)
        self._journal.append(record)
        self._on_record(record)


def _empty(key: str, problem: Problem) -> Record:
    about = {"problem": problem.problem, "answer": problem.answer, "response": problem.response, "source": problem.id}
    return {"key": key, **about, "candidates": [], "extractors": [], "rejected": [], "failed": None}


def _missing(arrived: set[int], candidates: int, *, none_left: bool) -> list[int]:
    """Numbers of the replies to request: up to `candidates` in total, or that many new ones if all were rejected."""
    count = max(0, candidates - len(arrived)) or (candidates if none_left else 0)
    return list(itertools.islice((number for number in itertools.count() if number not in arrived), count))


def _seed(key: str, number: int) -> int:
    """A 31-bit seed that depends only on the item and the number of the reply, so that every run sends the same one."""
    return int.from_bytes(hashlib.blake2b(f"{key} {number}".encode(), digest_size=4).digest()) >> 1


def _first(error: BaseException) -> BaseException:
    """The first error within (nested) exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

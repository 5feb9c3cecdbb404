"""Items through the endpoint, some at a time; each reply is journalled when it comes, each item when it is finished.

problems ─▶ semaphore ─▶ 5 extractions ─▶ sift ─▶ one ranking ─▶ journal         one failed item fails alone;
                                                                                 an EndpointError ends all

One candidate is enough to go on with, so a refused request costs no more than its own candidate. An item that failed
or was cut short goes on where it was: with the candidates that are missing, with new ones if all were rejected, or with
the ranking.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from sgpo_async import __version__
from sgpo_async.strategies.candidates import Sifted, best_of, sift
from sgpo_async.strategies.endpoint import Declined, Endpoint
from sgpo_async.strategies.journal import BY, Journal, Record, key_of, same
from sgpo_async.strategies.parse import Unreadable, parse_scores
from sgpo_async.strategies.prompts import EXTRACT_DIGEST, RANK_DIGEST, Prompt, extract_prompt, rank_prompt
from sgpo_async.tasks.base import Problem

RANKINGS = 3  # tries to get scores that can be read
RETRY_TEMPERATURE = 0.7  # from the second on: at 0 the same request has the same reply
CANDIDATE, RANKING = "candidate", "ranking"
Told = Callable[[Record], None]


class Pipeline:
    """Extraction and ranking with one endpoint.

    Args:
        told: called with each record after it was journalled, or found to be finished.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        journal: Journal,
        *,
        candidates: int = 5,
        concurrency: int = 8,
        told: Told | None = None,
    ) -> None:
        self._endpoint, self._journal, self._candidates = endpoint, journal, candidates
        self._concurrency, self._told = concurrency, told or (lambda _record: None)

    async def extract(self, problems: Sequence[Problem]) -> None:
        """Do what is missing. Raises EndpointError, one line, if the endpoint can serve nothing."""
        items = {key_of(problem): problem for problem in problems}
        missing = {key: problem for key, problem in items.items() if not self._journal.done(key)}
        self._skip(self._journal.records[key] for key in items.keys() - missing.keys())
        await self._all([self._one(key, problem) for key, problem in missing.items()])

    async def rank(self) -> None:
        """Rank the candidates of every journalled item that this judge has not scored yet. Raises EndpointError."""
        records = [record for record in self._journal.records.values() if record["candidates"]]
        judge = self._by(RANK_DIGEST)
        scored = [record for record in records if not record["failed"] and same(record["judge"], judge)]
        self._skip(scored)
        skipped = {record["key"] for record in scored}
        await self._all([self._again(record) for record in records if record["key"] not in skipped])

    def _skip(self, finished: Iterable[Record]) -> None:
        for record in finished:
            self._told(record)

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
                job.close()  # those that never began

    async def _one(self, key: str, problem: Problem) -> None:
        began = time.time()
        record = self._journal.records.get(key) or _empty(key, problem)
        record = record | {"failed": None}
        if not record["candidates"]:
            refused = await self._ask(key, problem)
            self._sift(record, problem, refused)
        if record["candidates"]:
            await self._score(record)
        self._finish(record, began)

    async def _again(self, old: Record) -> None:
        began = time.time()
        record = old | {}
        await self._score(record)
        self._finish(record, began)

    async def _ask(self, key: str, problem: Problem) -> str:
        """Ask for the candidates that are missing; returns why one was refused, or nothing."""
        prompt = extract_prompt(problem.problem, problem.response or "")
        arrived = {reply["number"] for reply in self._journal.replies(key, CANDIDATE)}
        refused: list[str] = []

        async def one(number: int) -> None:
            try:
                await self._paid(key, CANDIDATE, number, prompt, temperature=1.0)
            except Declined as declined:
                refused.append(str(declined))

        numbers = _missing(arrived, self._candidates, none_left=not self._sifted(key, problem)[1].kept)
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(one(number))
        return min(refused, default="")

    def _sifted(self, key: str, problem: Problem) -> tuple[list[Record], Sifted]:
        replies = self._journal.replies(key, CANDIDATE)
        return replies, sift([reply["text"] for reply in replies], problem)

    def _sift(self, record: Record, problem: Problem, refused: str) -> None:
        """What is left of all replies that have come, in this run and before."""
        replies, sifted = self._sifted(record["key"], problem)
        made = [{name: replies[place][name] for name in BY} for place in sifted.places]
        record |= {"candidates": sifted.kept, "extractors": made, "rejected": sifted.rejected}
        if not sifted.kept:
            reasons = sorted({one["reason"] for one in sifted.rejected})
            record["failed"] = f"extraction: {refused}" if refused else f"no candidate is left ({', '.join(reasons)})"

    async def _score(self, record: Record) -> None:
        """Ask for scores until they can be read; if they cannot, older ones stand, and why is recorded."""
        prompt = rank_prompt(record["problem"], record["response"], record["candidates"])
        judge = self._by(RANK_DIGEST)
        record.pop("rerank_failed", None)
        tried = sum(same(reply, judge) for reply in self._journal.replies(record["key"], RANKING))
        reason = ""
        for number in range(tried, tried + RANKINGS):
            temperature = RETRY_TEMPERATURE if number else 0.0
            try:
                text = await self._paid(record["key"], RANKING, number, prompt, temperature=temperature)
                scores = parse_scores(text, len(record["candidates"]))
                record |= {"scores": scores, "best": best_of(scores), "judge": judge, "failed": None}
                return
            except Unreadable as unreadable:
                reason = f"the scores cannot be read: {unreadable}"
            except Declined as declined:
                reason = str(declined)
                break
        if "scores" in record:
            record["rerank_failed"] = judge | {"reason": reason}
        else:
            record["failed"] = f"ranking: {reason}"

    async def _paid(self, key: str, of: str, number: int, prompt: Prompt, *, temperature: float) -> str:
        """The text of one reply, which is journalled before anything is made of it."""
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
        self._told(record)


def _empty(key: str, problem: Problem) -> Record:
    about = {"problem": problem.problem, "answer": problem.answer, "response": problem.response, "source": problem.id}
    return {"key": key, **about, "candidates": [], "extractors": [], "rejected": [], "failed": None}


def _missing(arrived: set[int], candidates: int, *, none_left: bool) -> list[int]:
    """Numbers of the replies to ask for: up to `candidates` in all, as many new ones if all of these were rejected."""
    count = max(0, candidates - len(arrived)) or (candidates if none_left else 0)
    return list(itertools.islice((number for number in itertools.count() if number not in arrived), count))


def _seed(key: str, number: int) -> int:
    """31 bits: the same item asks the same questions, whenever it is done."""
    return int.from_bytes(hashlib.blake2b(f"{key} {number}".encode(), digest_size=4).digest()) >> 1


def _first(error: BaseException) -> BaseException:
    """The first error within groups of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

"""Items through the endpoint, some at a time; each is journalled when it is finished, well or badly.

problems ─▶ semaphore ─▶ 5 extractions ─▶ sift ─▶ one ranking ─▶ journal         one failed item fails alone;
                                                                                 an EndpointError ends all
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from sgpo_async import __version__
from sgpo_async.strategies.candidates import best_of, sift
from sgpo_async.strategies.endpoint import Declined, Endpoint, Reply
from sgpo_async.strategies.journal import Journal, Record, key_of
from sgpo_async.strategies.parse import Unreadable, parse_scores
from sgpo_async.strategies.prompts import DIGEST, extract_prompt, rank_prompt
from sgpo_async.tasks.base import Problem

RANKINGS = 3  # tries to get scores that can be read
Told = Callable[[Record], None]


class Pipeline:
    """Extraction and ranking with one endpoint.

    Args:
        told: called with each record after it was journalled.
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
        await self._all([self._one(key, problem) for key, problem in items.items() if not self._journal.done(key)])

    async def rank(self) -> None:
        """Rank the candidates of every journalled item anew. Raises EndpointError."""
        ranked = [record for record in self._journal.records.values() if record["candidates"]]
        await self._all([self._again(record) for record in ranked])

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
        record: Record = {
            "key": key,
            "problem": problem.problem,
            "answer": problem.answer,
            "response": problem.response,
            "source": problem.id,
            "candidates": [],
            "rejected": [],
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "failed": None,
        }
        prompt = extract_prompt(problem.problem, problem.response or "")
        try:
            async with asyncio.TaskGroup() as group:
                asked = [
                    group.create_task(self._endpoint.chat(prompt, temperature=1.0, seed=_seed(key, number)))
                    for number in range(self._candidates)
                ]
        except* Declined as several:
            record["failed"] = f"extraction: {_first(several)}"
        else:
            replies = [task.result() for task in asked]
            _pay(record, *replies)
            sifted = sift([reply.text for reply in replies], problem)
            record |= {"candidates": sifted.kept, "rejected": sifted.rejected}
            if not sifted.kept:
                reasons = sorted({one["reason"] for one in sifted.rejected})
                record["failed"] = f"no candidate is left ({', '.join(reasons)})"
        if not record["failed"]:
            await self._score(record)
        self._finish(record, began)

    async def _again(self, old: Record) -> None:
        began = time.time()
        record = old | {"failed": None}
        await self._score(record)
        self._finish(record, began)

    async def _score(self, record: Record) -> None:
        """Ask for scores until they can be read."""
        prompt = rank_prompt(record["problem"], record["response"], record["candidates"])
        reason = ""
        for attempt in range(RANKINGS):
            try:
                reply = await self._endpoint.chat(prompt, temperature=0.0, seed=_seed(record["key"], -1 - attempt))
                _pay(record, reply)
                scores = parse_scores(reply.text, len(record["candidates"]))
                record |= {"scores": scores, "best": best_of(scores)}
                return
            except Unreadable as unreadable:
                reason = f"the scores cannot be read: {unreadable}"
            except Declined as declined:
                reason = str(declined)
                break
        record["failed"] = f"ranking: {reason}"

    def _finish(self, record: Record, began: float) -> None:
        server = self._endpoint.server
        record |= {"model": server.model, "endpoint": server.host, "prompts": DIGEST, "version": __version__}
        record |= {"time": round(began), "seconds": round(time.time() - began, 3)}
        self._journal.append(record)
        self._told(record)


def _pay(record: Record, *replies: Reply) -> None:
    record["prompt_tokens"] += sum(reply.prompt_tokens for reply in replies)
    record["completion_tokens"] += sum(reply.completion_tokens for reply in replies)


def _seed(key: str, number: int) -> int:
    """31 bits: the same item asks the same questions, whenever it is done."""
    return int.from_bytes(hashlib.blake2b(f"{key} {number}".encode(), digest_size=4).digest()) >> 1


def _first(error: BaseException) -> BaseException:
    """The first error within groups of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

"""An SGLang server on the CPU as a way of `sgpo-async bench engine --sglang PYTHON`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import aiohttp
import psutil

from sgpo_async.config.schema import Engine, Sglang
from sgpo_async.engines.sglang import SglangEngine
from sgpo_async.engines.sglang.processes.api import http_session
from sgpo_async.errors import EngineError
from sgpo_async.weights import digest

REQUEST_S = 600.0


class Request(NamedTuple):
    """A prompt, and how many tokens are sampled after it."""

    prompt: list[int]
    length: int


class Served:
    """One server, which gets as many requests at a time as the others have rows."""

    def __init__(self, folder: str, slots: int, python: str) -> None:
        """Start it. Raises EngineError if it does not come up."""
        settings = Engine(kind="sglang", device="cpu", slots=slots, sglang=Sglang(servers=1, python=python))
        self._engine = SglangEngine(folder, settings, dtype="float32", digest=digest)
        self._engine.start()
        self._slots = slots

    def __call__(self, work: Sequence[Request]) -> int:
        """Sample all; return the number of tokens."""
        return asyncio.run(self._all(work))

    def cpu_s(self) -> float:
        """CPU seconds of the server's processes and of this one, so far."""
        process = self._engine.server_slots[0].process
        assert process
        total, members = time.process_time(), psutil.Process(process.group)
        for member in [members, *members.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times = member.cpu_times()
                total += times.user + times.system
        return total

    def close(self) -> None:
        """End the server."""
        self._engine.close()

    async def _all(self, work: Sequence[Request]) -> int:
        free, url = asyncio.Semaphore(self._slots), self._engine.server_slots[0].url
        async with http_session() as http:
            return sum(await asyncio.gather(*(self._one(http, url, free, one) for one in work)))

    async def _one(self, http: aiohttp.ClientSession, url: str, free: asyncio.Semaphore, one: Request) -> int:
        sampling = {"temperature": 1.0, "max_new_tokens": one.length, "ignore_eos": True}
        body: dict[str, Any] = {"input_ids": one.prompt, "sampling_params": sampling, "return_logprob": True}
        async with free, http.post(f"{url}/generate", json=body, timeout=aiohttp.ClientTimeout(REQUEST_S)) as response:
            answer = await response.json()
            if response.status != 200:
                raise EngineError(f"bench engine: {url} refused a request: {answer!r:.200}")
            return len(answer["output_ids"])

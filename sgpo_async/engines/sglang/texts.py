"""A server of texts, for as long as a caller's work lasts: launched as an actor launches its own, with its tokenizer.

What is asked of it goes to SGLang's OpenAI-compatible interface, below `url`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sgpo_async.config.schema import Engine
from sgpo_async.engines.pretrained import device_of
from sgpo_async.engines.sglang.api import ServerApi, ServerGone, ServerRefused, http_session
from sgpo_async.engines.sglang.launch import CPU_TOKENS, Launch
from sgpo_async.engines.sglang.place import Place, answers, require_alive
from sgpo_async.engines.sglang.process import ServerProcess
from sgpo_async.errors import DeadlineExceeded

LOOK_S = 0.2  # between two looks at whether it lives


class TextServer:
    """A server that answers."""

    def __init__(self, place: Place) -> None:
        self._place = place

    @property
    def url(self) -> str:
        """Up to /v1."""
        return f"{self._place.url}/v1"

    async def during(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`. Raises what it raises, or EngineError with the server's last words as soon as that has ended."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=LOOK_S)
                require_alive(self._place)
        finally:
            task.cancel()
            await asyncio.wait([task])
        task.result()


@asynccontextmanager
async def text_server(model: str, engine: Engine, *, dtype: str, log: Path) -> AsyncIterator[TextServer]:
    """Launch one and wait until it answers; it ends with the context.

    `model` is a folder, or a hub's name. Of `engine` count the device, the slots, and of `sglang` how a server is
    launched. Raises EngineError with the server's last words if it ends, DeadlineExceeded if it takes too long.
    """
    launch = Launch(
        settings=engine.sglang,
        model=model,
        dtype=dtype,
        device=device_of(engine.device),
        slots=engine.slots,
        longest=CPU_TOKENS,
        texts=True,
    )
    process = await asyncio.to_thread(ServerProcess, launch, log)
    place = Place(launch, process.url, log, process)
    start_s = engine.sglang.start_timeout_s
    try:
        async with http_session() as http:
            deadline = asyncio.get_running_loop().time() + start_s
            try:
                await answers(place, ServerApi(http, place.url), deadline=deadline)
            except (ServerGone, ServerRefused):
                raise DeadlineExceeded(f"server {place.url}", "answer after its start", start_s) from None
        yield TextServer(place)
    finally:
        await asyncio.to_thread(process.stop)

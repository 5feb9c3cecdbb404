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
from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerRefused, http_session
from sgpo_async.engines.sglang.processes.launch import CPU_TOKENS, Launch
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.engines.sglang.serving.server_slot import EXIT_GRACE_S, ServerSlot, wait_until_ready
from sgpo_async.errors import EngineError, SgpoError
from sgpo_async.model.load import device_of

LOOK_S = 0.2  # between two looks at whether it lives


class TextServer:
    """A server that answers."""

    def __init__(self, process: ServerProcess) -> None:
        self._process = process
        self.url = f"{process.url}/v1"

    async def during(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`. Raises what it raises, or EngineError with the server's last words as soon as that has ended."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait([task], timeout=LOOK_S))[0]:
                self._require_alive()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        try:
            task.result()
        except SgpoError:
            await asyncio.sleep(EXIT_GRACE_S)  # of a server that gave no answer because it died they say more
            self._require_alive()
            raise

    def _require_alive(self) -> None:
        if not self._process.alive:
            raise EngineError(f"server {self._process.url} has ended; {self._process.log_tail()}")


@asynccontextmanager
async def text_server(model: str, engine: Engine, *, dtype: str, served_name: str, log: Path) -> AsyncIterator[TextServer]:
    """Launch one and wait until it answers; it ends with the context.

    `model` is a folder, or a hub's name; requests call it `served_name`. Of `engine` count the device, the slots, and of
    `sglang` how a server is launched. Raises EngineError if it ends, with its last words, or takes too long.
    """
    launch = Launch(
        settings=engine.sglang,
        model=model,
        dtype=dtype,
        device=device_of(engine.device),
        slots=engine.slots,
        longest=CPU_TOKENS // engine.slots,
        served_name=served_name,
    )
    process = await asyncio.to_thread(ServerProcess, launch, log)
    server_slot = ServerSlot(launch, process.url, log, process)
    start_s = engine.sglang.start_timeout_s
    try:
        async with http_session() as http:
            deadline = asyncio.get_running_loop().time() + start_s
            try:
                await wait_until_ready(server_slot, ServerApi(http, server_slot.url), deadline=deadline)
            except (ServerGone, ServerRefused) as error:
                remedy = f"see {log}, or raise engine.sglang.start_timeout_s"
                raise EngineError(f"server not ready within {start_s:g} s ({error}); {remedy}") from None
        yield TextServer(process)
    finally:
        await asyncio.to_thread(process.stop)

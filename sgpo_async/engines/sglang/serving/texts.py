"""A server that takes and returns text, for the duration of a caller's work.

It is launched like an actor's server, but with a tokenizer. Requests go to SGLang's OpenAI-compatible API below `url`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from sgpo_async.config.schema import Engine
from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerRefused, http_session
from sgpo_async.engines.sglang.processes.launch import Launch
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.engines.sglang.serving.server_slot import EXIT_GRACE_S, ServerSlot, wait_until_ready
from sgpo_async.errors import EngineError, SgpoError
from sgpo_async.model.load import cache_bytes, device_of, positions, read_config

CHECK_INTERVAL_S = 0.2  # between two checks that the server is alive


class TextServer:
    """A running server that is ready for requests."""

    def __init__(self, process: ServerProcess) -> None:
        self._process = process
        self.url = f"{process.url}/v1"

    async def during(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`. Raises its errors, or EngineError with the end of the server's log as soon as the server ends."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait([task], timeout=CHECK_INTERVAL_S))[0]:
                self._require_alive()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        try:
            task.result()
        except SgpoError:
            await asyncio.sleep(EXIT_GRACE_S)  # if the server died, the end of its log explains the error better
            self._require_alive()
            raise

    def _require_alive(self) -> None:
        if not self._process.alive:
            raise EngineError(f"server {self._process.url} has ended; {self._process.log_tail()}")


@asynccontextmanager
async def text_server(
    model: str, engine: Engine, *, dtype: str, served_name: str, log: Path
) -> AsyncIterator[TextServer]:
    """Launch a server and wait until it is ready; it is stopped at the end of the context.

    `model` is a folder or a name on the Hugging Face hub; requests use the model name `served_name`. Of `engine`, the
    device, the slots and the launch settings in `sglang` are used. Raises DataError if the model's config.json is
    missing or unusable, EngineError if the server ends (with the end of its log) or takes too long to start.
    """
    launch = Launch(
        settings=engine.sglang,
        model=model,
        dtype=dtype,
        device=device_of(engine.device),
        slots=engine.slots,
        longest=positions(model),
        token_bytes=cache_bytes(read_config(model), dtype=getattr(torch, dtype), tp=engine.sglang.tp),
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

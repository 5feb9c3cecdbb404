"""The place of one server: what is launched there or attached to, and how it can be seen to have ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from sgpo_async.engines.sglang.processes.api import Json, ServerApi, ServerGone, wait_ready
from sgpo_async.engines.sglang.processes.launch import Launch
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.errors import EngineError, SgpoError

EXIT_GRACE_S = 1.0  # for a dying server to be seen dead


@dataclass
class ServerSlot:
    """The place of one server: what is launched, or attached to, and what stands there now."""

    launch: Launch | None  # None: attached by `url`
    url: str
    log: Path | None
    process: ServerProcess | None = None
    server: Server | None = None
    failures: int = 0  # in a row


def alive(server_slot: ServerSlot) -> bool:
    """Whether its process, if we launched it, has not ended."""
    return server_slot.process is None or server_slot.process.alive


def require_alive(server_slot: ServerSlot) -> None:
    if server_slot.process is not None and not server_slot.process.alive:
        raise EngineError(f"server {server_slot.url} has ended; {server_slot.process.log_tail()}")
    if server_slot.process is not None and server_slot.server is None and server_slot.process.port_taken:
        raise EngineError(f"server {server_slot.url} found its port taken; {server_slot.process.log_tail()}")


async def wait_until_ready(server_slot: ServerSlot, api: ServerApi, *, deadline: float) -> None:
    """Wait until the server there answers, to `deadline` (the loop's clock).

    Raises EngineError with its last words if it ends before, ServerGone or ServerRefused if it takes too long.
    """
    asked: asyncio.Task[Json] = asyncio.create_task(wait_ready(api, deadline=deadline))
    try:
        while not asked.done():
            await asyncio.wait([asked], timeout=0.2)
            require_alive(server_slot)
    finally:
        asked.cancel()
    await asked


async def with_log_tail(server_slot: ServerSlot, error: SgpoError) -> SgpoError:
    """Of a server that gave no answer because it died, its last words say more."""
    if not isinstance(error, ServerGone):
        return error
    await asyncio.sleep(EXIT_GRACE_S)
    try:
        require_alive(server_slot)
    except EngineError as dead:
        return dead
    return error

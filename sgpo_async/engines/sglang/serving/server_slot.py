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

LAST_WORDS_S = 1.0  # for a dying server to be seen dead


@dataclass
class ServerSlot:
    """The place of one server: what is launched, or attached to, and what stands there now."""

    launch: Launch | None  # None: attached by `url`
    url: str
    log: Path | None
    process: ServerProcess | None = None
    server: Server | None = None
    failures: int = 0  # in a row


def alive(place: ServerSlot) -> bool:
    """Whether its process, if we launched it, has not ended."""
    return place.process is None or place.process.alive


def require_alive(place: ServerSlot) -> None:
    if place.process is not None and not place.process.alive:
        raise EngineError(f"server {place.url} has ended; {place.process.last_words()}")
    if place.process is not None and place.server is None and place.process.port_taken:
        raise EngineError(f"server {place.url} found its port taken; {place.process.last_words()}")


async def until_it_answers(place: ServerSlot, api: ServerApi, *, deadline: float) -> None:
    """Wait until the server there answers, to `deadline` (the loop's clock).

    Raises EngineError with its last words if it ends before, ServerGone or ServerRefused if it takes too long.
    """
    asked: asyncio.Task[Json] = asyncio.create_task(wait_ready(api, deadline=deadline))
    try:
        while not asked.done():
            await asyncio.wait([asked], timeout=0.2)
            require_alive(place)
    finally:
        asked.cancel()
    await asked


async def explained(place: ServerSlot, error: SgpoError) -> SgpoError:
    """Of a server that gave no answer because it died, its last words say more."""
    if not isinstance(error, ServerGone):
        return error
    await asyncio.sleep(LAST_WORDS_S)
    try:
        require_alive(place)
    except EngineError as dead:
        return dead
    return error

"""A server slot: where one server is launched or attached, and how its end is detected."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from sgpo_async.engines.sglang.processes.api import Json, ServerApi, ServerGone, wait_ready
from sgpo_async.engines.sglang.processes.launch import Launch
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.serving.versions import Offer
from sgpo_async.errors import EngineError, SgpoError

EXIT_GRACE_S = 1.0  # a server that stops answering gets this long to exit, so that its log explains the error


@dataclass
class ServerSlot:
    """Where one server runs: how to launch or attach it, and the server that is running now."""

    launch: Launch | None  # None: attach to the server at `url`
    url: str
    log: Path | None
    process: ServerProcess | None = None
    server: Server | None = None
    held: Offer | None = None  # the version that the server has
    loading: Offer | None = None  # the version that it is loading
    failures: int = 0  # in a row
    check_at: float = 0.0  # when the next health check is due, in time of the loop


def alive(server_slot: ServerSlot) -> bool:
    """Whether its process is running; true for an attached server, whose process is unknown."""
    return server_slot.process is None or server_slot.process.alive


def require_alive(server_slot: ServerSlot) -> None:
    if server_slot.process is not None and not server_slot.process.alive:
        raise EngineError(f"server {server_slot.url} has ended; {server_slot.process.log_tail()}")
    if server_slot.process is not None and server_slot.server is None and server_slot.process.port_taken:
        raise EngineError(f"server {server_slot.url}: another process took its port; {server_slot.process.log_tail()}")


async def wait_until_ready(server_slot: ServerSlot, api: ServerApi, *, deadline: float) -> None:
    """Wait until the server answers, at most until `deadline` (a time of the loop's clock).

    Raises EngineError with the end of its log if the server ends first, ServerGone or ServerRefused at the deadline.
    """
    ready: asyncio.Task[Json] = asyncio.create_task(wait_ready(api, deadline=deadline))
    try:
        while not ready.done():
            await asyncio.wait([ready], timeout=0.2)
            require_alive(server_slot)
    finally:
        ready.cancel()
    await ready


async def with_log_tail(server_slot: ServerSlot, error: SgpoError) -> SgpoError:
    """`error`; or, if the server did not answer because it died, an error with the end of its log."""
    if not isinstance(error, ServerGone):
        return error
    await asyncio.sleep(EXIT_GRACE_S)
    try:
        require_alive(server_slot)
    except EngineError as dead:
        return dead
    return error

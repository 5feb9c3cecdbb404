"""One weight update of one server: shut or pause, send, verify, open. The server never serves incomplete weights.

    abort-resume   aborts the streams; they continue from the tokens they have, on this server or on another
    retract        the server keeps the streams and recomputes their keys and values under the new weights
    in-place       the server keeps the streams with their old keys and values, so its cache must not be flushed

abort-resume uses `Server.shut` and not SGLang's pause mode "abort", which also aborts but then sleeps for a second.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Literal

from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerRefused
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.weight_sync.layout import answered_checksums, compare
from sgpo_async.engines.sglang.weight_sync.transports import Prepared, Transport
from sgpo_async.errors import WeightsError
from sgpo_async.weights.short_digest import short_digest

InFlight = Literal["abort-resume", "retract", "in-place"]
PAUSE_MODES = {"retract": "retract", "in-place": "in_place"}


@dataclass(frozen=True)
class UpdateTimings:
    """The duration of one update's phases, in seconds."""

    url: str
    version: int
    transport: str
    shut_s: float  # until all streams had ended, or the server was paused
    send_s: float
    verify_s: float

    @property
    def pause_s(self) -> float:
        """How long the server generated no tokens."""
        return self.shut_s + self.send_s + self.verify_s


async def update(
    server: Server, prepared: Prepared, transport: Transport, *, in_flight: InFlight, phase_s: float
) -> UpdateTimings:
    """Load a version into `server`, and open it unless a stream found a fault meanwhile.

    Raises ServerRefused, ServerGone, SessionError, WeightsError or DeadlineExceeded. The server then stays shut and
    has no version; `server.fault` is set if it must be restarted, and `server.interrupted` contains the requests whose
    streams had not ended. After a success `interrupted` is empty: a server that verifiably took weights is alive.
    """
    began = time.monotonic()
    before = server.version
    pauses = in_flight != "abort-resume" and before is not None
    try:
        if in_flight != "abort-resume" and before is not None:
            server.open = False
            await server.api.post("/pause_generation", {"mode": PAUSE_MODES[in_flight]}, timeout_s=phase_s)
        else:
            await server.shut(deadline_s=phase_s)
        shut = time.monotonic()
        server.changes += 1
        flush = not (pauses and in_flight == "in-place")
        await transport.send(server.api, prepared, flush=flush, timeout_s=phase_s)
        sent = time.monotonic()
        await verify(server.api, prepared, timeout_s=phase_s)
        verified = time.monotonic()
        server.digests[prepared.version] = short_digest(prepared.digest)  # before a paused stream can go on
        if pauses:
            await server.api.post("/continue_generation", {}, timeout_s=phase_s)
    except BaseException as error:
        server.version = None
        if isinstance(error, ServerGone):
            server.fault = server.fault or error
        await server.cancel_streams()
        if pauses:
            await _unpause(server.api, timeout_s=phase_s)
        raise
    server.interrupted.clear()
    server.version = prepared.version
    server.open = server.fault is None
    return UpdateTimings(server.api.url, prepared.version, transport.name, shut - began, sent - shut, verified - sent)


async def verify(api: ServerApi, prepared: Prepared, *, timeout_s: float) -> None:
    """Raise WeightsError unless the server has exactly the tensors of `prepared` and reports its version."""
    answer = await api.post("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
    try:
        compare(prepared.expected, answered_checksums(answer))
    except WeightsError as error:
        raise WeightsError(f"{api.url}: version {prepared.version}: {error}") from None
    reported = (await api.get("/model_info", timeout_s=timeout_s))["weight_version"]
    if reported != str(prepared.version):
        raise WeightsError(f"{api.url}: the server reports version {reported}, but {prepared.version} was sent")


async def _unpause(api: ServerApi, *, timeout_s: float) -> None:
    """After a failure: abort the requests that the paused server kept, which have been requeued, and resume it."""
    with contextlib.suppress(ServerRefused, ServerGone):
        await api.post("/abort_request", {"abort_all": True}, timeout_s=timeout_s)
        await api.post("/continue_generation", {}, timeout_s=timeout_s)

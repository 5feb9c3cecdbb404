"""One weight update of one server: shut or pause, send, verify, open. Half-new weights are never in service.

    abort-resume   shut: streams end, and go on elsewhere or here afterwards from the tokens they have
    retract        the server keeps the streams, and computes their keys and values anew
    in-place       the server keeps the streams with their old keys and values (so nothing may be flushed)

`shut` and not SGLang's own pause mode "abort", which aborts in the same way and then sleeps for a second.
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

InFlight = Literal["abort-resume", "retract", "in-place"]
PAUSE_MODES = {"retract": "retract", "in-place": "in_place"}


@dataclass(frozen=True)
class UpdateTimings:
    """What one update took, in seconds."""

    url: str
    version: int
    transport: str
    shut_s: float  # until no stream ran, or the server was paused
    send_s: float
    verify_s: float

    @property
    def pause_s(self) -> float:
        """How long the server served nobody."""
        return self.shut_s + self.send_s + self.verify_s


async def update(
    server: Server, prepared: Prepared, transport: Transport, *, in_flight: InFlight, phase_s: float
) -> UpdateTimings:
    """Bring `server` to a version, and leave it open, unless a stream has met a fault meanwhile.

    Raises ServerRefused, ServerGone, SessionError, WeightsError or DeadlineExceeded; the server then stays shut and
    holds no version. `server.fault` then says whether it must be given up, and `server.interrupted` whose streams had not
    ended. Nobody is aboard after a success: a server that takes weights and shows them is alive.
    """
    began = time.monotonic()
    before = server.version
    pauses = in_flight != "abort-resume" and before is not None
    try:
        if in_flight != "abort-resume" and before is not None:
            server.open = False
            await server.api.post("/pause_generation", {"mode": PAUSE_MODES[in_flight]}, timeout_s=phase_s)
            server.close_spans(before)
        else:
            await server.shut(deadline_s=phase_s)
        shut = time.monotonic()
        server.changes += 1
        flush = not (pauses and in_flight == "in-place")
        await transport.send(server.api, prepared, flush=flush, timeout_s=phase_s)
        sent = time.monotonic()
        await verify(server.api, prepared, timeout_s=phase_s)
        verified = time.monotonic()
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
    """Raise WeightsError unless the server holds exactly the tensors of `prepared`, under its version."""
    answer = await api.post("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
    try:
        compare(prepared.expected, answered_checksums(answer))
    except WeightsError as error:
        raise WeightsError(f"{api.url}: version {prepared.version}: {error}") from None
    told = (await api.get("/model_info", timeout_s=timeout_s))["weight_version"]
    if told != str(prepared.version):
        raise WeightsError(f"{api.url}: says that it holds version {told}, sent was {prepared.version}")


async def _unpause(api: ServerApi, *, timeout_s: float) -> None:
    """After a failure: end what the server has kept, which nobody waits for any more, and let it run."""
    with contextlib.suppress(ServerRefused, ServerGone):
        await api.post("/abort_request", {"abort_all": True}, timeout_s=timeout_s)
        await api.post("/continue_generation", {}, timeout_s=timeout_s)

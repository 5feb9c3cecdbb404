"""One weight update of one server, as a transaction: afterwards it has the new version or the previous one, whole.

    phase     what happens                                              after a failure
    shut      no new requests; the running ones end, or SGLang pauses   restart: the server hangs
    load      SGLang loads the version                                  back to the previous version
    trial     requests go on under the new version, nobody sees what    drop what was sampled,
              they sample; every parameter's checksum is compared       back to the previous version
    confirm   the server has the version; the results are released

    back      load the previous version, which is still prepared, and   restart
              verify all of it before the next request

A server that gives no answer in any phase is restarted. Tokens of a version that was not verified are never released.

    abort-resume   aborts the streams; they continue from the tokens they have, on this server or on another
    retract        the server keeps the streams and recomputes their keys and values under the new weights
    in-place       the server keeps the streams with their old keys and values, so its cache must not be flushed

With retract and in-place there is no trial: the checksums are compared before the server goes on, as SGLang names the
versions of the streams' tokens only at their ends. The first version of a server is verified in the same way.

abort-resume uses `Server.shut` and not SGLang's pause mode "abort", which also aborts but then sleeps for a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from sgpo_async.engines.sglang.processes.api import ServerApi, ServerGone, ServerRefused, ServerSilent
from sgpo_async.engines.sglang.serving.server import Server, Trial
from sgpo_async.engines.sglang.serving.versions import Offer
from sgpo_async.engines.sglang.weight_sync.layout import answered_checksums, compare, pieces_of
from sgpo_async.engines.sglang.weight_sync.transports import Prepared
from sgpo_async.errors import DeadlineExceeded, SessionError, SgpoError, WeightsError
from sgpo_async.weights.short_digest import short_digest

InFlight = Literal["abort-resume", "retract", "in-place"]
PAUSE_MODES = {"retract": "retract", "in-place": "in_place"}
# The server is alive, but did not get the version.
NOT_LOADED = (ServerRefused, SessionError, WeightsError)


@dataclass(frozen=True)
class UpdateTimings:
    """The duration of one update's phases, in seconds."""

    url: str
    version: int
    transport: str
    began: float  # time.monotonic()
    shut_s: float  # until all streams had ended, or the server was paused
    load_s: float  # what SGLang took to load the version, with the transfer of the requests for it
    verify_s: float
    pause_s: float  # how long the server got no requests

    @property
    def outside_s(self) -> float:
        """The part of the pause in which SGLang did not load."""
        return self.pause_s - self.load_s


@dataclass
class _Clock:
    """When the phases of an update ended, as times of time.monotonic()."""

    began: float
    shut: float = 0.0
    loaded: float = 0.0
    verified: float = 0.0
    opened: float = 0.0


async def update(
    server: Server,
    offer: Offer,
    *,
    in_flight: InFlight,
    phase_s: float,
    previous: Offer | None = None,
    on_open: Callable[[], None] = lambda: None,
) -> UpdateTimings:
    """Load a version into `server`, and open it unless a stream found a fault meanwhile; `on_open` is called then.

    Raises ServerRefused, ServerGone, SessionError, WeightsError or DeadlineExceeded. The server then serves `previous`,
    the version that it had, or it is shut without a version; `server.fault` is set if it must be restarted, and
    `server.interrupted` contains the requests whose streams had not ended. After a success `interrupted` is empty: a
    server that verifiably took weights is alive.
    """
    prepared, clock, session = offer.prepared, _Clock(time.monotonic()), server.session
    pauses = in_flight != "abort-resume" and server.version is not None
    on_trial = not pauses and server.version is not None
    try:
        await _stop(server, in_flight if pauses else "abort-resume", phase_s)
        clock.shut = time.monotonic()
        server.changes += 1
        flush = not (pauses and in_flight == "in-place")
        with _naming_the_timeout():
            await offer.transport.send(server.api, prepared, flush=flush, timeout_s=phase_s)
        clock.loaded = time.monotonic()
        if on_trial and server.session == session:
            _name(server, prepared)
            _open(server, Trial(prepared.version, asyncio.get_running_loop().create_future()))
            clock.opened = time.monotonic()
            on_open()
        with _naming_the_timeout():
            await verify(server.api, prepared, timeout_s=phase_s, in_pieces=on_trial)
        clock.verified = time.monotonic()
        if server.session == session:
            _name(server, prepared)  # before a paused stream can go on
        if pauses:
            await server.api.post("/continue_generation", {}, timeout_s=phase_s)
    except BaseException as error:
        server.digests.pop(prepared.version, None)
        await _take_out(server, error, pauses=pauses, phase_s=phase_s)
        if previous is not None and server.fault is None and isinstance(error, NOT_LOADED):
            await _back(server, previous, session, phase_s=phase_s)
        raise
    _confirm(server, prepared.version, session)
    on_open()
    return _timings(server.api.url, prepared.version, offer.transport.name, clock)


async def verify(api: ServerApi, prepared: Prepared, *, timeout_s: float, in_pieces: bool = False) -> None:
    """Raise WeightsError unless the server has exactly the tensors of `prepared` and reports its version.

    The server generates nothing while it computes checksums. In pieces, it generates between two of them.
    """
    try:
        for piece in pieces_of(prepared.expected) if in_pieces else [None]:
            body = {"action": "checksum"} | ({} if piece is None else {"skip_tensor_list": piece.others})
            answer = await api.post("/weights_checker", body, timeout_s=timeout_s)
            compare(prepared.expected if piece is None else piece.expected, answered_checksums(answer))
    except WeightsError as error:
        raise WeightsError(f"{api.url}: version {prepared.version}: {error}") from None
    reported = (await api.get("/model_info", timeout_s=timeout_s))["weight_version"]
    if reported != str(prepared.version):
        raise WeightsError(f"{api.url}: the server reports version {reported}, but {prepared.version} was sent")


async def _stop(server: Server, in_flight: InFlight, phase_s: float) -> None:
    if in_flight == "abort-resume":
        await server.shut(deadline_s=phase_s)
    else:
        server.open = False
        await server.api.post("/pause_generation", {"mode": PAUSE_MODES[in_flight]}, timeout_s=phase_s)


@contextlib.contextmanager
def _naming_the_timeout() -> Iterator[None]:
    """Name the setting if a call has no answer in time: a server that is too slow is restarted again and again."""
    try:
        yield
    except ServerSilent as error:
        raise ServerSilent(f"{error}; raise engine.sglang.phase_timeout_s if the model is large") from error


def _name(server: Server, prepared: Prepared) -> None:
    """Let the spans of this version have its digest. Those of a version on trial are released after the verdict."""
    server.digests[prepared.version] = short_digest(prepared.digest)


def _open(server: Server, trial: Trial | None) -> None:
    server.trial = trial
    server.open = server.fault is None


def _confirm(server: Server, version: int, session: int) -> None:
    """End the trial: the server has the version, unless its session has ended meanwhile."""
    trial, server.trial = server.trial, None
    server.interrupted.clear()
    if server.session == session:
        server.version = version
        server.open = server.fault is None
    if trial is not None:
        trial.end(True)


async def _take_out(server: Server, error: BaseException, *, pauses: bool, phase_s: float) -> None:
    """After a failure: end all streams; what a version on trial has sampled is dropped. Sets `fault` if it hangs."""
    trial, server.trial = server.trial, None
    server.version, server.open = None, False
    if isinstance(error, ServerGone):
        server.fault = server.fault or error
    if trial is not None:
        trial.end(False)
        if isinstance(error, NOT_LOADED):
            with contextlib.suppress(SgpoError):  # it sets `fault`
                await server.shut(deadline_s=phase_s)
    await server.cancel_streams()
    if pauses:
        await _unpause(server.api, timeout_s=phase_s)


async def _back(server: Server, previous: Offer, session: int, *, phase_s: float) -> None:
    """Load the previous version again, verify it and serve it; if that fails, the server stays without a version."""
    prepared = previous.prepared
    try:
        with _naming_the_timeout():
            await previous.transport.send(server.api, prepared, flush=True, timeout_s=phase_s)
            await verify(server.api, prepared, timeout_s=phase_s)
    except ServerGone as error:
        server.fault = server.fault or error
    except (*NOT_LOADED, DeadlineExceeded):
        return
    else:
        if server.session == session:
            _name(server, prepared)
        _confirm(server, prepared.version, session)


async def _unpause(api: ServerApi, *, timeout_s: float) -> None:
    """After a failure: abort the requests that the paused server kept, which have been requeued, and resume it."""
    with contextlib.suppress(ServerRefused, ServerGone):
        await api.post("/abort_request", {"abort_all": True}, timeout_s=timeout_s)
        await api.post("/continue_generation", {}, timeout_s=timeout_s)


def _timings(url: str, version: int, transport: str, clock: _Clock) -> UpdateTimings:
    opened = clock.opened or time.monotonic()
    shut_s, load_s, verify_s = clock.shut - clock.began, clock.loaded - clock.shut, clock.verified - clock.loaded
    return UpdateTimings(url, version, transport, clock.began, shut_s, load_s, verify_s, opened - clock.began)

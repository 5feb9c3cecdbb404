"""SGLang servers behind the engines' Protocol: a thread with an asyncio loop, and thin hands into it.

actor's thread ── submit, cancel, load ──▶ loop (Fleet) ── HTTP ──▶ servers
               ◀── results, news ─────────┘
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sgpo_async.config.schema import Engine as EngineSettings
from sgpo_async.config.schema import Sglang
from sgpo_async.engines.base import EngineLoad, Generate, Result, Score, Weights
from sgpo_async.engines.sglang.preflight import Subject, join
from sgpo_async.engines.sglang.processes.launch import Launch
from sgpo_async.engines.sglang.serving.fleet import Fleet, FleetSettings
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.serving.server_slot import ServerSlot
from sgpo_async.engines.sglang.serving.update import Updated
from sgpo_async.engines.sglang.weight_sync.layout import layout_of
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts, model_facts
from sgpo_async.engines.sglang.weight_sync.transports import (
    DiskTransport,
    DistributedTransport,
    TensorTransport,
    Transport,
)
from sgpo_async.engines.validation import validate
from sgpo_async.errors import DeadlineExceeded, EngineError, SgpoError
from sgpo_async.model import parameters
from sgpo_async.model.load import device_of

GREEDY = 1e-5  # temperatures below are greedy for SGLang, which then reports log-probabilities at temperature 1
RESERVED = 6  # positions that SGLang keeps for itself: it refuses prompts that need them, and clips completions
SLACK_S = 30.0  # for the loop's thread beyond the servers' own deadlines


class SglangEngine:
    """Servers of one actor. Construct, `start`, `load`; see `engines.base.Engine` for the rest.

    `logs` is the folder of the servers' logs ("": a temporary one), `name` how they begin. `digest` is computed over
    (name, tensor).
    """

    def __init__(
        self,
        folder: str,
        settings: EngineSettings,
        *,
        dtype: str,
        digest: parameters.Digest,
        logs: str = "",
        name: str = "sglang",
    ) -> None:
        # What a server must pass before it takes work; set it before `start`. Returns news.
        self.examine: Callable[[Subject], Awaitable[Sequence[str]]] = join
        self._settings = settings
        device = device_of(settings.device)
        self._model = model_facts(folder, dtype=dtype, tp=settings.sglang.tp, device=device, digest=digest)
        layout_of(self._model.config, tp=settings.sglang.tp, device=device)  # now, or never
        self._own_logs = "" if logs else tempfile.mkdtemp(prefix="sgpo-sglang-")
        logs_folder = Path(logs or self._own_logs)
        logs_folder.mkdir(parents=True, exist_ok=True)
        self.server_slots = _places(settings, self._model, dtype=dtype, device=device, logs=logs_folder / name)
        self._transports = _transports(self._model, settings.sglang)
        self._fleet: Fleet | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def start(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Start the servers and wait until every one answers, or until `stopping`.

        Raises EngineError with a server's last words if it dies, DeadlineExceeded if one takes too long.
        """
        started: Future[tuple[asyncio.AbstractEventLoop, Fleet]] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="sglang", daemon=True)
        self._thread.start()
        self._loop, self._fleet = started.result(SLACK_S)
        ready = asyncio.run_coroutine_threadsafe(_wait(self._fleet.ready), self._loop)
        deadline = time.monotonic() + self._settings.sglang.start_timeout_s + SLACK_S
        try:
            while not stopping():
                try:
                    return ready.result(0.1)
                except TimeoutError:
                    self._check()
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("the SGLang servers", "start", self._settings.sglang.start_timeout_s)
        except BaseException:
            self.close()
            raise
        return None

    @property
    def version(self) -> int | None:
        """The newest version that a server holds whole and verified."""
        return self._fleet.version() if self._fleet else None

    @property
    def updates(self) -> Sequence[Updated]:
        """What the latest weight updates took, oldest first."""
        return list(self._fleet.updates) if self._fleet else []

    def submit(self, request: Generate | Score) -> None:
        """Queue a request; it waits for a server with verified weights. Raises EngineError if it cannot be served.

        Nothing invalid reaches a server: a token id beyond the vocabulary kills it.
        """
        validate(request, longest=self._model.longest - RESERVED, vocabulary=self._model.vocabulary)
        if request.temperature < GREEDY:
            raise EngineError(
                f"request {request.id}: SGLang takes temperature {request.temperature} for greedy decoding"
            )
        if isinstance(request, Score) and request.temperature != 1.0:
            raise EngineError(
                f"request {request.id}: temperature {request.temperature}; SGLang scores at temperature 1 alone"
            )
        self._call(Fleet.submit, request)

    def step(self, timeout_s: float) -> list[Result]:
        """What finished; waits up to `timeout_s` for the first. Raises EngineError when there is no hope."""
        self._check()
        if self._fleet is None:
            return []
        results: list[Result] = []
        try:
            item = self._fleet.results.get(timeout=timeout_s) if timeout_s > 0 else self._fleet.results.get_nowait()
            while True:
                if isinstance(item, SgpoError):
                    raise item
                results.append(item)
                item = self._fleet.results.get_nowait()
        except queue.Empty:
            return results

    def cancel(self, ids: Iterable[Hashable]) -> None:
        """Forget these requests, and what they have brought that `step` has not returned; unknown ids are ignored."""
        gone = set(ids)
        self._call_and_wait(Fleet.cancel, gone)
        assert self._fleet is not None
        for item in self._finished():
            if isinstance(item, SgpoError) or item.id not in gone:
                self._fleet.results.put(item)

    def load(self, weights: Weights) -> None:
        """Have every server brought to `weights`, in the background."""
        self._call(Fleet.want, weights)

    def load_status(self) -> EngineLoad:
        """Counters of the moment."""
        return self._fleet.load_status() if self._fleet else EngineLoad(running=0, waiting=0, slots=0, tokens=0)

    def news(self) -> list[str]:
        """What became of servers and versions."""
        lines: list[str] = []
        while self._fleet is not None and not self._fleet.news.empty():
            lines.append(self._fleet.news.get_nowait())
        return lines

    def reset(self) -> None:
        """Forget all requests and versions, and what is already finished; the servers stay."""
        if self._loop is None or self._fleet is None or self._failed is not None:
            return
        self._call_and_wait(Fleet.want, None)
        self._finished()

    def close(self) -> None:
        """End the servers that were launched."""
        if self._thread is not None and self._thread.is_alive():
            assert self._loop is not None and self._fleet is not None
            self._loop.call_soon_threadsafe(self._fleet.close)
            self._thread.join(SLACK_S)
        for transport in self._transports:
            transport.close()
        if self._own_logs:
            shutil.rmtree(self._own_logs, ignore_errors=True)

    def _run(self, started: Future[tuple[asyncio.AbstractEventLoop, Fleet]]) -> None:
        try:
            asyncio.run(self._live(started))
        except BaseException as error:  # told to the actor's thread by its next call
            self._failed = error

    async def _live(self, started: Future[tuple[asyncio.AbstractEventLoop, Fleet]]) -> None:
        own = self._settings.sglang
        settings = FleetSettings(
            slots=-(-self._settings.slots // len(self.server_slots)),
            ends=self._model.ends,
            in_flight=own.in_flight,
            start_s=own.start_timeout_s,
            phase_s=own.phase_timeout_s,
        )
        fleet = Fleet(self.server_slots, settings, self._transports, self._examine)
        started.set_result((asyncio.get_running_loop(), fleet))
        await fleet.run()

    async def _examine(self, server: Server) -> Sequence[str]:
        return await self.examine(
            Subject(server=server, model=self._model, engine=self._settings, transports=self._transports)
        )

    def _call(self, method: Callable[..., None], *args: Any) -> None:
        self._check()
        assert self._loop is not None, "start comes first"
        self._loop.call_soon_threadsafe(method, self._fleet, *args)

    def _call_and_wait(self, method: Callable[..., None], *args: Any) -> None:
        self._check()
        assert self._loop is not None, "start comes first"
        done = asyncio.run_coroutine_threadsafe(_done(method, self._fleet, *args), self._loop)
        try:
            done.result(SLACK_S)
        except TimeoutError:
            self._check()
            raise DeadlineExceeded("the SGLang servers' loop", "answer", SLACK_S) from None

    def _finished(self) -> list[Result | SgpoError]:
        """Take all that `step` has not returned."""
        assert self._fleet is not None
        items = []
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._fleet.results.get_nowait())
        return items

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed


def _transports(model: ModelFacts, settings: Sglang) -> list[Transport]:
    """The configured one, and what a server falls back on. Attached servers may not see our disk unless told so."""
    known: dict[str, Transport] = {
        "distributed": DistributedTransport(model, tp=settings.tp),
        "tensor": TensorTransport(model, tp=settings.tp),
    }
    if settings.transport == "disk" or not settings.urls:
        known["disk"] = DiskTransport(model, settings.folder)
    first = known.pop(settings.transport)
    known.pop("distributed", None)
    return [first, *known.values()]


def _places(settings: EngineSettings, model: ModelFacts, *, dtype: str, device: str, logs: Path) -> list[ServerSlot]:
    own = settings.sglang
    if own.urls:
        return [ServerSlot(None, url, None) for url in own.urls]
    slots = -(-settings.slots // own.servers)
    launches = [
        Launch(
            settings=own,
            model=model.folder,
            dtype=dtype,
            device=device,
            slots=slots,
            longest=model.longest,
            index=index,
        )
        for index in range(own.servers)
    ]
    return [
        ServerSlot(launch, f"number {launch.index}", logs.with_name(f"{logs.name}-server-{launch.index}.log"))
        for launch in launches
    ]


async def _wait(ready: asyncio.Future[None]) -> None:
    await asyncio.shield(ready)


async def _done(function: Callable[..., None], *args: Any) -> None:
    function(*args)

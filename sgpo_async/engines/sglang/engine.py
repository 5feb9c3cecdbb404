"""SGLang servers behind the Engine Protocol. A thread runs an asyncio loop; the engine's methods call into the loop.

actor's thread ── submit, cancel, load ──▶ loop (Fleet) ── HTTP ──▶ servers
               ◀── results, events ───────┘
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
from typing import Any, TypeVar

from sgpo_async.config.schema import Engine as EngineSettings
from sgpo_async.config.schema import Sglang
from sgpo_async.engines.base import (
    EngineLoad,
    Generate,
    Result,
    SampledTokens,
    Score,
    ScoredCanary,
    Weights,
    score_of,
)
from sgpo_async.engines.sglang.preflight import Subject, join
from sgpo_async.engines.sglang.processes.launch import Launch
from sgpo_async.engines.sglang.serving.fleet import Fleet, FleetSettings
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.serving.server_slot import ServerSlot
from sgpo_async.engines.sglang.serving.update import UpdateTimings
from sgpo_async.engines.sglang.weight_sync.distributed import DistributedTransport
from sgpo_async.engines.sglang.weight_sync.layout import layout_of
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts, model_facts
from sgpo_async.engines.sglang.weight_sync.transports import (
    DiskTransport,
    TensorTransport,
    Transport,
)
from sgpo_async.engines.validation import validate
from sgpo_async.errors import DeadlineExceeded, EngineError, SgpoError
from sgpo_async.model import parameters
from sgpo_async.model.canary import Canary
from sgpo_async.model.load import cache_bytes, device_of

T = TypeVar("T")

GREEDY = 1e-5  # below this temperature SGLang decodes greedily and reports log-probabilities at temperature 1
RESERVED = 6  # positions that SGLang reserves: it refuses prompts that need them, and truncates completions
SLACK_S = 30.0  # extra time for the loop's thread beyond the timeouts of the servers


class SglangEngine:
    """The servers of one actor. Construct it, call `start`, then `load`; see `engines.base.Engine` for the rest.

    `logs` is the folder of the servers' log files ("": a temporary folder), `name` the prefix of their file names.
    `digest` is computed over (name, tensor). Raises EngineError if the layout of the model is not supported, DataError
    if the model cannot be read.
    """

    reproducible = False  # a CPU server ignores seeds, and elsewhere the batch changes the logits a little

    def __init__(  # noqa: PLR0913 (what the configuration says of the engine)
        self,
        folder: str,
        settings: EngineSettings,
        *,
        dtype: str,
        digest: parameters.Digest,
        truncated: bool = False,
        logs: str = "",
        name: str = "sglang",
    ) -> None:
        self._truncated = truncated
        # The checks that a server must pass before it gets requests; they return events. Set this before `start`.
        self.examine: Callable[[Subject], Awaitable[Sequence[str]]] = join
        self._settings = settings
        device = device_of(settings.device)
        self._model = model_facts(folder, dtype=dtype, tp=settings.sglang.tp, device=device, digest=digest)
        layout_of(self._model.config, tp=settings.sglang.tp, device=device)  # fail early
        self._own_logs = "" if logs else tempfile.mkdtemp(prefix="sgpo-sglang-")
        logs_folder = Path(logs or self._own_logs)
        logs_folder.mkdir(parents=True, exist_ok=True)
        self.server_slots = _server_slots(settings, self._model, dtype=dtype, device=device, logs=logs_folder / name)
        self._transports = _transports(self._model, settings.sglang)
        self._fleet: Fleet | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def start(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Start the servers and wait until all are ready, or until `stopping()` is true.

        Raises EngineError with the end of its log if a server dies, DeadlineExceeded if one takes too long.
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
        """The newest version that some server has loaded completely and verified."""
        return self._fleet.version() if self._fleet else None

    @property
    def digest(self) -> int:
        """Short digest of `version`, which a server has verified; 0 without any."""
        return self._fleet.digest() if self._fleet else 0

    def watch(self, canary: Canary, *, every_s: float) -> None:
        """Score `canary` on every server after each update and every `every_s` seconds; see `Engine.watch`."""
        score = score_of(canary)
        self._validate(score)
        self._call(Fleet.watch, score, every_s)

    def canaries(self) -> list[ScoredCanary]:
        """The scores of the canary since the last call."""
        found: list[ScoredCanary] = []
        while self._fleet is not None and not self._fleet.canaries.empty():
            found.append(self._fleet.canaries.get_nowait())
        return found

    @property
    def updates(self) -> Sequence[UpdateTimings]:
        """The timings of the latest weight updates, oldest first."""
        return list(self._fleet.updates) if self._fleet else []

    def submit(self, request: Generate | Score) -> None:
        """Queue a request; it waits for a server with verified weights. Raises EngineError if the request is invalid.

        Invalid requests must not reach a server: a token id beyond the vocabulary kills it.
        """
        self._validate(request)
        if request.temperature < GREEDY:
            raise EngineError(
                f"request {request.id}: temperature must be >= {GREEDY:g}, below which SGLang decodes greedily, "
                f"got {request.temperature}"
            )
        if isinstance(request, Score) and request.temperature != 1.0:
            raise EngineError(
                f"request {request.id}: temperature of a score must be 1, the only one SGLang supports, "
                f"got {request.temperature}"
            )
        self._call(Fleet.submit, request)

    def step(self, timeout_s: float) -> list[Result]:
        """Finished and failed requests; waits up to `timeout_s` for one. Raises EngineError if no server works."""
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

    def progress(self, ids: Iterable[Hashable]) -> dict[Hashable, SampledTokens]:
        """What these unfinished generations have sampled so far; see `Engine.progress`.

        While SGLang pauses for updates (`in_flight` other than abort-resume), it names the versions of what it
        generates after a stream's first update only at the end of the stream, so those tokens are left out.
        """
        return self._call_and_wait(Fleet.progress, set(ids))

    def cancel(self, ids: Iterable[Hashable]) -> None:
        """Cancel these requests and drop their results that `step` has not returned; unknown ids are ignored."""
        cancelled = set(ids)
        self._call_and_wait(Fleet.cancel, cancelled)
        assert self._fleet is not None
        for item in self._take_results():
            if isinstance(item, SgpoError) or item.id not in cancelled:
                self._fleet.results.put(item)

    def load(self, weights: Weights) -> None:
        """Load `weights` into every server in the background."""
        self._call(Fleet.want, weights)

    def load_status(self) -> EngineLoad:
        """The current load."""
        return self._fleet.load_status() if self._fleet else EngineLoad(running=0, waiting=0, slots=0, tokens=0)

    def events(self) -> list[str]:
        """What happened to servers and versions since the last call, one line each."""
        lines: list[str] = []
        while self._fleet is not None and not self._fleet.events.empty():
            lines.append(self._fleet.events.get_nowait())
        return lines

    def reset(self) -> None:
        """Drop all requests, results and versions; the servers keep running."""
        if self._loop is None or self._fleet is None or self._failed is not None:
            return
        self._call_and_wait(Fleet.want, None)
        self._take_results()

    def close(self) -> None:
        """Stop the servers that this engine launched."""
        if self._thread is not None and self._thread.is_alive():
            assert self._loop is not None and self._fleet is not None
            self._loop.call_soon_threadsafe(self._fleet.close)
            self._thread.join(SLACK_S)
        for transport in self._transports:
            transport.close()
        if self._own_logs:
            shutil.rmtree(self._own_logs, ignore_errors=True)

    def _validate(self, request: Generate | Score) -> None:
        longest = self._model.longest - RESERVED
        validate(request, longest=longest, vocabulary=self._model.vocabulary, ends=self._model.ends)

    def _run(self, started: Future[tuple[asyncio.AbstractEventLoop, Fleet]]) -> None:
        try:
            asyncio.run(self._live(started))
        except BaseException as error:  # the next call of the actor's thread raises it
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
            Subject(
                server=server,
                model=self._model,
                engine=self._settings,
                transports=self._transports,
                truncated=self._truncated,
            )
        )

    def _call(self, method: Callable[..., None], *args: Any) -> None:
        self._check()
        assert self._loop is not None, "call start first"
        self._loop.call_soon_threadsafe(method, self._fleet, *args)

    def _call_and_wait(self, method: Callable[..., T], *args: Any) -> T:
        self._check()
        assert self._loop is not None, "call start first"
        done = asyncio.run_coroutine_threadsafe(_done(method, self._fleet, *args), self._loop)
        try:
            return done.result(SLACK_S)
        except TimeoutError:
            self._check()
            raise DeadlineExceeded("the SGLang servers' loop", "answer", SLACK_S) from None

    def _take_results(self) -> list[Result | SgpoError]:
        """Remove and return all results that `step` has not returned."""
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
    """The transport to use, then the fallbacks in order.

    The disk is a fallback only for servers that were launched here: attached servers may not see this disk.
    """
    known: dict[str, Transport] = {
        "distributed": DistributedTransport(model, tp=settings.tp),
        "tensor": TensorTransport(model, tp=settings.tp),
        "disk": DiskTransport(model, settings.folder),
    }
    first = known.pop(settings.used_transport)
    known.pop("distributed", None)
    if settings.urls:
        known.pop("disk", None)
    return [first, *known.values()]


def _server_slots(
    settings: EngineSettings, model: ModelFacts, *, dtype: str, device: str, logs: Path
) -> list[ServerSlot]:
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
            token_bytes=cache_bytes(model.skeleton.config, dtype=model.dtype, tp=own.tp),
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


async def _done(function: Callable[..., T], *args: Any) -> T:
    return function(*args)

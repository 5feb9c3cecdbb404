"""Fake SGLang servers for unit tests: they generate one token per step, and die or hang on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from sgpo_async.engines.base import Generate, Weights
from sgpo_async.engines.sglang.processes.api import Json, ServerGone
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.engines.sglang.serving.server import Server

TOKENS = 6
SLOTS = 4
PHASE_S = 0.1  # timeout of each phase of an update

Condition = Callable[[Partial], bool]


def never(_: Partial) -> bool:
    return False


class FakeApi:
    """A fake HTTP API. `answer` is called for each POST and may raise; an abort ends the streams that do not hang."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answer: Callable[[str], None] = lambda path: None
        self.abort_all = lambda: None

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Json:
        await asyncio.sleep(0)
        self.answer(path)
        if path == "/abort_request" and body.get("abort_all"):
            self.abort_all()
        return {}


class FakeServer(Server):
    """A fake server.

    If `kills` holds for a request, its next token kills the server. If `hangs` holds, no further token arrives, and
    aborts are ignored. If `slow` holds, no further token arrives before an abort.
    """

    def __init__(self, name: str, kills: Condition = never, hangs: Condition = never, slow: Condition = never) -> None:
        self.fake_api = FakeApi(name)
        super().__init__(self.fake_api, slots=SLOTS, ends=(), idle_timeout_s=1.0)  # type: ignore[arg-type]
        self.fake_api.abort_all = lambda: self.aborted.update(self.running)
        self.kills, self.hangs, self.slow, self.deaths = kills, hangs, slow, 0
        self.gone = asyncio.Event()
        self.aborted: set[str] = set()
        self.co_running: list[set[Any]] = []  # ids of the running requests, at each token
        self.version, self.open = 0, True

    async def extend(self, partial: Partial, rid: str, version: int) -> None:
        gone = self.gone
        self.running[rid].connected = True
        while partial.remaining and rid not in self.aborted:
            self.co_running.append({running.item.request.id for running in self.running.values()})  # type: ignore[union-attr]
            await asyncio.sleep(0)
            if gone.is_set() or self.kills(partial):
                gone.set()
                raise ServerGone(f"{self.api.url}: simulated death")
            if self.hangs(partial):
                await asyncio.Event().wait()
            if self.slow(partial):
                continue
            partial.extend([[-1.0, 7, None]])
            partial.close_span(version, len(partial.tokens))

    async def abort(self, rid: str) -> None:
        self.aborted.add(rid)

    def restart(self) -> None:
        """Simulate the fleet's watchdog: replace the dead server with a new one."""
        self.deaths += 1
        self.gone, self.fault, self.death_recorded, self.open = asyncio.Event(), None, False, True
        self.interrupted.clear()


def generate(id: Any) -> Generate:
    return Generate(id=id, prompt=np.arange(3, dtype=np.int32), max_new_tokens=TOKENS, temperature=1.0, seed=0)


def at(*ids: Any, tokens: int = 2) -> Condition:
    """A condition that holds for the requests `ids` as soon as they have `tokens` tokens."""
    return lambda partial: partial.request.id in ids and len(partial.tokens) >= tokens


class FakeTransport:
    """A transport that sends nothing. `on_send` is called for each update and may raise."""

    name = "fake"

    def __init__(self, on_send: Callable[[], None] = lambda: None) -> None:
        self.on_send = on_send

    def prepare(self, weights: Weights) -> Any:
        return SimpleNamespace(version=weights.version)

    async def send(self, api: Any, prepared: Any, *, flush: bool, timeout_s: float) -> None:
        await asyncio.sleep(0)
        self.on_send()


async def verify_nothing(api: Any, prepared: Any, *, timeout_s: float) -> None:
    """Replaces the verification of an update, which compares checksums."""

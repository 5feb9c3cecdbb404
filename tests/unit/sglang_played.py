"""SGLang servers that are played: they give one token a turn, and die or hang when they are told to."""

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
PHASE_S = 0.1  # of an update

Does = Callable[[Partial], bool]


def never(_: Partial) -> bool:
    return False


class FakeApi:
    """`answer` plays what the server answers to a POST; an abort ends the streams that are not stuck."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answer: Callable[[str], None] = lambda path: None  # may raise
        self.abort_all = lambda: None

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Json:
        await asyncio.sleep(0)
        self.answer(path)
        if path == "/abort_request" and body.get("abort_all"):
            self.abort_all()
        return {}


class FakeServer(Server):
    """`kills` says whether a request's next token is its death, `hangs` whether it never comes and no abort helps,
    `slow` whether nothing comes before an abort."""

    def __init__(self, name: str, kills: Does = never, hangs: Does = never, slow: Does = never) -> None:
        self.fake_api = FakeApi(name)
        super().__init__(self.fake_api, slots=SLOTS, ends=(), idle_timeout_s=1.0)  # type: ignore[arg-type]
        self.fake_api.abort_all = lambda: self.aborted.update(self.running)
        self.kills, self.hangs, self.slow, self.deaths = kills, hangs, slow, 0
        self.gone = asyncio.Event()
        self.aborted: set[str] = set()
        self.ran: list[set[Any]] = []  # who ran together, at each token
        self.version, self.open = 0, True

    async def extend(self, partial: Partial, rid: str, version: int) -> None:
        gone = self.gone
        self.running[rid].reached = True
        while partial.remaining and rid not in self.aborted:
            self.ran.append({running.item.request.id for running in self.running.values()})  # type: ignore[union-attr]
            await asyncio.sleep(0)
            if gone.is_set() or self.kills(partial):
                gone.set()
                raise ServerGone(f"{self.api.url}: played dead")
            if self.hangs(partial):
                await asyncio.Event().wait()
            if self.slow(partial):
                continue
            partial.extend([[-1.0, 7, None]])
            partial.close_span(version, len(partial.tokens))

    async def abort(self, rid: str) -> None:
        self.aborted.add(rid)

    def restart(self) -> None:
        """What the fleet's watchdog does: end what still runs, and put a new server there."""
        self.deaths += 1
        self.gone, self.fault, self.death_recorded, self.open = asyncio.Event(), None, False, True
        self.interrupted.clear()


def ask(id: Any) -> Generate:
    return Generate(id=id, prompt=np.arange(3, dtype=np.int32), max_new_tokens=TOKENS, temperature=1.0, seed=0)


def at(*ids: Any, tokens: int = 2) -> Does:
    """These requests, from so many tokens on."""
    return lambda partial: partial.request.id in ids and len(partial.tokens) >= tokens


class FakeTransport:
    """Sends nothing; `does` plays what happens meanwhile, and may raise."""

    name = "played"

    def __init__(self, does: Callable[[], None] = lambda: None) -> None:
        self.does = does

    def prepare(self, weights: Weights) -> Any:
        return SimpleNamespace(version=weights.version)

    async def send(self, api: Any, prepared: Any, *, flush: bool, timeout_s: float) -> None:
        await asyncio.sleep(0)
        self.does()


async def verify_nothing(api: Any, prepared: Any, *, timeout_s: float) -> None:
    """In place of an update's look at the checksums."""

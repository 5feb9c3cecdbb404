"""Fake SGLang servers for unit tests: they generate one token per step, and die or hang on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from sgpo_async.engines.base import Generate, Weights
from sgpo_async.engines.sglang.processes.api import Json, ServerGone
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.serving.versions import Offer
from sgpo_async.engines.sglang.weight_sync.transports import Transport

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
            partial.close_span(version, 0, len(partial.tokens))

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


class FakeTransport(Transport):
    """A transport that sends nothing. `on_send` is called for each update and may raise."""

    name = "fake"

    def __init__(self, on_send: Callable[[], None] = lambda: None) -> None:
        self.on_send = on_send

    def prepare(self, weights: Weights) -> Any:
        return SimpleNamespace(version=weights.version, digest="00" * 16)

    async def send(self, api: Any, prepared: Any, *, flush: bool, timeout_s: float) -> None:
        await asyncio.sleep(0)
        self.on_send()

    def release(self, prepared: Any) -> None:
        pass


def offer_of(version: int, transport: FakeTransport) -> Offer:
    weights: Any = SimpleNamespace(version=version, digest="00" * 16)
    return Offer(weights, transport, transport.prepare(weights))


async def verify_nothing(api: Any, prepared: Any, *, timeout_s: float, in_pieces: bool = False) -> None:
    """Replaces the verification of an update, which compares checksums."""


class StreamingApi(FakeApi):
    """A fake HTTP API whose /generate streams as SGLang's does: `interval` tokens per message, versions in the last.

    The token at a position depends on the position alone, and its log-probability on the position and the version.
    While `holds` is true nothing is generated. `breaks` is called before the end of a finished stream and may raise.
    """

    def __init__(self, url: str = "server", *, interval: int = 1) -> None:
        super().__init__(url)
        self.interval, self.version, self.paused = interval, 0, False
        self.reports_kept = True  # SGLang before 0.5.23 does not
        self.bodies: list[Json] = []
        self.holds: Callable[[list[int]], bool] = lambda tokens: False
        self.breaks: Callable[[], None] = lambda: None
        self._aborted: set[str] = set()

    async def get(self, path: str, *, timeout_s: float) -> Json:
        return {"weight_version": str(self.version)}

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float, **_: Any) -> Json:
        await asyncio.sleep(0)
        self.answer(path)
        if path in {"/pause_generation", "/continue_generation"}:
            self.paused = path == "/pause_generation"
        if path == "/abort_request":
            self._aborted |= {one["rid"] for one in self.bodies} if body.get("abort_all") else {body["rid"]}
        return {}

    async def stream(
        self, body: Json, *, idle_timeout_s: float, on_connected: Callable[[], None]
    ) -> AsyncIterator[Json]:
        self.bodies.append(body)
        on_connected()
        sampling, first, tokens, versions = body["sampling_params"], len(body["input_ids"]), [], []
        finish = None
        while finish is None:
            await asyncio.sleep(0)
            self.answer("/generate")
            if body["rid"] in self._aborted:
                finish = {"type": "abort"}
            elif self.paused or self.holds(tokens):
                continue
            else:
                tokens.append(token_at(first + len(tokens)))
                versions.append(self.version)
                if tokens[-1] in sampling["stop_token_ids"]:
                    finish = {"type": "stop"}
                elif len(tokens) == sampling["max_new_tokens"]:
                    finish = {"type": "length"}
            if finish is not None or len(tokens) % self.interval == 0:
                yield {"meta_info": self._meta(first, versions, body, finish)}
        await asyncio.sleep(0)
        self.breaks()

    def _meta(self, first: int, versions: list[int], body: Json, finish: Json | None) -> Json:
        k = body["top_logprobs_num"]
        positions = [(first + i, version) for i, version in enumerate(versions)]
        meta: Json = {
            "completion_tokens": len(versions),
            "output_token_logprobs": [[logprob_at(*at), token_at(at[0]), None] for at in positions],
            "finish_reason": finish,
        }
        if k:
            meta["output_top_logprobs"] = [
                [[logprob_at(*at) - j, token_at(at[0]) + j, None] for j in range(k)] for at in positions
            ]
        if body.get("return_sampling_mask") and self.reports_kept:
            meta["output_token_sampling_mask"] = [kept_at(at) for at, _ in positions]
            meta["output_token_sampling_logprobs"] = [logprob_at(*at) / 2 for at in positions]
        if finish is not None:
            ends = [i for i in range(1, len(versions) + 1) if versions[i - 1] != (versions[i:] or [None])[0]]
            meta["weight_versions"] = [{"version": str(versions[end - 1]), "end": end} for end in ends] or [
                {"version": str(self.version), "end": 0}
            ]
        return meta


def kept_at(position: int) -> list[int]:
    """One to three tokens, the sampled one among them."""
    own = token_at(position)
    return {0: [own], 1: [own + 1, own], 2: [own + 1, own, own + 2]}[position % 3]


def token_at(position: int) -> int:
    return 10 + position * 7 % 23


def logprob_at(position: int, version: int) -> float:
    return -1.0 - version - position / 64  # exact in float32

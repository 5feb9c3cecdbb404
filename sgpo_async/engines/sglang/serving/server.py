"""One server in service: its gate, its streams, the version it holds.

    open      requests are sent to it
    shut      while its weights change, and while nobody can say which weights it has

A stream ends in a finished continuation, or in a partial one that somebody else goes on with: it was aborted, the
server died, or was given up. Streams and gate belong to one asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgpo_async.engines.base import Generated, Score, Scored
from sgpo_async.engines.sglang.processes.api import Json, ServerApi, ServerGone, ServerRefused
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.errors import DeadlineExceeded, SgpoError

ABORT_AGAIN_S = 0.05  # an abort does not reach requests that are still on their way to the scheduler


@dataclass
class Running:
    """One request on a server."""

    task: asyncio.Task[Generated | Scored | None]
    item: Partial | Score
    reached: bool = False  # the server has been connected to for it: before that it can do no harm


class Server:
    """The engine's view of one living server.

    `ends` are the token ids that end a continuation; `idle_timeout_s` is how long a stream may say nothing.
    """

    def __init__(self, api: ServerApi, *, slots: int, ends: Collection[int], idle_timeout_s: float) -> None:
        self.api, self.slots = api, slots
        self.version: int | None = None  # whole and verified; while the gate is shut, the one before
        self.open = False
        self.fault: SgpoError | None = None  # why it must be given up
        self.death_recorded = False  # it died, or gave no answer, and those who ran on it have been noted
        self.running: dict[str, Running] = {}  # by rid: ids of requests may come again in another session
        self.interrupted: dict[str, Running] = {}  # who was cut off and had not ended, until the server is in service again
        self.changes = 0  # how often weights began to change
        self._ends, self._silence_s = ends, idle_timeout_s
        self._sent = 0

    @property
    def room(self) -> int:
        """How many more requests it takes now."""
        return self.slots - len(self.running) if self.open else 0

    async def extend(self, partial: Partial, rid: str, version: int) -> None:
        """Stream tokens of `version`, which the server holds, into `partial` until it is finished or the stream ends.

        Raises ServerGone when the server does not answer, ServerRefused when it does not take the request or names
        versions that we did not load. What `partial` holds then is still right.
        """
        changes, start = self.changes, len(partial.tokens)
        spans: list[Json] = []
        try:
            reached = functools.partial(self._reached, rid)
            async for message in self.api.stream(self._body(partial, rid), idle_timeout_s=self._silence_s, reached=reached):
                meta = message["meta_info"]
                # The word of an abort may hold everything once more: only what is new counts.
                new = meta["completion_tokens"] - (len(partial.tokens) - start)
                pairs = meta["output_token_logprobs"]
                partial.extend(pairs[max(len(pairs) - new, 0) :], _likeliest(self.api.url, meta, partial, new))
                if (finish := meta["finish_reason"]) is not None:
                    _check_finish(self.api.url, finish)
                    spans = meta["weight_versions"]
        finally:
            if not spans:
                # Died, or cut off: the tokens are of the version we began with, unless weights have changed since.
                if changes == self.changes:
                    partial.close_span(version, len(partial.tokens))
                partial.forget_open()
        self._take_spans(partial, start, spans)

    async def score(self, request: Score, rid: str, version: int) -> Scored | None:
        """Log-probabilities of given tokens by one prefill; None if it was aborted.

        SGLang gives them at temperature 1, whatever it is asked for. Raises ServerGone, ServerRefused.
        """
        assert request.temperature == 1.0
        changes = self.changes
        body = {
            "rid": rid,
            "input_ids": [*request.prompt.tolist(), *request.tokens.tolist()],
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": request.prompt.size - 1,
        }
        reached = functools.partial(self._reached, rid)
        answer = await self.api.post("/generate", body, timeout_s=self._silence_s, reached=reached)
        meta = answer["meta_info"]
        _check_finish(self.api.url, meta["finish_reason"])
        if meta["finish_reason"]["type"] == "abort" or changes != self.changes:
            return None
        pairs = meta["input_token_logprobs"][1:]  # the first is the last token of the prompt, without a value
        if len(pairs) != request.tokens.size:
            raise ServerRefused(
                f"{self.api.url}/generate: {len(pairs)} log-probabilities of {request.tokens.size} tokens"
            )
        return Scored(id=request.id, logprobs=np.array([pair[0] for pair in pairs], np.float32), version=version)

    async def shut(self, *, deadline_s: float) -> None:
        """Take no more requests and end the streams; partial outputs are kept.

        Raises DeadlineExceeded if a stream does not end; it is then cut off. A server that does not end its streams is
        given up, and whoever is cut off may be the reason.
        """
        self.open = False
        until = asyncio.get_running_loop().time() + deadline_s
        try:
            while self.running:
                await self.api.post("/abort_request", {"abort_all": True}, timeout_s=deadline_s)
                if tasks := self._tasks():
                    await asyncio.wait(tasks, timeout=ABORT_AGAIN_S)
                if self.running and asyncio.get_running_loop().time() > until:
                    raise DeadlineExceeded(f"server {self.api.url}", "end of its streams after an abort", deadline_s)
        except SgpoError as error:
            self.fault = self.fault or error  # before anybody is cut off, and goes to another server
            raise
        finally:
            await self.cancel_streams()

    async def abort(self, rid: str) -> None:
        """End one stream: a mere disconnection would leave the request running for seconds."""
        with contextlib.suppress(ServerRefused, ServerGone):  # a server that is gone has no stream either
            await self.api.post("/abort_request", {"rid": rid}, timeout_s=self._silence_s)

    async def cancel_streams(self) -> None:
        """Take no more requests and leave the streams where they are, without asking the server. `aboard` has them."""
        self.open = False
        self.interrupted |= {rid: running for rid, running in self.running.items() if not running.task.done()}
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    def close_spans(self, version: int) -> None:
        """Whatever has arrived by now is of `version`."""
        for running in self.running.values():
            if isinstance(running.item, Partial):
                running.item.close_span(version, len(running.item.tokens))

    def _reached(self, rid: str) -> None:
        if (running := self.running.get(rid)) is not None:
            running.reached = True

    def _tasks(self) -> list[asyncio.Task[Generated | Scored | None]]:
        return [running.task for running in self.running.values()]

    def _body(self, partial: Partial, rid: str) -> dict[str, Any]:
        """All that shapes the distribution is said: a server may have defaults of its own."""
        sampling = {
            "temperature": partial.request.temperature,
            "max_new_tokens": partial.remaining,
            "top_p": partial.request.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "stop_token_ids": sorted(self._ends),
            "sampling_seed": partial.request.seed % 2**31,  # a CPU server ignores it
        }
        ids = partial.input_ids()
        asked = {"return_logprob": True, "top_logprobs_num": partial.request.top_logprobs_num}
        return {"rid": rid, "input_ids": ids, "sampling_params": sampling, "stream": True} | asked

    def next_rid(self) -> str:
        """Of fixed length: SGLang aborts every request whose rid begins with the one it is given."""
        self._sent += 1
        return f"sgpo-{self._sent:012d}"

    def _take_spans(self, partial: Partial, start: int, spans: list[Json]) -> None:
        """Give the tokens since `start` their versions. Raises ServerRefused if the spans do not fit what we loaded."""
        fits = [span["end"] for span in spans][-1:] == [len(partial.tokens) - start]
        if not fits or not all(span["version"].isdecimal() for span in spans):
            partial.forget_open()
            raise ServerRefused(f"{self.api.url}: weight versions {spans} of {len(partial.tokens) - start} tokens")
        for span in spans:
            partial.close_span(int(span["version"]), start + span["end"])


def _likeliest(url: str, meta: Json, partial: Partial, new: int) -> list[list[Any]]:
    """The k likeliest pairs at each of the newest places. Raises ServerRefused if they are not there."""
    k = partial.request.top_logprobs_num
    if not k:
        return []
    places = (meta.get("output_top_logprobs") or [])[-new:] if new else []
    if len(places) != new or any(not pairs or len(pairs) != k for pairs in places):
        raise ServerRefused(f"{url}/generate: {k} likeliest tokens asked for at {new} places, got {len(places)}")
    return places


def _check_finish(url: str, finish: Json) -> None:
    """An abort of ours is an end like others; one with a status code is an error."""
    if finish["type"] == "abort" and finish.get("status_code"):
        raise ServerRefused(f"{url}/generate: {finish.get('message')} (status {finish['status_code']})")

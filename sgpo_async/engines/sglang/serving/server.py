"""One running server: whether it takes requests, its streams, and its weight version.

    open      requests are sent to it
    on trial  the same, while its new weights are verified: nobody sees the results before that has succeeded
    shut      while its weights change, and while its weights are unknown

A stream ends with a finished completion, or with a partial one that another attempt continues (after an abort, or when
the server died or is restarted). All calls come from one asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgpo_async.engines.base import Generated, Score, Scored
from sgpo_async.engines.sglang.processes.api import Json, ServerApi, ServerGone, ServerRefused
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.errors import DeadlineExceeded, SgpoError

ABORT_INTERVAL_S = 0.05  # aborts are repeated: one misses requests that have not reached the scheduler yet


@dataclass(frozen=True)
class Trial:
    """A version that a server already uses while it is being verified."""

    version: int
    verdict: asyncio.Future[bool]  # whether the server has exactly the weights of the version

    @property
    def passed(self) -> bool:
        """Whether the verification has succeeded."""
        return self.verdict.done() and self.verdict.result()

    def end(self, passed: bool) -> None:
        """Give the verdict, unless there is one."""
        if not self.verdict.done():
            self.verdict.set_result(passed)


@dataclass
class Running:
    """One request on a server."""

    task: asyncio.Task[Generated | Scored | None]
    item: Partial | Score
    connected: bool = False  # before there is a connection, the request cannot harm the server


class Server:
    """The engine's state of one running server.

    `ends` are the token ids that end a completion; a stream fails after `idle_timeout_s` without a message.
    """

    def __init__(self, api: ServerApi, *, slots: int, ends: Collection[int], idle_timeout_s: float) -> None:
        self.api, self.slots = api, slots
        self.version: int | None = None  # complete and verified; during an update, the previous version
        # Short digest of every version that was verified here, or is on trial, in this session.
        self.digests: dict[int, int] = {}
        self.trial: Trial | None = None
        self.session = 0  # number of calls of `forget`
        self.open = False
        self.fault: SgpoError | None = None  # why the server must be restarted
        self.death_recorded = False  # its death has been recorded for the requests that ran on it
        self.running: dict[str, Running] = {}  # by rid, because another session may use the same request ids
        self.interrupted: dict[str, Running] = {}  # cancelled before their end; cleared by a successful update
        self.changes = 0  # number of weight updates that began
        self._ends, self._idle_timeout_s = ends, idle_timeout_s
        self._sent = 0

    @property
    def generates(self) -> int | None:
        """The version that generates the tokens of an open server: the one on trial, if there is one."""
        return self.version if self.trial is None else self.trial.version

    def forget(self) -> None:
        """Shut the server until the next version: equal version numbers of different sessions are different weights."""
        self.version, self.open, self.session = None, False, self.session + 1
        self.digests = {}

    @property
    def room(self) -> int:
        """How many more requests it can take now."""
        return self.slots - len(self.running) if self.open else 0

    async def extend(self, partial: Partial, rid: str, version: int) -> None:
        """Stream tokens into `partial` until it is finished or the stream ends; the server has `version`.

        Raises ServerGone if the server does not answer, ServerRefused if it refuses the request or reports versions
        that were not loaded. The contents of `partial` are correct at any time, also after an error.

        Tokens that arrive before an update begins are of `version`. Of later ones, which a paused server sends, only
        SGLang's last message names the versions; they are dropped if it does not arrive.
        """
        changes, start = self.changes, len(partial.tokens)
        digests = self.digests  # of this session: a new one begins a new map
        try:
            on_connected = functools.partial(self._mark_connected, rid)
            async for message in self.api.stream(
                self._body(partial, rid), idle_timeout_s=self._idle_timeout_s, on_connected=on_connected
            ):
                meta = message["meta_info"]
                # The last message after an abort may repeat all tokens: only the new ones count.
                new = meta["completion_tokens"] - (len(partial.tokens) - start)
                pairs = meta["output_token_logprobs"]
                kept = _kept(self.api.url, meta, new) if partial.request.report_kept else None
                partial.extend(pairs[max(len(pairs) - new, 0) :], _likeliest(self.api.url, meta, partial, new))
                if kept:
                    partial.extend_kept(*kept)
                if changes == self.changes:
                    # 0: the session has ended before this began, and nobody waits for the result.
                    partial.close_span(version, digests.get(version, 0), len(partial.tokens))
                if (finish := meta["finish_reason"]) is not None:
                    _check_finish(self.api.url, finish)
                    self._take_spans(partial, start, version, meta["weight_versions"], digests)
        finally:
            partial.drop_unversioned()

    async def score(self, request: Score, rid: str, version: int) -> Scored | None:
        """Log-probabilities of given tokens, computed by one prefill; None if it was aborted.

        SGLang computes them at temperature 1 and ignores the requested one. Raises ServerGone, ServerRefused.
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
        on_connected = functools.partial(self._mark_connected, rid)
        answer = await self.api.post("/generate", body, timeout_s=self._idle_timeout_s, on_connected=on_connected)
        meta = answer["meta_info"]
        _check_finish(self.api.url, meta["finish_reason"])
        if meta["finish_reason"]["type"] == "abort" or changes != self.changes:
            return None
        pairs = meta["input_token_logprobs"][1:]  # the first is the last token of the prompt, without a value
        if len(pairs) != request.tokens.size:
            raise ServerRefused(
                f"{self.api.url}/generate: got {len(pairs)} log-probabilities for {request.tokens.size} tokens"
            )
        return Scored(id=request.id, logprobs=np.array([pair[0] for pair in pairs], np.float32), version=version)

    async def shut(self, *, deadline_s: float) -> None:
        """Stop taking requests and abort the streams; partial completions are kept.

        Raises DeadlineExceeded if a stream does not end in time. It is then cancelled and kept in `interrupted`,
        because its request may be the cause, and `fault` is set.
        """
        self.open = False
        until = asyncio.get_running_loop().time() + deadline_s
        try:
            while self.running:
                await self.api.post("/abort_request", {"abort_all": True}, timeout_s=deadline_s)
                if tasks := self._tasks():
                    await asyncio.wait(tasks, timeout=ABORT_INTERVAL_S)
                if self.running and asyncio.get_running_loop().time() > until:
                    raise DeadlineExceeded(f"server {self.api.url}", "end of its streams after an abort", deadline_s)
        except SgpoError as error:
            self.fault = self.fault or error  # set this before cancelled requests move to another server
            raise
        finally:
            await self.cancel_streams()

    async def abort(self, rid: str) -> None:
        """Abort one stream: after a mere disconnection the server would run the request for seconds."""
        with contextlib.suppress(ServerRefused, ServerGone):  # a server that is gone has no streams
            await self.api.post("/abort_request", {"rid": rid}, timeout_s=self._idle_timeout_s)

    async def cancel_streams(self) -> None:
        """Stop taking requests and cancel the streams without a request to the server; adds them to `interrupted`."""
        self.open = False
        self.interrupted |= {rid: running for rid, running in self.running.items() if not running.task.done()}
        tasks = self._tasks()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    def _mark_connected(self, rid: str) -> None:
        if (running := self.running.get(rid)) is not None:
            running.connected = True

    def _tasks(self) -> list[asyncio.Task[Generated | Scored | None]]:
        return [running.task for running in self.running.values()]

    def _body(self, partial: Partial, rid: str) -> dict[str, Any]:
        """The body of a request. It sets every sampling parameter, because a server may have other defaults."""
        sampling = {
            "temperature": partial.request.temperature,
            "max_new_tokens": partial.remaining,
            "top_p": partial.request.top_p,
            "top_k": partial.request.top_k or -1,
            "min_p": 0.0,
            "stop_token_ids": sorted(self._ends),
            "sampling_seed": partial.request.seed % 2**31,  # a CPU server ignores it
        }
        ids = partial.input_ids()
        asked = {"return_logprob": True, "top_logprobs_num": partial.request.top_logprobs_num}
        if partial.request.report_kept:
            asked["return_sampling_mask"] = True
        return {"rid": rid, "input_ids": ids, "sampling_params": sampling, "stream": True} | asked

    def next_rid(self) -> str:
        """A new request id of fixed length: SGLang aborts every request whose rid starts with the given one."""
        self._sent += 1
        return f"sgpo-{self._sent:012d}"

    def _take_spans(
        self, partial: Partial, start: int, version: int, spans: list[Json], digests: Mapping[int, int]
    ) -> None:
        """Set the versions of the tokens since `start`.

        Raises ServerRefused, and drops these tokens, if the reported spans do not fit them.
        """
        count, known = len(partial.tokens) - start, partial.versioned - start
        loaded = {str(own) for own in digests}
        fits = [span["end"] for span in spans][-1:] == [count] and all(span["version"] in loaded for span in spans)
        if not fits or (known and (int(spans[0]["version"]) != version or spans[0]["end"] < known)):
            ours = f", the first {known} of version {version}" if known else ""
            partial.truncate(start)
            raise ServerRefused(f"{self.api.url}: weight versions {spans} do not fit {count} tokens{ours}")
        for span in spans:
            number = int(span["version"])
            partial.close_span(number, digests[number], start + span["end"])


def _likeliest(url: str, meta: Json, partial: Partial, new: int) -> list[list[Any]]:
    """SGLang's k likeliest tokens at each of the `new` newest positions. Raises ServerRefused if they are missing."""
    k = partial.request.top_logprobs_num
    if not k:
        return []
    positions = (meta.get("output_top_logprobs") or [])[-new:] if new else []
    if len(positions) != new or any(not pairs or len(pairs) != k for pairs in positions):
        raise ServerRefused(
            f"{url}/generate: asked for the {k} likeliest tokens at {new} positions, got {len(positions)} positions"
        )
    return positions


def _kept(url: str, meta: Json, new: int) -> tuple[list[list[int]], list[float]]:
    """The tokens that SGLang kept at the `new` newest positions, and the renormalised log-probabilities.

    Raises ServerRefused if they are missing: SGLang before 0.5.23 ignores the request for them.
    """
    masks, logprobs = (
        (meta.get(name) or [])[-new:] if new else []
        for name in ("output_token_sampling_mask", "output_token_sampling_logprobs")
    )
    if len(masks) != new or len(logprobs) != new:
        raise ServerRefused(
            f"{url}/generate: asked for the kept tokens at {new} positions, got {len(masks)}; rollout.top_p and "
            "rollout.top_k need sglang==0.5.23 in its environment"
        )
    return masks, logprobs


def _check_finish(url: str, finish: Json) -> None:
    """Raise ServerRefused for an abort with a status code. An abort without one is ours and a normal end."""
    if finish["type"] == "abort" and finish.get("status_code"):
        raise ServerRefused(f"{url}/generate: {finish.get('message')} (status {finish['status_code']})")

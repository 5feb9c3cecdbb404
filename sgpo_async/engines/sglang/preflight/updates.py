"""Whether weights arrive, and whether generation goes on across a pause."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sgpo_async.engines.sglang.preflight.findings import Subject
from sgpo_async.engines.sglang.processes.api import Json, ServerApi
from sgpo_async.engines.sglang.serving.update import PAUSE_MODES, Updated, update
from sgpo_async.errors import CheckDoubtful, CheckFailed

CHANGED = "model.norm.weight"
SKEW_S = 1.0
SETTLE_S = 5.0  # for requests that have ended to leave the counts of a server
STILL_S = 0.5  # how long a paused server is watched
PROMPT = (0, 1, 2, 3)
LONG = 512  # tokens of a generation that is to be running still when it is interrupted


async def round_trip(subject: Subject, told: Json) -> str:  # noqa: ARG001
    """The model's own weights, then with one element changed, then back: each verified by checksum and version.

    Raises what an update raises; CheckFailed if the server is in use, or if checksums do not see the change.
    """
    assert subject.reference is not None
    own = subject.engine.sglang
    await _require_idle(subject.server.api, timeout_s=own.phase_timeout_s)
    transport = next(way for way in subject.transports if way.name != "distributed")  # which needs the learner
    updates: list[Updated] = []
    expected = []
    began = time.monotonic()
    for version, changed in enumerate(("", CHANGED, "")):
        weights = await asyncio.to_thread(subject.reference.weights, version, changed=changed)
        prepared = await asyncio.to_thread(transport.prepare, weights)
        expected.append(prepared.expected)
        figures = await update(
            subject.server, prepared, transport, in_flight=own.in_flight, phase_s=own.phase_timeout_s
        )
        updates.append(figures)
    if expected[0] == expected[1]:
        raise CheckFailed(f"checksums do not see one element of {CHANGED} change", "report this")
    prepared_s = (time.monotonic() - began - sum(updated.pause_s for updated in updates)) / len(updates)
    last = updates[-1]
    found = (
        f"{transport.name}, thrice: prepare {prepared_s:.2f} s, send {last.send_s:.2f} s, verify {last.verify_s:.2f} s"
    )
    if transport.name != own.transport:
        raise CheckDoubtful(f"{found}; {own.transport} was not tried: it needs the learner", "see the actor's log")
    return found


async def pause(subject: Subject, told: Json) -> str:
    """A running generation meets the in-flight policy, and goes on."""
    own = subject.engine.sglang
    count = min(subject.model.longest, told.get("max_req_input_len") or 2**31, LONG) - 2 * len(PROMPT)
    first = _Stream(subject.server.api, [*PROMPT], count, timeout_s=own.phase_timeout_s)
    await first.some()
    if own.in_flight == "abort-resume":
        return await _abort_and_resume(subject, first, count)
    return await _pause_and_continue(subject, first, count)


async def clock(subject: Subject, told: Json) -> str:  # noqa: ARG001
    """How far the server's clock is from ours, as far as one request can tell."""
    if not subject.engine.sglang.urls:
        return "this machine's"
    body = {"input_ids": [*PROMPT], "sampling_params": {"max_new_tokens": 1}}
    before = time.time()
    answer = await subject.server.api.post("/generate", body, timeout_s=subject.engine.sglang.phase_timeout_s)
    after = time.time()
    told_at = answer["meta_info"].get("response_sent_to_client_ts")
    if told_at is None:
        raise CheckDoubtful("it does not tell its time", "compare the clocks of the machines yourself")
    skew = max(before - told_at, told_at - after, 0.0)
    if skew > SKEW_S:
        raise CheckDoubtful(f"{skew:.1f} s apart: times in logs do not fit together", "synchronise by NTP")
    return f"less than {skew + after - before:.2g} s apart"


async def _abort_and_resume(subject: Subject, first: _Stream, count: int) -> str:
    timeout_s = subject.engine.sglang.phase_timeout_s
    await subject.server.api.post("/abort_request", {"rid": first.rid}, timeout_s=timeout_s)
    await first.end()
    kept = len(first.tokens)
    if kept >= count:
        return f"abort-resume: a generation of {count} tokens was over before its abort"
    rest = _Stream(subject.server.api, [*PROMPT, *first.tokens], count - kept, timeout_s=timeout_s)
    await rest.end()
    if len(rest.tokens) != count - kept:
        raise CheckFailed(
            f"{kept} tokens before an abort, {len(rest.tokens)} after it, not {count - kept}", "report this"
        )
    return f"abort-resume: {kept} tokens kept, {len(rest.tokens)} more"


async def _pause_and_continue(subject: Subject, first: _Stream, count: int) -> str:
    own, api = subject.engine.sglang, subject.server.api
    await api.post("/pause_generation", {"mode": PAUSE_MODES[own.in_flight]}, timeout_s=own.phase_timeout_s)
    try:
        began = time.monotonic()
        await api.get("/model_info", timeout_s=own.phase_timeout_s)
        answered_s = time.monotonic() - began
        await asyncio.sleep(STILL_S)  # for what was on its way
        kept = len(first.tokens)
        await asyncio.sleep(STILL_S)
        if len(first.tokens) != kept:
            raise CheckFailed(f"{len(first.tokens) - kept} tokens came while it was paused", _OTHER_POLICY)
    finally:
        await api.post("/continue_generation", {}, timeout_s=own.phase_timeout_s)
    await first.end()
    if len(first.tokens) != count:
        raise CheckFailed(f"{len(first.tokens)} of {count} tokens came after a pause", _OTHER_POLICY)
    return f"{own.in_flight}: {kept} tokens, paused (answered in {answered_s:.2f} s), {count - kept} more"


_OTHER_POLICY = "use engine.sglang.in_flight=abort-resume"


class _Stream:
    """One streamed generation of `count` tokens."""

    def __init__(self, api: ServerApi, ids: list[int], count: int, *, timeout_s: float) -> None:
        self.rid = f"sgpo-doctor-{id(self)}"
        self.tokens: list[int] = []
        self._timeout_s = timeout_s
        sampling = {"temperature": 1.0, "max_new_tokens": count, "ignore_eos": True}
        body: dict[str, Any] = {"rid": self.rid, "input_ids": ids, "sampling_params": sampling, "stream": True}
        self._task = asyncio.create_task(self._read(api, body))

    async def some(self) -> None:
        """Wait for the first tokens. Raises what ends the stream; CheckFailed if none come."""
        deadline = time.monotonic() + self._timeout_s
        while not self.tokens and not self._task.done():
            if time.monotonic() > deadline:
                self._task.cancel()
                raise CheckFailed(f"a generation brought no token within {self._timeout_s:g} s", "look at its log")
            await asyncio.sleep(0.001)

    async def end(self) -> None:
        """Wait for the end of the stream. Raises ServerGone, ServerRefused."""
        await self._task

    async def _read(self, api: ServerApi, body: dict[str, Any]) -> None:
        async for message in api.stream(body, silence_s=self._timeout_s):
            self.tokens += message["output_ids"]


async def _require_idle(api: ServerApi, *, timeout_s: float) -> None:
    """Nobody else's generations may meet the weights of a check.

    A server on a busy machine still counts requests of our own for a moment after their last token.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        loads = (await api.get("/v1/loads", timeout_s=timeout_s))["loads"]
        busy = sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
        if not busy:
            return
        if time.monotonic() > deadline:
            raise CheckFailed(
                f"{busy} requests of somebody else run on it", "end the actor that uses it, and try again"
            )
        await asyncio.sleep(0.1)

"""Checks that weight updates arrive, that generation continues after a pause, and the server's clock."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sgpo_async.engines.sglang.preflight.findings import Subject
from sgpo_async.engines.sglang.processes.api import Json, ServerApi
from sgpo_async.engines.sglang.serving.update import PAUSE_MODES, UpdateTimings, update
from sgpo_async.engines.sglang.serving.versions import Offer
from sgpo_async.errors import CheckFailed, CheckWarning

CHANGED = "model.norm.weight"
SKEW_S = 1.0
SETTLE_S = 5.0  # a server may count requests for this long after they have ended
STILL_S = 0.5  # how long a paused server is observed
PROMPT = (0, 1, 2, 3)
LONG = 512  # tokens of a completion; enough that it is still running when it is interrupted


async def round_trip(subject: Subject, server_info: Json) -> str:  # noqa: ARG001
    """Load the model's own weights, then weights with one element changed, then its own again; verify each update.

    Raises the errors of an update; CheckFailed if the server is in use, or if the checksums miss the change.
    """
    assert subject.reference is not None
    own = subject.engine.sglang
    await _require_idle(subject.server.api, timeout_s=own.phase_timeout_s)
    # A broadcast needs the learner, which does not run here.
    transport = next(transport for transport in subject.transports if transport.name != "distributed")
    updates: list[UpdateTimings] = []
    expected = []
    began = time.monotonic()
    for version, changed in enumerate(("", CHANGED, "")):
        weights = await asyncio.to_thread(subject.reference.weights, version, changed=changed)
        prepared = await asyncio.to_thread(transport.prepare, weights)
        expected.append(prepared.expected)
        offer = Offer(weights, transport, prepared)
        timings = await update(subject.server, offer, in_flight=own.in_flight, phase_s=own.phase_timeout_s)
        updates.append(timings)
        await asyncio.to_thread(transport.release, prepared)
    if expected[0] == expected[1]:
        raise CheckFailed(f"the checksums do not change with one element of {CHANGED}", "report this bug")
    prepared_s = (time.monotonic() - began - sum(one.shut_s + one.load_s + one.verify_s for one in updates)) / len(
        updates
    )
    last = updates[-1]
    found = (
        f"3 updates by {transport.name}: prepare {prepared_s:.2f} s, load {last.load_s:.2f} s, "
        f"verify {last.verify_s:.2f} s"
    )
    if transport.name != own.used_transport:
        raise CheckWarning(
            f"{found}; {own.used_transport} was not tested, because it needs the learner",
            "see the actor's log in a run",
        )
    return found


async def pause(subject: Subject, server_info: Json) -> str:
    """Interrupt a running completion by the in-flight policy, and check that it continues."""
    own = subject.engine.sglang
    count = min(subject.model.longest, server_info.get("max_req_input_len") or 2**31, LONG) - 2 * len(PROMPT)
    first = _Stream(subject.server.api, [*PROMPT], count, timeout_s=own.phase_timeout_s)
    await first.some()
    if own.in_flight == "abort-resume":
        return await _abort_and_resume(subject, first, count)
    return await _pause_and_continue(subject, first, count)


async def clock(subject: Subject, server_info: Json) -> str:  # noqa: ARG001
    """Check that the server's clock agrees with this machine's, as precisely as one request allows."""
    if not subject.engine.sglang.urls:
        return "the clock of this machine"
    body = {"input_ids": [*PROMPT], "sampling_params": {"max_new_tokens": 1}}
    before = time.time()
    answer = await subject.server.api.post("/generate", body, timeout_s=subject.engine.sglang.phase_timeout_s)
    after = time.time()
    server_time = answer["meta_info"].get("response_sent_to_client_ts")
    if server_time is None:
        raise CheckWarning("its answers have no time", "compare the clocks of the machines yourself")
    skew = max(before - server_time, server_time - after, 0.0)
    if skew > SKEW_S:
        raise CheckWarning(
            f"the clocks differ by {skew:.1f} s: times in logs are not comparable", "synchronise them by NTP"
        )
    return f"the clocks differ by less than {skew + after - before:.2g} s"


async def _abort_and_resume(subject: Subject, first: _Stream, count: int) -> str:
    timeout_s = subject.engine.sglang.phase_timeout_s
    await subject.server.api.post("/abort_request", {"rid": first.rid}, timeout_s=timeout_s)
    await first.end()
    kept = len(first.tokens)
    if kept >= count:
        return f"abort-resume: a completion of {count} tokens was finished before its abort"
    rest = _Stream(subject.server.api, [*PROMPT, *first.tokens], count - kept, timeout_s=timeout_s)
    await rest.end()
    if len(rest.tokens) != count - kept:
        raise CheckFailed(
            f"a completion had {kept} tokens before an abort and {len(rest.tokens)} after it, expected {count - kept}",
            "report this bug",
        )
    return f"abort-resume: {kept} tokens kept, {len(rest.tokens)} more"


async def _pause_and_continue(subject: Subject, first: _Stream, count: int) -> str:
    own, api = subject.engine.sglang, subject.server.api
    await api.post("/pause_generation", {"mode": PAUSE_MODES[own.in_flight]}, timeout_s=own.phase_timeout_s)
    try:
        began = time.monotonic()
        await api.get("/model_info", timeout_s=own.phase_timeout_s)
        answered_s = time.monotonic() - began
        await asyncio.sleep(STILL_S)  # tokens that were sent before the pause may still arrive
        kept = len(first.tokens)
        await asyncio.sleep(STILL_S)
        if len(first.tokens) != kept:
            raise CheckFailed(f"{len(first.tokens) - kept} tokens arrived while it was paused", _OTHER_POLICY)
    finally:
        await api.post("/continue_generation", {}, timeout_s=own.phase_timeout_s)
    await first.end()
    if len(first.tokens) != count:
        raise CheckFailed(f"only {len(first.tokens)} of {count} tokens arrived after a pause", _OTHER_POLICY)
    return f"{own.in_flight}: {kept} tokens, paused (answered in {answered_s:.2f} s), {count - kept} more"


_OTHER_POLICY = "use engine.sglang.in_flight=abort-resume"


class _Stream:
    """One streamed completion of `count` tokens."""

    def __init__(self, api: ServerApi, ids: list[int], count: int, *, timeout_s: float) -> None:
        self.rid = f"sgpo-doctor-{id(self)}"
        self.tokens: list[int] = []
        self._timeout_s = timeout_s
        sampling = {"temperature": 1.0, "max_new_tokens": count, "ignore_eos": True}
        body: dict[str, Any] = {"rid": self.rid, "input_ids": ids, "sampling_params": sampling, "stream": True}
        self._task = asyncio.create_task(self._read(api, body))

    async def some(self) -> None:
        """Wait for the first tokens. Raises CheckFailed if none arrive in time."""
        deadline = time.monotonic() + self._timeout_s
        while not self.tokens and not self._task.done():
            if time.monotonic() > deadline:
                self._task.cancel()
                raise CheckFailed(f"a completion got no token within {self._timeout_s:g} s", "see its log")
            await asyncio.sleep(0.001)

    async def end(self) -> None:
        """Wait for the end of the stream. Raises ServerGone, ServerRefused."""
        await self._task

    async def _read(self, api: ServerApi, body: dict[str, Any]) -> None:
        async for message in api.stream(body, idle_timeout_s=self._timeout_s):
            self.tokens += message["output_ids"]


async def _require_idle(api: ServerApi, *, timeout_s: float) -> None:
    """Raise CheckFailed if the server runs requests of other clients, which would get the weights of the check.

    A server on a busy machine counts our own requests for a moment after their last token; they are waited for. The
    server has to be idle twice in succession: another client may be between two requests.
    """
    deadline, idle = time.monotonic() + SETTLE_S, 0
    while True:
        loads = (await api.get("/v1/loads", timeout_s=timeout_s))["loads"]
        busy = sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)
        idle = 0 if busy else idle + 1
        if idle == 2:
            return
        if busy and time.monotonic() > deadline:
            raise CheckFailed(
                f"{busy} requests of another client run on it", "stop the actor that uses it, and try again"
            )
        await asyncio.sleep(0.1)

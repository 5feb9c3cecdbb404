"""Generations that begin with sampled tokens on played SGLang servers, and what unfinished ones have sampled so far.

The servers run the real streams; only HTTP is played.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from fake_sglang import (
    PHASE_S,
    SLOTS,
    FakeTransport,
    StreamingApi,
    kept_at,
    logprob_at,
    offer_of,
    token_at,
    verify_nothing,
)

from sgpo_async.engines.base import Generate, Generated, SampledTokens, Score
from sgpo_async.engines.sglang.processes.api import ServerGone, ServerRefused
from sgpo_async.engines.sglang.serving import update as update_module
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.engines.sglang.serving.requests import MAX_REFUSALS, Requests
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.serving.update import InFlight, update
from sgpo_async.errors import EngineError

TOKENS = 9
PROMPT = np.arange(3, dtype=np.int32)


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_module, "verify", verify_nothing)


def ask(id: Any, *, k: int = 0, kept: bool = False, prefix: SampledTokens | None = None) -> Generate:
    return Generate(
        id=id, prompt=PROMPT, max_new_tokens=TOKENS, temperature=1.0, seed=5, top_logprobs_num=k, prefix=prefix,
        top_p=0.9 if kept else 1.0, top_k=8 if kept else 0, report_kept=kept,
    )  # fmt: skip


def sampled(*versions: int, k: int = 0, kept: bool = False) -> SampledTokens:
    """The first tokens of a completion, each of the version that is given for it."""
    positions = range(PROMPT.size, PROMPT.size + len(versions))
    ends = [i for i in range(1, len(versions) + 1) if versions[i - 1] != (*versions[i:], None)[0]]
    pairs = list(zip(positions, versions, strict=True))
    others = [[token for token in kept_at(at) if token != token_at(at)] for at in positions]
    return SampledTokens(
        tokens=np.array([token_at(at) for at in positions], np.int32),
        logprobs=np.array([logprob_at(*pair) / (2 if kept else 1) for pair in pairs], np.float32),
        versions=np.array([versions[end - 1] for end in ends], np.int32),
        digests=np.zeros(len(ends), np.int64),
        ends=np.array(ends, np.int32),
        top_tokens=np.array([token_at(at) + j for at in positions for j in range(k)], np.int32) if k else None,
        top_logprobs=np.array([logprob_at(*pair) - j for pair in pairs for j in range(k)], np.float32) if k else None,
        kept=np.array([token for own in others for token in own], np.int32) if kept else None,
        kept_sizes=np.array([len(own) for own in others], np.int32) if kept else None,
    )


def assert_same(got: SampledTokens, expected: SampledTokens) -> None:
    for name, array in vars(expected).items():
        found = getattr(got, name)
        assert (found is None) == (array is None), name
        assert array is None or (found.dtype == array.dtype and found.tolist() == array.tolist()), (name, found, array)


def server_of(api: StreamingApi, *, ends: tuple[int, ...] = ()) -> Server:
    server = Server(cast(Any, api), slots=SLOTS, ends=ends, idle_timeout_s=1.0)
    server.version, server.open = api.version, True
    server.digests = dict.fromkeys(range(10), 0)
    return server


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(120):
        while not holds():
            await asyncio.sleep(0)


async def result_of(requests: Requests) -> Generated:
    await until(lambda: not requests.results.empty() or requests.failed.done())
    if requests.failed.done():
        requests.failed.result()  # raises
    result = requests.results.get()
    assert isinstance(result, Generated)
    return result


async def update_weights(server: Server, version: int, *, in_flight: InFlight) -> None:
    api = cast(StreamingApi, server.api)
    transport = FakeTransport(lambda: setattr(api, "version", version))
    await update(server, offer_of(version, transport), in_flight=in_flight, phase_s=PHASE_S)


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_a_completion_cut_at_any_position_continues_as_if_it_had_not_been_cut(
    interval: int, k: int, kept: bool
) -> None:
    """The server gets prompt and prefix, what remains of the length, and the same seed: its positions go on."""

    async def scenario() -> None:
        for count in range(1, TOKENS):
            api = StreamingApi(interval=interval)
            server = server_of(api)
            requests = Requests(lambda server=server: [server], ends=())  # type: ignore[misc]
            prefix = sampled(*[0] * count, k=k, kept=kept)
            requests.submit(ask(count, k=k, kept=kept, prefix=prefix))
            result = await result_of(requests)
            assert_same(result, sampled(*[0] * TOKENS, k=k, kept=kept))
            assert (result.id, result.finish) == (count, "length")
            (body,) = api.bodies
            assert body["input_ids"] == [*PROMPT.tolist(), *prefix.tokens.tolist()]
            assert body["sampling_params"]["max_new_tokens"] == TOKENS - count
            assert body["sampling_params"]["sampling_seed"] == 5
            assert body["sampling_params"]["top_k"] == (8 if kept else -1)
            assert body.get("return_sampling_mask", False) == kept
            assert requests.tokens == TOKENS - count

    asyncio.run(scenario())


def test_kept_tokens_of_a_completion_across_an_update() -> None:
    async def scenario() -> None:
        api = StreamingApi()
        api.holds = lambda tokens: api.version == 0 and len(tokens) == 3
        server = server_of(api)
        requests = Requests(lambda: [server], ends=())
        requests.submit(ask(0, kept=True))
        await until(lambda: requests.progress([0]) and requests.progress([0])[0].tokens.size == 3)
        await update_weights(server, 1, in_flight="abort-resume")
        requests.dispatch()
        assert_same(await result_of(requests), sampled(0, 0, 0, 1, 1, 1, 1, 1, 1, kept=True))

    asyncio.run(scenario())


def test_a_server_that_does_not_report_kept_tokens_is_refused_with_the_reason() -> None:
    async def scenario() -> None:
        api = StreamingApi()
        api.reports_kept = False
        server, partial = server_of(api), Partial(ask(0, kept=True))
        with pytest.raises(ServerRefused, match=r"asked for the kept tokens at 1 positions, got 0; rollout\.top_p and"):
            await server.extend(partial, "rid", 0)
        assert not partial.tokens

    asyncio.run(scenario())


def test_a_continuation_ends_with_an_end_token() -> None:
    async def scenario() -> None:
        end = token_at(PROMPT.size + 5)
        server = server_of(StreamingApi(), ends=(end,))
        requests = Requests(lambda: [server], ends=(end,))
        requests.submit(ask(0, prefix=sampled(0, 0)))
        result = await result_of(requests)
        assert_same(result, sampled(*[0] * 6))
        assert result.finish == "stop"

    asyncio.run(scenario())


def test_spans_of_a_prefix_and_of_what_follows_are_joined_also_across_an_update() -> None:
    async def scenario() -> None:
        api = StreamingApi()
        api.holds = lambda tokens: api.version == 0 and len(tokens) == 3
        server = server_of(api)
        requests = Requests(lambda: [server], ends=())
        requests.submit(ask(0, prefix=sampled(7, 7, 0)))
        await until(lambda: requests.progress([0])[0].tokens.size == 6)
        assert_same(requests.progress([0])[0], sampled(7, 7, 0, 0, 0, 0))
        await update_weights(server, 1, in_flight="abort-resume")
        assert_same(requests.progress([0])[0], sampled(7, 7, 0, 0, 0, 0))  # it waits
        requests.dispatch()
        assert_same(await result_of(requests), sampled(7, 7, 0, 0, 0, 0, 1, 1, 1))

    asyncio.run(scenario())


def test_the_progress_of_a_request_in_every_state() -> None:
    async def scenario() -> None:
        api = StreamingApi(interval=2)
        api.holds = lambda tokens: len(tokens) == 5
        server = server_of(api)
        server.open = False
        requests = Requests(lambda: [server], ends=())
        ids = ["unknown", 0, 1, "score", *range(2, 7)]

        def sizes() -> dict[Any, int]:
            return {id: progress.tokens.size for id, progress in requests.progress(iter(ids)).items()}

        requests.submit(ask(0))
        requests.submit(ask(1, prefix=sampled(0, k=0)))
        requests.submit(Score(id="score", prompt=PROMPT, tokens=PROMPT, temperature=1.0))
        assert sizes() == {1: 1}
        requests.cancel(["score"])
        for id in range(2, 7):
            requests.submit(ask(id, prefix=sampled(0, 0)))
        server.open = True
        requests.dispatch()
        assert len(server.running) == SLOTS and requests.waiting == 3
        full = {0: 4, 1: 5, 2: 6, 3: 6, 4: 2, 5: 2, 6: 2}  # SGLang keeps an odd token until the next message
        await until(lambda: sizes() == full)
        requests.cancel([3, 6])
        del full[3], full[6]
        assert sizes() == full
        await until(lambda: sizes() == full | {4: 6})
        api.answer = _gone
        await until(lambda: not server.running)
        assert server.fault is not None and requests.waiting == 5
        assert sizes() == full | {4: 6}  # without a server
        for id in (0, 4):
            assert_same(requests.progress([id])[id], sampled(*[0] * sizes()[id]))
        requests.cancel_all()  # as a reset does
        assert sizes() == {}

    asyncio.run(scenario())


def _gone(path: str) -> None:
    raise ServerGone("simulated death")


def test_progress_gives_copies_of_unfinished_completions() -> None:
    """A complete one is left out, though its stream has not ended: nothing is left to sample."""

    async def scenario() -> None:
        seen: list[SampledTokens] = []
        api = StreamingApi()
        api.breaks = lambda: seen.append(requests.progress([0]).get(0, sampled()))
        server = server_of(api)
        requests = Requests(lambda: [server], ends=())
        requests.submit(ask(0, k=1))
        while requests.results.empty():
            await asyncio.sleep(0)
            for progress in requests.progress([0]).values():
                seen.append(replace(progress, tokens=progress.tokens.copy()))
                progress.tokens[:] = 0
        assert_same(await result_of(requests), sampled(*[0] * TOKENS, k=1))
        assert {progress.tokens.size for progress in seen} == set(range(TOKENS))
        for progress in seen[:-1]:
            assert_same(progress, sampled(*[0] * progress.tokens.size, k=1 if progress.tokens.size else 0))
        assert requests.progress([0]) == {}

    asyncio.run(scenario())


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("in_flight", ["retract", "in-place"])
def test_a_stream_that_two_updates_pause_names_the_version_of_every_token(in_flight: InFlight, dies: bool) -> None:
    """A paused server has tokens that it has not sent, so only its last message says where a version ends.

    Until then, what arrived after the first update has no version; if the server dies, it is lost.
    """

    async def scenario() -> None:
        api = StreamingApi(interval=3)
        stops = {0: 2, 1: 5, 2: 7}  # tokens after which each version waits
        api.holds = lambda tokens: len(tokens) == stops[api.version] if api.version < 2 or dies else False
        server = server_of(api)
        requests = Requests(lambda: [server], ends=())
        requests.submit(ask(0, prefix=sampled(7)))
        for version in range(3):
            for _ in range(50):
                await asyncio.sleep(0)
            if version == 2 and not dies:
                break
            assert_same(requests.progress([0])[0], sampled(7))
            if version < 2:
                await update_weights(server, version + 1, in_flight=in_flight)
        if not dies:
            assert_same(await result_of(requests), sampled(7, 0, 0, 1, 1, 1, 2, 2, 2))
            return
        api.answer = _gone
        await until(lambda: requests.waiting == 1)
        assert_same(requests.progress([0])[0], sampled(7))
        assert [len(cast(Any, item).tokens) for item in requests._waiting] == [1]

    asyncio.run(scenario())


def test_a_server_that_dies_after_its_last_message_has_finished_the_completion() -> None:
    async def scenario() -> None:
        api = StreamingApi()
        api.breaks = lambda: _gone("")
        servers = [server_of(api)]
        requests = Requests(lambda: servers, ends=())
        requests.submit(ask(0))
        await until(lambda: servers[0].fault is not None and not servers[0].running)
        assert requests.waiting == 1 and requests.progress([0]) == {}
        servers[0] = server_of(StreamingApi())
        requests.dispatch()
        assert_same(await result_of(requests), sampled(*[0] * TOKENS))
        assert not servers[0].api.bodies  # type: ignore[attr-defined]
        assert not requests.failed.done()

    asyncio.run(scenario())


def test_a_server_that_names_other_versions_than_it_was_given_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgpo_async.engines.sglang.serving.requests.REFUSAL_PAUSE_S", 0.0)

    async def scenario() -> None:
        api = StreamingApi(interval=2)
        server = server_of(api)
        api.version = 4  # by somebody else
        requests = Requests(lambda: [server], ends=())
        requests.submit(ask(0, prefix=sampled(7)))
        await until(lambda: not requests.results.empty())
        error = requests.results.get()
        assert isinstance(error, EngineError)
        assert f"request 0: servers refused it {MAX_REFUSALS} times" in str(error)
        assert "{'version': '4', 'end': 8}] do not fit 8 tokens, the first 8 of version 0" in str(error)
        assert_same(requests.progress([0])[0], sampled(7))

    asyncio.run(scenario())


@pytest.mark.parametrize("count", range(7))
def test_a_truncated_completion_grows_from_what_remains(count: int) -> None:
    versions = (7, 7, 0, 0, 1, 1)
    partial = Partial(ask(0, k=2, prefix=sampled(*versions, k=2)))
    partial.extend([[-1.0, 3, None]], [[[-1.0, 3, None], [-2.0, 4, None]]])  # without a version
    partial.truncate(count)
    assert_same(partial.sampled(), sampled(*versions[:count], k=2))
    at = PROMPT.size + count
    pairs = [[logprob_at(at, 5) - j, token_at(at) + j, None] for j in range(2)]
    partial.extend(pairs[:1], [pairs])
    partial.close_span(5, 0, count + 1)
    assert_same(partial.sampled(), sampled(*versions[:count], 5, k=2))


def test_a_server_that_names_another_version_for_tokens_that_had_arrived_before_an_update_is_refused() -> None:
    partial = Partial(ask(0, prefix=sampled(7, 0, 0, 0)))  # three tokens of this attempt have arrived
    spans = [{"version": "0", "end": 2}, {"version": "1", "end": 3}]
    with pytest.raises(EngineError, match="do not fit 3 tokens, the first 3 of version 0"):
        server_of(StreamingApi())._take_spans(partial, 1, 0, spans, {0: 0, 1: 0})
    assert_same(partial.sampled(), sampled(7))

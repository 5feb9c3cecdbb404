"""Weight updates while sequences run: every token was sampled by the weights that its span names."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sglang_support import (
    Servers,
    assert_kept,
    assert_teacher_forced,
    completion,
    loaded,
    logprobs,
    score_request,
    version_of,
)

from sgpo_async.engines import Weights
from sgpo_async.engines.sglang.processes.api import ServerApi, ServerRefused
from sgpo_async.engines.sglang.weight_sync.transports import DiskTransport
from sgpo_async.errors import EngineError, Superseded
from sgpo_async.weights import digest

pytestmark = [pytest.mark.sglang, pytest.mark.process]
TOKENS = 400


def interrupted(servers: Servers, new: Path, *, count: int = 32, tokens: int = TOKENS) -> tuple[list, dict]:
    """Run `count` completions and update to version 1 in the middle; returns requests and results."""
    weights = version_of(new, 1)  # prepared before the requests, so that the update starts early in the sequences
    requests = [
        replace(completion(i, length=4 + i % 5, tokens=tokens, seed=i), top_logprobs_num=i % 4) for i in range(count)
    ]
    for request in requests:
        servers.engine.submit(request)
    servers.until(lambda: _streamed(servers) > 4 * count, "some tokens")
    servers.engine.load(weights)
    results = servers.results(count)
    servers.until(lambda: servers.versions() == {1}, "version 1")
    return requests, results


def _streamed(servers: Servers) -> int:
    """The number of tokens that running completions have now."""
    running = [
        r
        for server_slot in servers.engine.server_slots
        if server_slot.server
        for r in list(server_slot.server.running.values())
    ]
    return sum(len(r.item.tokens) for r in running)


def assert_both_versions(results: dict, count: int) -> None:
    """At least half of the completions have tokens of both versions."""
    both = [result for result in results.values() if result.versions.tolist() == [0, 1]]
    assert len(both) >= count // 2, [result.versions.tolist() for result in results.values()]


@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_running_completions_continue_under_the_new_weights(
    models: dict[str, Path], tmp_path: Path, transport: str
) -> None:
    own = {"folder": str(tmp_path / "w")} if transport == "disk" else {}
    with Servers(models["qwen3"], tmp_path, servers=1, slots=32, transport=transport, **own) as servers:
        _abort_resume(servers, models)
        assert {update.transport for update in servers.engine.updates} == {transport}
        if own:
            (folder,) = (tmp_path / "w").iterdir()
            servers.until(lambda: [one.name[:7] for one in folder.iterdir()] == ["v000001"], "older versions removed")
    assert not own or list((tmp_path / "w").iterdir()) == []


def _abort_resume(servers: Servers, models: dict[str, Path]) -> None:
    servers.load(models["qwen3"], 0)
    requests, results = interrupted(servers, models["qwen3-other"])
    assert_both_versions(results, 32)
    both = {0: loaded(models["qwen3"]), 1: loaded(models["qwen3-other"])}
    assert_teacher_forced(both, requests, results)
    assert all(result.tokens.size == TOKENS for result in results.values())


def test_retract_keeps_sequences_and_recomputes_their_keys(models: dict[str, Path], tmp_path: Path) -> None:
    """The server itself keeps the sequences and recomputes keys and values under the new weights."""
    with Servers(models["qwen3"], tmp_path, slots=32, in_flight="retract") as servers:
        _abort_resume(servers, models)
        assert not servers.events()


@pytest.mark.parametrize("in_flight", ["retract", "abort-resume"])
def test_two_updates_of_sequences(models: dict[str, Path], tmp_path: Path, in_flight: str) -> None:
    """At an update the server has tokens that it has not sent; its last message names the version of each token.

    Half of the completions are truncated and report what was kept.
    """
    folders = [models["qwen3"], models["qwen3-other"], models["qwen3"]]
    with Servers(models["qwen3"], tmp_path, slots=32, in_flight=in_flight, stream_interval=7) as servers:
        servers.load(folders[0], 0)
        updates = [version_of(folder, version) for version, folder in enumerate(folders)]
        requests = [completion(i, length=4 + i % 5, tokens=TOKENS, seed=i) for i in range(32)]
        requests[::2] = [replace(request, top_p=0.7, top_k=48, report_kept=True) for request in requests[::2]]
        for request in requests:
            servers.engine.submit(request)
        for version in (1, 2):
            before = _streamed(servers)
            servers.until(lambda before=before: _streamed(servers) > before + 4 * 32, "more tokens")  # type: ignore[misc]
            servers.engine.load(updates[version])
            servers.until(lambda version=version: servers.versions() == {version}, f"version {version}")  # type: ignore[misc]
        results = servers.results(32)
        models_of = {v: loaded(folder) for v, folder in enumerate(folders)}
        assert_teacher_forced(models_of, requests[1::2], results)
        for request in requests[::2]:
            assert_kept(models_of, request, results[request.id])
        assert sum(result.versions.tolist() == [0, 1, 2] for result in results.values()) >= 16
        assert not servers.events()


def test_in_place_keeps_sequences_with_their_old_keys(models: dict[str, Path], tmp_path: Path) -> None:
    """Tokens before the update are of the old weights, new requests of the new ones; running ones keep old keys."""
    with Servers(models["qwen3"], tmp_path, slots=32, in_flight="in-place", radix_cache=False) as servers:
        servers.load(models["qwen3"], 0)
        requests, results = interrupted(servers, models["qwen3-other"])
        assert_both_versions(results, 32)
        old, new = loaded(models["qwen3"]), loaded(models["qwen3-other"])
        after = 0.0
        for request in requests:
            result = results[request.id]
            cut = int(result.ends[0])
            np.testing.assert_allclose(
                result.logprobs[:cut], logprobs(old, request.prompt, result.tokens)[:cut], atol=1e-4
            )
            after = max(after, *np.abs(result.logprobs - logprobs(new, request.prompt, result.tokens))[cut:], 0.0)
        assert after > 1e-2  # the old keys change the log-probabilities: this is what in-place means
        # The old weights have processed these prompts.
        fresh = [completion(("new", i), length=4 + i % 5, seed=i) for i in range(8)]
        for request in fresh:
            servers.engine.submit(request)
        assert_teacher_forced({1: new}, fresh, servers.results(8))


def test_keys_of_old_weights_are_not_used_for_later_prompts(pair: Servers, models: dict[str, Path]) -> None:
    """Without a flush, SGLang's prefix cache would match prompts that old weights processed."""
    pair.load(models["qwen3"], 0)
    prompts = [completion(i, length=40, tokens=4, seed=i) for i in range(4)]
    for version, folder in enumerate(["qwen3", "qwen3-other", "qwen3"], 1):
        pair.load(models[folder], version)
        for request in prompts:
            pair.engine.submit(request)
        assert_teacher_forced({version: loaded(models[folder])}, prompts, pair.results(4))


def test_scores_come_from_one_version(pair: Servers, models: dict[str, Path]) -> None:
    pair.load(models["qwen3"], 0)
    both = {0: loaded(models["qwen3"]), 1: loaded(models["qwen3-other"])}
    scores = [score_request(i, completion(0, length=20, seed=i).prompt, length=60) for i in range(200)]
    for score in scores[:100]:
        pair.engine.submit(score)
    pair.engine.load(version_of(models["qwen3-other"], 1))
    for score in scores[100:]:
        pair.engine.submit(score)
    results = pair.results(200)
    for score in scores:
        result = results[score.id]
        np.testing.assert_allclose(
            result.logprobs, logprobs(both[result.version], score.prompt, score.tokens), atol=1e-4
        )
    assert {result.version for result in results.values()} <= {0, 1}


def damaged(folder: Path, version: int, damage: object) -> Weights:
    tensors = dict(version_of(folder, version).read())
    damage(tensors)  # type: ignore[operator]
    return Weights(version=version, digest=digest(tensors.items()), read=tensors.copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.update({"model.more.weight": torch.zeros(2)}), "1 unknown .model.more.weight"),
        (lambda t: t.pop("model.norm.weight"), "1 parameters missing .model.norm.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(33)}),
            r"model.norm.weight: shape must be \(32,\), the engine's, got \(33,\)",
        ),
    ],
    ids=["unknown name", "missing name", "wrong shape"],
)
def test_weights_that_do_not_fit_are_not_sent(
    pair: Servers, models: dict[str, Path], damage: object, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair.load(models["qwen3"], 0)
    updates, before = len(pair.engine.updates), len(pair.events())
    pair.engine.load(damaged(models["qwen3-other"], 1, damage))
    pair.until(lambda: len(pair.events()) > before, "event")
    import re

    assert any(re.search(message, line) for line in pair.events()[before:]), pair.events()[before:]
    time.sleep(0.2)
    assert len(pair.engine.updates) == updates and pair.versions() == {0}
    pair.engine.submit(completion(0))
    assert_teacher_forced({0: loaded(models["qwen3"])}, [completion(0)], pair.results(1))
    pair.load(models["qwen3-other"], 2)  # the next valid version is loaded


def test_an_overwritten_version_is_skipped(pair: Servers, models: dict[str, Path]) -> None:
    def overwritten() -> dict:
        raise Superseded("overwritten")

    pair.load(models["qwen3"], 0)
    pair.engine.load(Weights(version=1, digest="", read=overwritten))
    time.sleep(0.2)
    assert pair.versions() == {0}
    pair.load(models["qwen3-other"], 2)


def test_a_version_damaged_in_transit_is_taken_back_and_sent_again(pair: Servers, models: dict[str, Path]) -> None:
    """A tensor changes after it was hashed: no token of it is released, and another transport sends the version."""
    pair.load(models["qwen3"], 0)
    transport = pair.engine._transports[0]
    assert isinstance(transport, DiskTransport)
    write = transport.write

    def damaging(version: int, tensors: Mapping[str, torch.Tensor]) -> str:
        tensors = dict(tensors)
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
        return write(version, tensors)

    before = len(pair.events())
    transport.write = damaging  # type: ignore[method-assign]
    try:
        requests, results = interrupted(pair, models["qwen3-other"])
    finally:
        transport.write = write  # type: ignore[method-assign]
    both = {0: loaded(models["qwen3"]), 1: loaded(models["qwen3-other"])}
    assert_teacher_forced(both, requests, results)
    events = pair.events()[before:]
    assert len([line for line in events if "model.norm.weight" in line and "version 0 is in service" in line]) == 2
    assert [update.transport for update in pair.engine.updates[-2:]] == ["tensor", "tensor"]


@pytest.mark.parametrize("path", ["/update_weights_from_disk", "/weights_checker"])
def test_after_a_failed_update_a_server_generates_with_the_previous_version(
    pair: Servers, models: dict[str, Path], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every load of version 1, or every verification of it, fails after SGLang has loaded it: nothing is restarted."""
    pair.load(models["qwen3"], 0)
    processes = [server_slot.process for server_slot in pair.engine.server_slots]
    call, failed = ServerApi._call, set()

    async def failing(api: ServerApi, method: str, where: str, body: Any, timeout_s: float, *rest: Any) -> Any:
        answer = await call(api, method, where, body, timeout_s, *rest)
        slot = next(slot for slot in pair.engine.server_slots if slot.url == api.url)
        if where == path and slot.loading is not None and slot.loading.prepared.version == 1 and api.url not in failed:
            failed.add(api.url)
            raise ServerRefused(f"{api.url}{where}: simulated")
        return answer

    monkeypatch.setattr(ServerApi, "_call", failing)
    pair.engine._transports[1].prepare, prepare = refusing, pair.engine._transports[1].prepare  # type: ignore[method-assign]
    try:
        requests, before = [completion(i, tokens=TOKENS, seed=i) for i in range(32)], len(pair.events())
        for request in requests:
            pair.engine.submit(request)
        pair.until(lambda: _streamed(pair) > 4 * 32, "some tokens")
        pair.engine.load(version_of(models["qwen3-other"], 1))
        results = pair.results(32)
        pair.until(lambda: len(failed) == 2, "a failure of both servers")
        pair.until(lambda: pair.versions() == {0}, "version 0 in service")
        assert_teacher_forced({0: loaded(models["qwen3"]), 1: loaded(models["qwen3-other"])}, requests, results)
        said = [line for line in pair.events()[before:] if "simulated; version 0 is in service" in line]
        assert len(said) == 2, pair.events()[before:]
        pair.engine.submit(completion("after"))
        assert_teacher_forced({0: loaded(models["qwen3"])}, [completion("after")], pair.results(1))
        pair.load(models["qwen3-other"], 2)
        assert [server_slot.process for server_slot in pair.engine.server_slots] == processes
    finally:
        pair.engine._transports[1].prepare = prepare  # type: ignore[method-assign]


def refusing(weights: Weights) -> Any:
    raise EngineError("this transport takes no part in the test")


def test_a_new_session_drops_requests_and_versions(pair: Servers, models: dict[str, Path]) -> None:
    """Version 0 of another run has other weights."""
    pair.load(models["qwen3"], 0)
    for i in range(8):
        pair.engine.submit(completion(i, tokens=300))
    pair.engine.reset()
    assert pair.engine.version is None
    pair.load(models["qwen3-other"], 0)
    pair.engine.submit(completion("new"))
    results = pair.results(1)
    assert list(results) == ["new"]
    assert_teacher_forced({0: loaded(models["qwen3-other"])}, [completion("new")], results)


def test_request_ids_can_be_reused_immediately(pair: Servers, models: dict[str, Path]) -> None:
    """A new session uses the same request ids while streams of the previous session are still ending."""
    pair.load(models["qwen3"], 0)
    for _ in range(3):
        for i in range(16):
            pair.engine.submit(completion(i, tokens=300, seed=i))
        pair.until(lambda: _streamed(pair) > 16, "some tokens")
        pair.engine.cancel(range(16))
    requests = [completion(i, tokens=20, seed=100 + i) for i in range(16)]
    for request in requests:
        pair.engine.submit(request)
    assert_teacher_forced({0: loaded(models["qwen3"])}, requests, pair.results(16))


def test_cancelled_requests_give_no_result_and_delay_no_update(pair: Servers, models: dict[str, Path]) -> None:
    """After a mere disconnection SGLang would run them for seconds and refuse to flush, so they are aborted by id."""
    pair.load(models["qwen3"], 0)
    for i in range(32):
        pair.engine.submit(completion(i, tokens=400, seed=i))
    pair.until(lambda: _streamed(pair) > 64, "some tokens")
    pair.engine.cancel(range(31))
    before = len(pair.events())
    pair.load(models["qwen3-other"], 1)
    assert pair.events()[before:] == []
    assert list(pair.results(1)) == [31]


def test_cancelled_requests_give_no_result_even_if_they_have_finished(pair: Servers, models: dict[str, Path]) -> None:
    """Their ids can be reused immediately, so an old result could be mistaken for that of the new request."""
    pair.load(models["qwen3"], 0)
    before = pair.engine.load_status().tokens
    for i in range(4):
        pair.engine.submit(completion(i, tokens=5))
    pair.until(lambda: pair.engine.load_status().tokens == before + 4 * 5, "the last tokens")
    pair.until(lambda: pair.engine.load_status().running == 0, "the end of all")
    pair.engine.cancel(range(3))
    assert list(pair.results(1)) == [3]

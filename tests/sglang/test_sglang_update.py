"""Weights change while sequences run: no token is of weights that its span does not name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sglang_support import Servers, ask, assert_teacher_forced, given, loaded, logprobs, version_of

from sgpo_async.engines import Weights
from sgpo_async.engines.sglang.weight_sync.transports import TensorTransport
from sgpo_async.errors import Superseded
from sgpo_async.weights import digest

pytestmark = [pytest.mark.sglang, pytest.mark.process]
TOKENS = 400


def interrupted(servers: Servers, new: Path, *, count: int = 32, tokens: int = TOKENS) -> tuple[list, dict]:
    """`count` generations that an update to version 1 meets half-way: requests and results."""
    weights = version_of(new, 1)  # made before anything runs: the update is to meet the beginning of long sequences
    requests = [replace(ask(i, length=4 + i % 5, tokens=tokens, seed=i), top_logprobs_num=i % 4) for i in range(count)]
    for request in requests:
        servers.engine.submit(request)
    servers.until(lambda: _streamed(servers) > 4 * count, "some tokens")
    servers.engine.load(weights)
    results = servers.results(count)
    servers.until(lambda: servers.versions() == {1}, "version 1")
    return requests, results


def _streamed(servers: Servers) -> int:
    """Tokens that running generations have by now."""
    running = [
        r
        for server_slot in servers.engine.server_slots
        if server_slot.server
        for r in list(server_slot.server.running.values())
    ]
    return sum(len(r.item.tokens) for r in running)


def assert_cut(results: dict, count: int) -> None:
    """Most of the generations have tokens of both versions."""
    both = [result for result in results.values() if result.versions.tolist() == [0, 1]]
    assert len(both) >= count // 2, [result.versions.tolist() for result in results.values()]


@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_running_generations_go_on_under_the_new_weights(
    models: dict[str, Path], tmp_path: Path, transport: str, pair: Servers
) -> None:
    if transport == "disk":
        with Servers(
            models["qwen3"], tmp_path, servers=1, slots=32, transport="disk", folder=str(tmp_path / "w")
        ) as servers:
            _abort_resume(servers, models)
            assert len(list((tmp_path / "w").iterdir())) == 2  # the newest two versions, no draft
            assert {update.transport for update in servers.engine.updates} == {"disk"}
        assert list((tmp_path / "w").iterdir()) == []
    else:
        _abort_resume(pair, models)


def _abort_resume(servers: Servers, models: dict[str, Path]) -> None:
    servers.load(models["qwen3"], 0)
    requests, results = interrupted(servers, models["qwen3-other"])
    assert_cut(results, 32)
    both = {0: loaded(models["qwen3"]), 1: loaded(models["qwen3-other"])}
    assert_teacher_forced(both, requests, results)
    assert all(result.tokens.size == TOKENS for result in results.values())


def test_retract(models: dict[str, Path], tmp_path: Path) -> None:
    """The server itself keeps the sequences and recomputes their keys and values."""
    with Servers(models["qwen3"], tmp_path, slots=32, in_flight="retract") as servers:
        _abort_resume(servers, models)
        assert not servers.events()


def test_in_place(models: dict[str, Path], tmp_path: Path) -> None:
    """Tokens before the cut are of the old weights, new requests of the new ones; what runs on keeps its old keys."""
    with Servers(models["qwen3"], tmp_path, slots=32, in_flight="in-place", radix_cache=False) as servers:
        servers.load(models["qwen3"], 0)
        requests, results = interrupted(servers, models["qwen3-other"])
        assert_cut(results, 32)
        old, new = loaded(models["qwen3"]), loaded(models["qwen3-other"])
        after = 0.0
        for request in requests:
            result = results[request.id]
            cut = int(result.ends[0])
            np.testing.assert_allclose(
                result.logprobs[:cut], logprobs(old, request.prompt, result.tokens)[:cut], atol=1e-4
            )
            after = max(after, *np.abs(result.logprobs - logprobs(new, request.prompt, result.tokens))[cut:], 0.0)
        assert after > 1e-2  # the old keys show: this is what in-place means
        fresh = [ask(("new", i), length=4 + i % 5, seed=i) for i in range(8)]  # prompts that old weights have seen
        for request in fresh:
            servers.engine.submit(request)
        assert_teacher_forced({1: new}, fresh, servers.results(8))


def test_nothing_of_the_old_weights_serves_later_prompts(pair: Servers, models: dict[str, Path]) -> None:
    """SGLang's prefix cache would match prompts that old weights have seen."""
    pair.load(models["qwen3"], 0)
    prompts = [ask(i, length=40, tokens=4, seed=i) for i in range(4)]
    for version, folder in enumerate(["qwen3", "qwen3-other", "qwen3"], 1):
        pair.load(models[folder], version)
        for request in prompts:
            pair.engine.submit(request)
        assert_teacher_forced({version: loaded(models[folder])}, prompts, pair.results(4))


def test_scores_come_from_one_version(pair: Servers, models: dict[str, Path]) -> None:
    pair.load(models["qwen3"], 0)
    both = {0: loaded(models["qwen3"]), 1: loaded(models["qwen3-other"])}
    scores = [given(i, ask(0, length=20, seed=i).prompt, length=60) for i in range(200)]
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
    ("damage", "words"),
    [
        (lambda t: t.update({"model.more.weight": torch.zeros(2)}), "1 unknown .model.more.weight"),
        (lambda t: t.pop("model.norm.weight"), "1 parameters missing .model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(33)}), r"model.norm.weight: shape \(33,\) arrived"),
    ],
    ids=["unknown name", "missing name", "wrong shape"],
)
def test_weights_that_do_not_fit_never_reach_a_server(
    pair: Servers, models: dict[str, Path], damage: object, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair.load(models["qwen3"], 0)
    updates, told = len(pair.engine.updates), len(pair.events())
    pair.engine.load(damaged(models["qwen3-other"], 1, damage))
    pair.until(lambda: len(pair.events()) > told, "news")
    import re

    assert any(re.search(words, line) for line in pair.events()[told:]), pair.events()[told:]
    time.sleep(0.2)
    assert len(pair.engine.updates) == updates and pair.versions() == {0}
    pair.engine.submit(ask(0))
    assert_teacher_forced({0: loaded(models["qwen3"])}, [ask(0)], pair.results(1))
    pair.load(models["qwen3-other"], 2)  # the next good version is taken


def test_a_version_that_is_gone_is_left_for_the_next(pair: Servers, models: dict[str, Path]) -> None:
    def gone() -> dict:
        raise Superseded("overwritten")

    pair.load(models["qwen3"], 0)
    pair.engine.load(Weights(version=1, digest="", read=gone))
    time.sleep(0.2)
    assert pair.versions() == {0}
    pair.load(models["qwen3-other"], 2)


def test_damage_on_the_way_is_noticed_and_mended(pair: Servers, models: dict[str, Path]) -> None:
    """A tensor changes after it was hashed: the checksum differs, and another transport brings it whole."""
    pair.load(models["qwen3"], 0)
    transport = pair.engine._transports[0]
    assert isinstance(transport, TensorTransport)
    payloads = transport.payloads

    def careless(tensors: Mapping[str, torch.Tensor]) -> list[str]:
        tensors = dict(tensors)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
        tensors["model.norm.weight"][3] += 0.001
        return payloads(tensors)

    transport.payloads = careless  # type: ignore[method-assign]
    try:
        told = len(pair.events())
        pair.load(models["qwen3-other"], 1)
    finally:
        transport.payloads = payloads  # type: ignore[method-assign]
    news = pair.events()[told:]
    assert len([line for line in news if "model.norm.weight" in line and "out of service" in line]) == 2, news
    assert [update.transport for update in pair.engine.updates[-2:]] == ["disk", "disk"]
    pair.engine.submit(ask(0))
    assert_teacher_forced({1: loaded(models["qwen3-other"])}, [ask(0)], pair.results(1))


def test_a_new_session_forgets_requests_and_versions(pair: Servers, models: dict[str, Path]) -> None:
    """Version 0 of another run is other weights."""
    pair.load(models["qwen3"], 0)
    for i in range(8):
        pair.engine.submit(ask(i, tokens=300))
    pair.engine.reset()
    assert pair.engine.version is None
    pair.load(models["qwen3-other"], 0)
    pair.engine.submit(ask("new"))
    results = pair.results(1)
    assert list(results) == ["new"]
    assert_teacher_forced({0: loaded(models["qwen3-other"])}, [ask("new")], results)


def test_ids_may_come_again_at_once(pair: Servers, models: dict[str, Path]) -> None:
    """A new session numbers its requests anew, while streams of the last one are still ending."""
    pair.load(models["qwen3"], 0)
    for _ in range(3):
        for i in range(16):
            pair.engine.submit(ask(i, tokens=300, seed=i))
        pair.until(lambda: _streamed(pair) > 16, "some tokens")
        pair.engine.cancel(range(16))
    requests = [ask(i, tokens=20, seed=100 + i) for i in range(16)]
    for request in requests:
        pair.engine.submit(request)
    assert_teacher_forced({0: loaded(models["qwen3"])}, requests, pair.results(16))


def test_cancelled_requests_give_no_result_and_hold_no_update_up(pair: Servers, models: dict[str, Path]) -> None:
    """After a mere disconnection SGLang goes on for seconds, and refuses to flush: requests are aborted by name."""
    pair.load(models["qwen3"], 0)
    for i in range(32):
        pair.engine.submit(ask(i, tokens=400, seed=i))
    pair.until(lambda: _streamed(pair) > 64, "some tokens")
    pair.engine.cancel(range(31))
    told = len(pair.events())
    pair.load(models["qwen3-other"], 1)
    assert pair.events()[told:] == []
    assert list(pair.results(1)) == [31]


def test_cancelled_requests_give_no_result_even_if_they_have_finished(pair: Servers, models: dict[str, Path]) -> None:
    """Their ids may come again at once: a result of before would be taken for the new request's."""
    pair.load(models["qwen3"], 0)
    before = pair.engine.load_status().tokens
    for i in range(4):
        pair.engine.submit(ask(i, tokens=5))
    pair.until(lambda: pair.engine.load_status().tokens == before + 4 * 5, "the last tokens")
    pair.until(lambda: pair.engine.load_status().running == 0, "the end of all")
    pair.engine.cancel(range(3))
    assert list(pair.results(1)) == [3]

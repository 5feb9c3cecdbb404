"""Traps of SGLang 0.5.23: the tests reproduce each trap if that is cheap, and check the code that avoids it."""

from __future__ import annotations

import base64
import io
import multiprocessing.reduction
import pickle
import pickletools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sglang_support import (
    PATIENCE_S,
    VOCABULARY,
    Servers,
    completion,
    get,
    launch_of,
    loaded,
    logprobs,
    post,
    score_request,
    start,
    version_of,
)

from sgpo_async.engines.sglang.processes.api import ServerApi
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.engines.sglang.weight_sync.transports import TensorTransport
from sgpo_async.errors import EngineError

pytestmark = [pytest.mark.sglang, pytest.mark.process]


@pytest.fixture(scope="module")
def raw(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = start(models["qwen3"], tmp_path_factory.mktemp("raw"))
    yield server
    server.stop()


def payload(named: list[tuple[str, torch.Tensor]]) -> str:
    return base64.b64encode(pickle.dumps(named)).decode()


def by_file_descriptor() -> str:
    """A payload as torch.multiprocessing sends it, with the name of a file descriptor of this process."""
    import torch.multiprocessing.reductions

    buffer = io.BytesIO()
    multiprocessing.reduction.ForkingPickler(buffer, 2).dump([("model.norm.weight", torch.ones(32))])
    return base64.b64encode(buffer.getvalue()).decode()


def deadly(what: str) -> tuple[str, dict[str, Any]]:
    match what:
        case "a token id beyond the vocabulary":
            return "/generate", {"input_ids": [VOCABULARY + 5000], "sampling_params": {"max_new_tokens": 2}}
        case "a tensor of a wrong shape":
            return "/update_weights_from_tensor", {
                "serialized_named_tensors": [payload([("model.norm.weight", torch.ones(7))])]
            }
        case "a garbage payload":
            return "/update_weights_from_tensor", {"serialized_named_tensors": [base64.b64encode(b"garbage").decode()]}
        case _:
            return "/update_weights_from_tensor", {"serialized_named_tensors": [by_file_descriptor()]}


@pytest.mark.parametrize(
    "what",
    [
        "a token id beyond the vocabulary",
        "a tensor of a wrong shape",
        "a garbage payload",
        "a descriptor of another process",
    ],
)
def test_these_requests_kill_a_server(models: dict[str, Path], tmp_path: Path, what: str) -> None:
    """The trap. The engine never sends any of these: test_invalid_requests_are_refused_before_they_are_sent,
    test_weights_that_do_not_fit_are_not_sent, test_the_payload_is_a_plain_pickle."""
    server = start(models["qwen3"], tmp_path)
    try:
        path, body = deadly(what)
        if path.startswith("/update"):
            assert post(server.url, "/begin_weight_update", {})[0] == 200
        try:
            status, _ = post(server.url, path, body, timeout_s=15)
        except OSError:
            status = 0
        deadline = time.monotonic() + 60
        while server.alive and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not server.alive, f"the server is alive and answered {status}: its version does not have this trap"
    finally:
        server.stop()


def test_the_payload_is_a_plain_pickle() -> None:
    """It contains no file descriptor and no shared memory, and only the tensor's part of a larger storage."""
    view = torch.arange(1000.0)[10:20]
    (encoded,) = TensorTransport.payloads(None, {"a": view})  # type: ignore[arg-type]
    data = base64.b64decode(b"".join(encoded))
    names = {str(arg) for op, arg, _ in pickletools.genops(data) if op.name in ("GLOBAL", "SHORT_BINUNICODE")}
    assert not any("rebuild_storage_fd" in name or "reductions" in name for name in names), names
    assert len(data) < 1500
    assert torch.equal(pickle.loads(data)[0][1], view)


def test_unknown_names_are_silently_ignored(raw: ServerProcess) -> None:
    """The trap: the server reports success for an unknown tensor. Protection: the engine compares names before an
    update, and checksums after it."""
    before = post(raw.url, "/weights_checker", {"action": "checksum"})[1]["ranks"]
    assert post(raw.url, "/begin_weight_update", {})[0] == 200
    body = {"serialized_named_tensors": [payload([("model.layers.0.no_such.weight", torch.ones(3))])]}
    assert post(raw.url, "/update_weights_from_tensor", body)[0] == 200
    assert post(raw.url, "/end_weight_update", {})[0] == 200
    assert post(raw.url, "/weights_checker", {"action": "checksum"})[1]["ranks"] == before


def test_a_prefix_cache_that_is_not_flushed_serves_old_keys(raw: ServerProcess, models: dict[str, Path]) -> None:
    """The trap. Protection: every update flushes; see test_keys_of_old_weights_are_not_used_for_later_prompts."""
    prompt = completion(0, length=40).prompt
    other = loaded(models["qwen3-other"])
    sampling = {"temperature": 1.0, "max_new_tokens": 8}
    body = {"input_ids": prompt.tolist(), "sampling_params": sampling, "return_logprob": True}

    def error_after(flush: bool) -> float:
        for folder, flushed in (("qwen3", True), ("qwen3-other", flush)):
            named = list(version_of(models[folder], 0).read().items())
            assert post(raw.url, "/begin_weight_update", {})[0] == 200
            update = {"serialized_named_tensors": [payload(named)], "flush_cache": flushed}
            assert post(raw.url, "/update_weights_from_tensor", update)[0] == 200
            assert post(raw.url, "/end_weight_update", {})[0] == 200
            if folder == "qwen3":
                post(raw.url, "/generate", body)  # fills the prefix cache
        pairs = post(raw.url, "/generate", body)[1]["meta_info"]["output_token_logprobs"]
        tokens = np.array([pair[1] for pair in pairs], np.int32)
        return float(np.abs(logprobs(other, prompt, tokens) - [pair[0] for pair in pairs]).max())

    assert error_after(flush=False) > 1e-2
    assert error_after(flush=True) < 1e-4


def test_every_update_flushes_the_cache_and_none_calls_health(
    pair: Servers, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/health generates a token, and answers 503 after 20 s while the server is paused."""
    calls: list[tuple[str, Any]] = []
    call = ServerApi._call

    async def recorded(api: ServerApi, method: str, path: str, body: Any, timeout_s: float, *rest: Any) -> Any:
        calls.append((path, body))
        return await call(api, method, path, body, timeout_s, *rest)

    monkeypatch.setattr(ServerApi, "_call", recorded)
    pair.load(models["qwen3"], 0)
    pair.load(models["qwen3-other"], 1)
    updates = [body for path, body in calls if path == "/update_weights_from_disk"]
    assert len(updates) == 4 and all(body["flush_cache"] is True for body in updates)
    assert not any("health" in path for path, _ in calls)


def test_model_info_answers_while_paused(raw: ServerProcess) -> None:
    assert post(raw.url, "/pause_generation", {"mode": "retract"})[0] == 200
    try:
        assert get(raw.url, "/model_info", timeout_s=PATIENCE_S)["weight_version"]
    finally:
        assert post(raw.url, "/continue_generation", {})[0] == 200


def test_prompt_logprobs_ignore_the_temperature(raw: ServerProcess, models: dict[str, Path], pair: Servers) -> None:
    """The trap. Protection: the configuration and the engine refuse other temperatures."""
    score = score_request(0, completion(0).prompt, length=8)
    ids = [*score.prompt.tolist(), *score.tokens.tolist()]

    def at(temperature: float) -> list[float]:
        sampling = {"temperature": temperature, "max_new_tokens": 0}
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 5}
        return [pair[0] for pair in post(raw.url, "/generate", body)[1]["meta_info"]["input_token_logprobs"][1:]]

    np.testing.assert_allclose(at(0.7), at(1.0), atol=1e-6)
    with pytest.raises(EngineError, match="temperature of a score must be 1, the only one SGLang supports, got 0.7"):
        pair.engine.submit(type(score)(id=0, prompt=score.prompt, tokens=score.tokens, temperature=0.7))


def test_top_p_does_not_show_in_logprobs(raw: ServerProcess, models: dict[str, Path]) -> None:
    """The trap: sampling is restricted to the nucleus, but the log-probabilities are not. Protection: training asks
    for the kept tokens and their own log-probabilities, and every request sets top_p and top_k, because a server may
    have other defaults."""
    body = {"input_ids": completion(0).prompt.tolist(), "return_logprob": True,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 30, "top_p": 0.3}}  # fmt: skip
    pairs = post(raw.url, "/generate", body)[1]["meta_info"]["output_token_logprobs"]
    assert max(pair[0] for pair in pairs[:10]) < -0.01  # a nucleus of 0.3 would often be one token, of probability 1


def test_seeds_are_ignored_on_a_cpu(raw: ServerProcess) -> None:
    """The trap. Protection: engine.deterministic is refused with engine.kind=sglang."""
    sampling = {"temperature": 1.0, "max_new_tokens": 30, "sampling_seed": 5}
    body = {"input_ids": completion(0).prompt.tolist(), "sampling_params": sampling}
    assert len({tuple(post(raw.url, "/generate", body)[1]["output_ids"]) for _ in range(4)}) > 1


def test_one_thread_per_server(models: dict[str, Path]) -> None:
    """The actor's own environment does not matter."""
    environment = launch_of(models["qwen3"]).environment({"OMP_NUM_THREADS": "2", "PYTHONPATH": "/ours", "HOME": "/h"})
    assert environment["OMP_NUM_THREADS"] == "1" and environment["HOME"] == "/h"
    assert "/ours" not in environment["PYTHONPATH"]


def test_aborts_match_by_prefix(raw: ServerProcess, models: dict[str, Path], pair: Servers) -> None:
    """SGLang aborts every request whose id starts with the given one, so all our ids have the same length."""
    pair.load(models["qwen3"], 0)
    server = pair.engine.server_slots[0].server
    assert server is not None
    ids = [server.next_rid() for _ in range(2000)]
    assert len({len(rid) for rid in ids}) == 1 and len(set(ids)) == 2000

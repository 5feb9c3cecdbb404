"""The rules by which servers are refused, and the check of their log-probabilities."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import numpy as np
import pytest
import torch

from sgpo_async.config.schema import Engine, Sglang
from sgpo_async.engines.base import Generate, Score
from sgpo_async.engines.sglang.preflight import Reference, Subject, findings
from sgpo_async.engines.sglang.preflight.logprobs import LISTED, TOP_K, TOP_P, _differences, _judge, _kept_errors
from sgpo_async.engines.sglang.preflight.settings import (
    INTERFACE,
    RULES,
    interface,
    interface_used,
    missing,
    parsed,
    settings,
    version,
)
from sgpo_async.engines.sglang.preflight.updates import _require_idle
from sgpo_async.engines.sglang.processes.api import ServerApi, clean_up_attached
from sgpo_async.engines.sglang.serving.partial import Partial
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.engines.sglang.serving.update import update
from sgpo_async.engines.sglang.serving.versions import Offer
from sgpo_async.engines.sglang.weight_sync.distributed import DistributedTransport, _Version
from sgpo_async.engines.sglang.weight_sync.model_facts import model_facts
from sgpo_async.engines.sglang.weight_sync.transports import DiskTransport, Prepared, TensorTransport, Transport
from sgpo_async.errors import CheckFailed, CheckWarning
from sgpo_async.model.folder import model_folder
from sgpo_async.weights import digest
from sgpo_async.weights.broadcast_plan import Broadcast, BroadcastPlan

FOLDER = model_folder("builtin:cues")
GOOD: dict[str, Any] = {
    "version": "0.5.23", "incremental_streaming_output": True, "tp_size": 1, "dtype": "float32", "device": "cpu",
    "disable_radix_cache": False, "dp_size": 1, "pp_size": 1, "tokenizer_worker_num": 1, "quantization": None,
    "speculative_algorithm": None, "rl_on_policy_target": None, "enable_lora": None, "preferred_sampling_params": None,
    "max_req_input_len": 122, "context_length": None,
    "internal_states": [{"effective_max_running_requests_per_dp": 64}],
}  # fmt: skip


@pytest.fixture
def subject() -> Iterator[Subject]:
    """A server that gets no requests."""

    async def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    with asyncio.Runner() as runner:
        http = runner.run(session())
        engine = Engine(kind="sglang", device="cpu")
        facts = model_facts(FOLDER, dtype="float32", tp=1, device="cpu", digest=digest)
        server = Server(ServerApi(http, "http://127.0.0.1:9"), slots=64, ends=facts.ends, idle_timeout_s=1.0)
        transports = [TensorTransport(facts, tp=1)]
        yield Subject(server=server, model=facts, engine=engine, transports=transports)
        runner.run(http.close())


def with_sglang(subject: Subject, **keys: Any) -> Subject:
    return replace(subject, engine=replace(subject.engine, sglang=Sglang(**keys)))


def test_a_correctly_launched_server_passes(subject: Subject) -> None:
    assert asyncio.run(settings(subject, GOOD)) == "cpu, float32, tp 1, prefix cache on"
    assert asyncio.run(version(subject, GOOD)) == "SGLang 0.5.23"


WRONG = {
    "incremental_streaming_output": (False, "start it with --incremental-streaming-output"),
    "tp_size": (2, "set engine.sglang.tp"),
    "dtype": ("bfloat16", "--dtype equal to model.dtype"),
    "device": ("cuda", "set engine.device"),
    "dp_size": (2, "without --dp-size"),
    "pp_size": (2, "without --pp-size"),
    "tokenizer_worker_num": (2, "without --tokenizer-worker-num"),
    "quantization": ("fp8", "without --quantization"),
    "speculative_algorithm": ("EAGLE", "without --speculative-algorithm"),
    "rl_on_policy_target": ("fsdp", "without --rl-on-policy-target"),
    "enable_lora": (True, "without --enable-lora"),
    "preferred_sampling_params": ({"repetition_penalty": 1.1}, "without --preferred-sampling-params"),
}


@pytest.mark.parametrize("key", WRONG)
def test_the_error_of_every_rule_names_the_setting_and_the_remedy(subject: Subject, key: str) -> None:
    value, remedy = WRONG[key]
    with pytest.raises(CheckFailed, match=f"{key} must be .*, got .*: ") as failure:
        asyncio.run(settings(subject, GOOD | {key: value}))
    assert remedy in failure.value.remedy


def test_every_rule_has_a_test() -> None:
    assert {rule.key for rule in RULES} == {*WRONG, "disable_radix_cache"}


def test_all_wrong_settings_are_reported_at_once(subject: Subject) -> None:
    with pytest.raises(CheckFailed, match="tp_size must be 1, got 2: .*; pp_size must be 1, got 4: "):
        asyncio.run(settings(subject, GOOD | {"tp_size": 2, "pp_size": 4}))


def test_a_required_key_that_server_info_lacks_is_named(subject: Subject) -> None:
    server_info = {key: value for key, value in GOOD.items() if key not in ("tp_size", "quantization")}
    with pytest.raises(CheckFailed, match="^/server_info lacks tp_size; install sglang==0.5.23"):
        asyncio.run(settings(subject, server_info))


def test_in_place_needs_a_server_without_prefix_cache(subject: Subject) -> None:
    in_place = with_sglang(subject, in_flight="in-place", radix_cache=False)
    with pytest.raises(CheckFailed, match="disable_radix_cache must be True, got False: .* old keys and values"):
        asyncio.run(settings(in_place, GOOD))
    assert "cache off" in asyncio.run(settings(in_place, GOOD | {"disable_radix_cache": True}))


def test_a_server_without_room_for_a_prompt_is_refused(subject: Subject) -> None:
    with pytest.raises(
        CheckFailed, match="takes at most 122 tokens, but rollout.max_new_tokens is 122: no prompt fits"
    ):
        asyncio.run(settings(replace(subject, tokens=122), GOOD))
    asyncio.run(settings(replace(subject, tokens=121), GOOD))


def test_a_server_with_fewer_or_shorter_sequences_gives_a_warning(subject: Subject) -> None:
    server_info = GOOD | {"internal_states": [{"effective_max_running_requests_per_dp": 8}], "context_length": 100}
    message = "decodes at most 8 sequences at a time, but gets 64.*context_length is 100"
    with pytest.raises(CheckWarning, match=message):
        asyncio.run(settings(subject, server_info))


@pytest.mark.parametrize(
    ("number", "numbers"),
    [("0.5.23", (0, 5, 23)), ("0.5.23.post1", (0, 5, 23)), ("0.6.0rc1+cu130", (0, 6, 0)), ("None", ()), ("main", ())],
)
def test_versions_are_parsed(number: str, numbers: tuple[int, ...]) -> None:
    assert parsed(number) == numbers


@pytest.mark.parametrize(
    ("number", "in_flight", "message"),
    [
        ("0.5.20", "abort-resume", "SGLang 0.5.20, older than 0.5.21"),
        ("None", "abort-resume", "SGLang None, older than"),
        ("0.5.22", "retract", "SGLang 0.5.22 with engine.sglang.in_flight=retract: .*; use .*in_flight=abort-resume"),
        ("0.5.21", "in-place", "SGLang 0.5.21 with engine.sglang.in_flight=in-place: .*; use .*in_flight=abort-resume"),
    ],
)
def test_versions_with_known_faults_are_refused(subject: Subject, number: str, in_flight: str, message: str) -> None:
    subject = with_sglang(subject, in_flight=in_flight, radix_cache=in_flight != "in-place")
    with pytest.raises(CheckFailed, match=message):
        asyncio.run(version(subject, GOOD | {"version": number}))


def openapi_of(interface: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """The OpenAPI description of an interface, as FastAPI writes it."""
    paths, schemas = {}, {}
    for path, fields in interface.items():
        schema = {"$ref": f"#/components/schemas/{path[1:]}"}
        paths[path] = {"post": {"requestBody": {"content": {"application/json": {"schema": schema}}}}}
        schemas[path[1:]] = {"properties": {field: {} for field in fields}}
    return {"paths": paths, "components": {"schemas": schemas}}


def test_missing_paths_and_fields_are_named() -> None:
    interface = dict(INTERFACE)
    assert list(missing(openapi_of(interface), INTERFACE)) == []
    del interface["/end_weight_update"]
    interface["/pause_generation"] = ()
    assert list(missing(openapi_of(interface), INTERFACE)) == ["/pause_generation mode", "/end_weight_update"]


class Recorder:
    """A server that agrees to everything, and records the fields of the bodies that it gets, by path."""

    url = "server"

    def __init__(self) -> None:
        self.fields: dict[str, set[str]] = {}

    async def get(self, path: str, *, timeout_s: float) -> Any:
        self.fields.setdefault(path, set())
        return {"weight_version": "1", "loads": []}

    async def post(self, path: str, body: dict[str, Any], *, timeout_s: float, on_connected: Any = None) -> Any:
        self.fields.setdefault(path, set()).update(body)
        ranks = [{"checksums": {"a": "0"}, "parallelism_info": [{"tp_rank": 0}]}]
        return {"success": True, "ranks": ranks, "meta_info": {"finish_reason": {"type": "abort"}}}

    async def post_encoded(self, path: str, body: list[bytes], *, timeout_s: float) -> None:
        await self.post(path, json.loads(b"".join(body)), timeout_s=timeout_s)

    async def stream(self, body: dict[str, Any], **_: Any) -> AsyncIterator[Any]:
        await self.post("/generate", body, timeout_s=1.0)
        for message in ():
            yield message


class WeightSender:
    """Does its part of every broadcast at once."""

    def open(self, *_: Any, **__: Any) -> Future[Any]:
        return self._done(("host", 1))

    def join(self, *_: Any) -> Future[Any]:
        return self._done(None)

    broadcast = join

    def close(self, group: str) -> None:
        pass

    def _done(self, result: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(result)
        return future


async def use_all_of(api: Any, engine: Engine) -> None:
    """Every kind of request that this package sends with these settings."""
    facts: Any = SimpleNamespace(device="cpu")
    tensors = TensorTransport(facts, tp=1)
    payloads: list[tuple[Transport, Any]] = [
        (tensors, tensors.payloads({"a": torch.zeros(1)})),
        (DiskTransport(facts, ""), "folder"),
    ]
    if engine.sglang.used_transport == "distributed":
        sender: Any = WeightSender()
        plan = BroadcastPlan(1, "00" * 16, (Broadcast(("a",), ("float32",), ((1,),)),))
        broadcasts = DistributedTransport(facts, tp=1)
        payloads += [(broadcasts, _Version(sender, plan)), (broadcasts, _Version(cast(Any, WeightSender()), plan))]
    server = Server(api, slots=1, ends=(), idle_timeout_s=1.0)
    prompt = np.arange(3, dtype=np.int32)
    generate = Generate(
        id=0, prompt=prompt, max_new_tokens=2, temperature=1.0, seed=0, top_k=5, top_logprobs_num=2, report_kept=True
    )
    await server.extend(Partial(generate), "rid", 0)
    await server.score(Score(id=0, prompt=prompt, tokens=prompt, temperature=1.0), "rid", 0)
    await server.abort("rid")
    await clean_up_attached(api, timeout_s=1.0)
    await _require_idle(api, timeout_s=1.0)
    for transport, payload in payloads:
        for in_flight in ("abort-resume", "retract"):
            offer = Offer(cast(Any, None), transport, Prepared(1, "00" * 16, [{"a": "0"}], payload))
            await update(server, offer, in_flight=in_flight, phase_s=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("transport", ["auto", "distributed"])
def test_the_interface_that_is_required_is_the_one_that_is_used(transport: Any) -> None:
    engine = Engine(kind="sglang", sglang=Sglang(transport=transport))
    recorder = Recorder()
    asyncio.run(use_all_of(recorder, engine))
    assert recorder.fields == {path: set(fields) for path, fields in interface_used(engine).items()}


@pytest.mark.parametrize("transport", ["auto", "distributed"])
def test_broadcasts_are_required_of_a_server_only_where_they_are_used(subject: Subject, transport: Any) -> None:
    async def check(described: dict[str, Any]) -> str:
        recorder: Any = Recorder()
        recorder.get = lambda path, timeout_s: asyncio.sleep(0, described)
        return await interface(replace(using, server=Server(recorder, slots=1, ends=(), idle_timeout_s=1.0)), GOOD)

    using = with_sglang(subject, transport=transport)
    assert "paths" in asyncio.run(check(openapi_of(dict(interface_used(using.engine)))))
    if transport == "distributed":
        with pytest.raises(CheckFailed, match=r"lacks /init_weights_update_group, /update_weights_from_distributed, "):
            asyncio.run(check(openapi_of(dict(INTERFACE))))


def replies(temperature: float, *, reported: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """A completion sampled at `temperature` with log-probabilities at temperature `reported`, and its scores at 1."""
    rng = np.random.default_rng(3)
    logits = 3 * rng.normal(size=(10, 20))
    generated: dict[str, list] = {"output_token_logprobs": [], "output_top_logprobs": []}
    scored: dict[str, list] = {"input_token_logprobs": [[None, 0, None]], "input_top_logprobs": [None]}
    for row in logits:
        token = int(rng.choice(20, p=np.exp(log_softmax(row / temperature))))
        for lists, values in ((generated, log_softmax(row / reported)), (scored, log_softmax(row))):
            mode = "output" if lists is generated else "input"
            top = np.argsort(-values)[:2]
            lists[f"{mode}_token_logprobs"].append([values[token], token, None])
            lists[f"{mode}_top_logprobs"].append([[values[id], int(id), None] for id in top])
    return generated, scored


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_at_a_wrong_temperature_are_detected(temperature: float) -> None:
    assert np.abs(_differences(*replies(temperature, reported=temperature), temperature)).max() < 1e-12
    for other in (1.0, 0.7, 1.3):
        if other != temperature:
            wrong = _differences(*replies(temperature, reported=other), temperature)
            for dtype in ("float32", "bfloat16"):
                with pytest.raises(CheckFailed, match="off by .* on average.*SGLANG_RETURN_ORIGINAL_LOGPROB"):
                    _judge(wrong, dtype, "")


def truncated(**wrong: Any) -> dict[str, Any]:
    """What a server answers on truncated completions; `wrong` replaces parts of the first position."""
    rng, meta = np.random.default_rng(4), {}
    for row in 2 * rng.normal(size=(10, 20)):
        log_p = log_softmax(row)
        order = np.argsort(-log_p)[:LISTED]
        before = np.cumsum(np.exp(log_p[order])) - np.exp(log_p[order])
        kept = order[(before < TOP_P) & (np.arange(len(order)) < TOP_K)]
        token = int(rng.choice(kept))
        position = {
            "output_token_logprobs": [log_p[token], token, None],
            "output_top_logprobs": [[log_p[id], int(id), None] for id in order],
            "output_token_sampling_mask": kept.tolist(),
            "output_token_sampling_logprobs": log_p[token] - np.log(np.exp(log_p[kept]).sum()),
        }
        for name, value in (position | (wrong if not meta else {})).items():
            meta.setdefault(name, []).append(value)
    return meta


def test_wrong_kept_tokens_are_detected() -> None:
    good = truncated()
    assert np.abs(_kept_errors(good)).max() < 1e-12
    _, token, _ = good["output_token_logprobs"][0]
    kept = good["output_token_sampling_mask"][0]
    assert len(kept) > 1
    others = [id for id in kept if id != token]
    beyond = [id for _, id, _ in good["output_top_logprobs"][0] if id not in kept]
    for wrong in (others, [token], [*kept, *beyond]):
        with pytest.raises(CheckFailed, match=f"top-p {TOP_P}, top-k {TOP_K}: kept {len(wrong)} tokens"):
            _kept_errors(truncated(output_token_sampling_mask=wrong))
    whole = truncated(output_token_sampling_logprobs=good["output_token_logprobs"][0][0])
    with pytest.raises(CheckFailed, match="off by"):
        _judge(_kept_errors(whole), "float32", "")


@pytest.mark.parametrize("sampler", ["keeps all ties", "keeps the first tie", "keeps the last tie"])
def test_ties_at_the_edge_are_no_error(sampler: str) -> None:
    """With bfloat16 logits, tokens as likely as the last one kept are frequent; samplers treat them differently."""
    rng, meta, ties = np.random.default_rng(6), {}, 0
    for row in np.round(4 * rng.normal(size=(200, 60))) / 4:
        log_p = log_softmax(row)
        order = np.argsort(-log_p, kind="stable")
        before = np.cumsum(np.exp(log_p[order])) - np.exp(log_p[order])
        kept = order[(before < TOP_P) & (np.arange(60) < TOP_K)]
        edge = np.flatnonzero(log_p == log_p[kept].min())
        ties += len(edge) > np.isin(edge, kept).sum()
        sure = kept[log_p[kept] > log_p[kept].min()]
        count = len(kept) - len(sure)
        kept = np.concatenate(
            [sure, {"keeps all ties": edge, "keeps the first tie": edge[:count]}.get(sampler, edge[-count:])]
        )
        token = int(rng.choice(kept))
        listed = np.argsort(-log_p, kind="stable")[:LISTED]
        for name, value in {
            "output_token_logprobs": [log_p[token], token, None],
            "output_top_logprobs": [[log_p[id], int(id), None] for id in listed],
            "output_token_sampling_mask": kept.tolist(),
            "output_token_sampling_logprobs": log_p[token] - np.log(np.exp(log_p[kept]).sum()),
        }.items():
            meta.setdefault(name, []).append(value)
    assert ties > 20
    assert np.abs(_kept_errors(meta)).max() < 1e-12


def test_nan_and_differences_above_the_bound_are_refused() -> None:
    with pytest.raises(CheckFailed, match="off by nan"):
        _judge(np.array([0.0, np.nan]), "bfloat16", "T = 1")
    assert _judge(np.array([5e-5, -5e-5]), "float32", "T = 1") == "T = 1: 5e-05, at most 5e-05"
    with pytest.raises(CheckFailed):
        _judge(np.array([2e-4, 0, 0, 0]), "float32", "T = 1")


@pytest.mark.parametrize(("dtype", "nbytes"), [("float32", 4), ("bfloat16", 6)])
def test_a_reference_that_does_not_fit_into_memory_is_not_loaded(
    dtype: str, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 167_456 * nbytes
    monkeypatch.setattr(findings, "available_memory", lambda: needed - 1)
    with pytest.raises(CheckFailed, match=rf"take {needed / 1e9:.3g} GB of memory, and .* GB are free; free some"):
        Reference(FOLDER, dtype=dtype, digest=digest).weights(0)
    monkeypatch.setattr(findings, "available_memory", lambda: needed)
    assert Reference(FOLDER, dtype=dtype, digest=digest).weights(0).version == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_changes_one_element_minimally(dtype: str) -> None:
    reference = Reference(FOLDER, dtype=dtype, digest=digest)
    original, changed = reference.weights(0), reference.weights(1, changed="model.norm.weight")
    before, after = original.read()["model.norm.weight"], changed.read()["model.norm.weight"]
    assert str(before.dtype) == f"torch.{dtype}" and original.digest != changed.digest
    assert (before != after).nonzero().flatten().tolist() == [0] and 0 < after[0] - before[0] < 0.01 * abs(before[0])
    assert reference.weights(2).digest == original.digest

"""The doctor on real servers: all well on one as it should be, and each fault named with its remedy."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from sglang_support import PYTHON, ROOT, get, saved
from transformers import AutoTokenizer

from sgpo_async.cli.main import main
from sgpo_async.config.schema import Engine, Sglang
from sgpo_async.engines.sglang import SglangEngine
from sgpo_async.engines.sglang.preflight import FULL, JOIN, Finding, Reference, Subject, examine, join
from sgpo_async.engines.sglang.preflight.logprobs import consistent, teacher_forced
from sgpo_async.engines.sglang.preflight.model import vocabulary
from sgpo_async.engines.sglang.processes.api import ServerApi
from sgpo_async.engines.sglang.processes.launch import Launch
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.engines.sglang.serving.server import Server
from sgpo_async.errors import CheckFailed, EngineError
from sgpo_async.model.folder import model_folder
from sgpo_async.weights import digest

pytestmark = [pytest.mark.sglang, pytest.mark.process]

CUES = model_folder("builtin:cues")
DEMO = str(ROOT / "configs" / "demo-sglang.yaml")
START_S = 120.0


class Backward(Launch):
    """A server that repeats all tokens in every message."""

    def command(self, port: int) -> list[str]:
        return [word for word in super().command(port) if word != "--incremental-streaming-output"]


def started(kind: type[Launch], folder: Path) -> ServerProcess:
    """A server of the demo's model, ready to be attached."""
    launch = kind(settings=Sglang(python=PYTHON), model=CUES, dtype="float32", device="cpu", slots=64, longest=128)
    server = ServerProcess(launch, folder / "server.log")
    deadline = time.monotonic() + START_S
    while True:
        assert server.alive, server.last_words()
        assert time.monotonic() < deadline, server.last_words()
        try:
            get(server.url, "/model_info", timeout_s=5.0)
            return server
        except OSError:
            time.sleep(0.2)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server as it should be."""
    server = started(Launch, tmp_path_factory.mktemp("good"))
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that repeats tokens, and whose log-probabilities are those of temperature 1 at any temperature."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        server = started(Backward, tmp_path_factory.mktemp("wrong"))
    yield server.url
    server.stop()


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and output of `sgpo-async doctor` with the demo's configuration."""
    code = main(["doctor", DEMO, "hub.address=tcp://127.0.0.1:0", f"engine.sglang.python={PYTHON}", *words])
    return code, " ".join(capsys.readouterr().out.split())  # as one line, however it was folded


def on(url: str, ask: Callable[[Subject], Any], *, model: str = CUES, dtype: str = "float32", **own: Any) -> Any:
    """The answer of `ask` about the server, as the engine would ask it."""
    engine = Engine(kind="sglang", device="cpu", sglang=Sglang(urls=[url], phase_timeout_s=30.0, **own))
    sglang = SglangEngine(model, engine, dtype=dtype, digest=digest)

    async def asked() -> Any:
        async with aiohttp.ClientSession() as http:
            server = Server(ServerApi(http, url), slots=64, ends=(), silence_s=30.0)
            subject = Subject(server=server, model=sglang._model, engine=engine, transports=sglang._transports)
            return await ask(replace(subject, reference=Reference(model, dtype=dtype, digest=digest)))

    return asyncio.run(asked())


def failed(findings: Sequence[Finding]) -> list[str]:
    return [f"{one.check}: {one.found}; {one.remedy}" for one in findings if one.outcome == "failed"]


def with_tokenizer(folder: Path, kind: str = "qwen3") -> str:
    """A tiny model of another vocabulary."""
    saved(kind, folder, seed=0)
    AutoTokenizer.from_pretrained(CUES).save_pretrained(folder)
    return str(folder)


def test_all_is_well_with_servers_that_are_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's configuration, in a terminal of 80 columns; nothing is left."""
    code = main(["doctor", DEMO, "hub.address=tcp://127.0.0.1:0", f"engine.sglang.python={PYTHON}", f"out={tmp_path}"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert max(map(len, out.splitlines())) <= 80
    assert out.rstrip().endswith("nothing failed") and "warning" not in out and "not run" not in out
    for check in FULL:
        assert out.count(f"  {check} ") >= 2, check
    assert not [p for p in psutil.Process().children(recursive=True) if "watchdog" in " ".join(p.cmdline())]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_flight", ["abort-resume", "retract"])
@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_all_is_well_with_an_attached_server(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_flight: str, transport: str
) -> None:
    own = [f"urls=[{url}]", f"in_flight={in_flight}", f"transport={transport}", f"folder={tmp_path}/w"]
    code, out = doctor(capsys, *(f"engine.sglang.{word}" for word in own))
    assert code == 0, out
    assert f"{transport}, thrice: prepare" in out and f"{in_flight}: " in out


def test_joining_finds_nothing_wrong(url: str) -> None:
    assert on(url, join) == []


def test_another_vocabulary(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_tokenizer(tmp_path / "other")
    code, out = doctor(capsys, f"engine.sglang.urls=[{url}]", f"model.path={model}")
    assert code == 2
    assert "its vocabulary has 56 tokens, the model's 96" in out
    assert f"failed: server {url}: model: start it with --model-path as model.path of the run" in out
    assert out.count("not run after model is mended") >= 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "only the run has model.layers.3.input_"),
        (
            {"intermediate_size": 200},
            r"its model.layers.0.mlp.gate_proj.weight has the shape \(\d+, 64\), the run's \(200",
        ),
        ({"tie_word_embeddings": True}, "only the server has lm_head.weight"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "it has a Qwen3ForCausalLM, the run a Qwen2"),
    ],
    ids=["layers", "shape", "tied", "architecture"],
)
def test_another_model_is_refused_by_the_first_difference(
    url: str, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config = json.loads(Path(CUES, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    faults = failed(on(url, lambda subject: examine(subject, JOIN), model=str(tmp_path)))
    assert len(faults) == 1 and re.search(f"^model: .*{words}.*; start it with --model-path", faults[0]), faults


def test_the_server_tells_its_vocabulary_and_lives_on(url: str) -> None:
    assert on(url, lambda subject: vocabulary(subject.server.api, timeout_s=30.0)) == 56
    assert get(url, "/model_info")


def test_wrong_ranks_and_wrong_dtype(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor(capsys, f"engine.sglang.urls=[{url}]", "engine.sglang.tp=2", "model.dtype=bfloat16")
    assert code == 2
    assert "tp_size is 1, not 2: weights are sent and verified rank by rank" in out
    assert "dtype is 'float32', not 'bfloat16'" in out
    assert "settings: set engine.sglang.tp to the server's --tp-size; start it with --dtype equal to model.dtype" in out


def test_a_server_without_incremental_streaming(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor(capsys, f"engine.sglang.urls=[{wrong}]")
    assert code == 2
    assert "incremental_streaming_output is False, not True: every message would repeat all tokens" in out
    assert f"failed: server {wrong}: settings: start it with --incremental-streaming-output" in out


def test_log_probabilities_of_another_temperature(wrong: str) -> None:
    """Found without the learner's model, as at join."""
    with pytest.raises(CheckFailed, match=r"T = 0.7: log-probabilities are off by .*; look for .*ORIGINAL_LOGPROB"):
        on(wrong, lambda subject: consistent(subject, {}))


def test_weights_that_are_not_the_learners(url: str, tmp_path: Path) -> None:
    """The server holds the weights of its folder; the learner others of the same names and shapes."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(CUES)
    other.model.norm.weight.data[0] *= 1.5
    other.save_pretrained(tmp_path)

    async def compared(subject: Subject) -> str:
        findings = await examine(subject, {"weight update": FULL["weight update"]})
        assert not failed(findings)
        return await teacher_forced(
            replace(subject, reference=Reference(str(tmp_path), dtype="float32", digest=digest)), {}
        )

    with pytest.raises(CheckFailed, match="T = 1: log-probabilities are off by"):
        on(url, compared)


def test_a_server_that_somebody_uses_is_left_alone(url: str) -> None:
    async def used(subject: Subject) -> list[Finding]:
        async def use(name: str) -> None:
            while not over.is_set():
                await subject.server.api.post("/generate", body | {"rid": name}, timeout_s=120)

        body, over = {"input_ids": [1], "sampling_params": {"max_new_tokens": 120, "ignore_eos": True}}, asyncio.Event()
        uses = [asyncio.create_task(use(f"x{i}")) for i in range(4)]
        await asyncio.sleep(0.1)
        findings = await examine(subject, {"weight update": FULL["weight update"]})
        over.set()
        await asyncio.gather(*uses)
        return findings

    (fault,) = failed(on(url, used))
    assert "requests of somebody else run on it; end the actor that uses it" in fault


def test_nobody_listens(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One of two: the other is examined."""
    code, out = doctor(capsys, f"engine.sglang.urls=[http://127.0.0.1:9,{url}]", "--light")
    assert code == 2
    assert "failed: server http://127.0.0.1:9: answers: start the server there, or correct the URL" in out
    assert f"server {url} version ok" in out and "1 failed" in out


def test_a_server_that_cannot_start(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor(capsys, "engine.sglang.args=--no-such-word", "engine.sglang.servers=1")
    assert code == 2
    assert "start failed server" in out and "unrecognized arguments: --no-such-word" in out


def test_an_actor_refuses_a_server_that_fails(url: str) -> None:
    """At its first start, in one line."""
    own = Sglang(urls=[url], tp=2, phase_timeout_s=30.0)
    engine = SglangEngine(CUES, Engine(kind="sglang", device="cpu", sglang=own), dtype="float32", digest=digest)
    with pytest.raises(EngineError, match=rf"^{url}: settings: tp_size is 1, not 2: .*; set engine.sglang.tp") as error:
        engine.start()
    assert "\n" not in str(error.value)


def test_ctrl_c_ends_the_servers() -> None:
    words = [sys.executable, "-m", "sgpo_async.cli", "doctor", DEMO, f"engine.sglang.python={PYTHON}"]
    process = subprocess.Popen(
        [*words, "hub.address=tcp://127.0.0.1:0"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        deadline, us = time.monotonic() + 60, psutil.Process(process.pid)
        while len(members := us.children(recursive=True)) < 4:  # two keepers, two servers
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        _, alive = psutil.wait_procs(members, timeout=120)
        assert not alive, alive
    finally:
        process.kill()

"""The doctor on real servers: a correct server passes all checks, and each fault is named with its remedy."""

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


class RepeatingLaunch(Launch):
    """A server that repeats all tokens in every message."""

    def command(self, port: int) -> list[str]:
        return [argument for argument in super().command(port) if argument != "--incremental-streaming-output"]


def start_server(kind: type[Launch], folder: Path) -> ServerProcess:
    """Start a server with the demo's model, and wait until it is ready."""
    launch = kind(settings=Sglang(python=PYTHON), model=CUES, dtype="float32", device="cpu", slots=64, longest=128)
    server = ServerProcess(launch, folder / "server.log")
    deadline = time.monotonic() + START_S
    while True:
        assert server.alive, server.log_tail()
        assert time.monotonic() < deadline, server.log_tail()
        try:
            get(server.url, "/model_info", timeout_s=5.0)
            return server
        except OSError:
            time.sleep(0.2)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A correctly launched server."""
    server = start_server(Launch, tmp_path_factory.mktemp("good"))
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that repeats tokens, and whose log-probabilities are always those of temperature 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        server = start_server(RepeatingLaunch, tmp_path_factory.mktemp("wrong"))
    yield server.url
    server.stop()


def doctor(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str]:
    """Exit code and output of `sgpo-async doctor` with the demo's configuration."""
    code = main(["doctor", DEMO, "hub.address=tcp://127.0.0.1:0", f"engine.sglang.python={PYTHON}", *overrides])
    return code, " ".join(capsys.readouterr().out.split())  # as one line, without the line breaks of the table


def on(url: str, check: Callable[[Subject], Any], *, model: str = CUES, dtype: str = "float32", **own: Any) -> Any:
    """The result of `check` for the server, with the subject that the engine would use."""
    engine = Engine(kind="sglang", device="cpu", sglang=Sglang(urls=[url], phase_timeout_s=30.0, **own))
    sglang = SglangEngine(model, engine, dtype=dtype, digest=digest)

    async def checked() -> Any:
        async with aiohttp.ClientSession() as http:
            server = Server(ServerApi(http, url), slots=64, ends=(), idle_timeout_s=30.0)
            subject = Subject(server=server, model=sglang._model, engine=engine, transports=sglang._transports)
            return await check(replace(subject, reference=Reference(model, dtype=dtype, digest=digest)))

    return asyncio.run(checked())


def failures(findings: Sequence[Finding]) -> list[str]:
    return [f"{f.check}: {f.found}; {f.remedy}" for f in findings if f.outcome == "failed"]


def with_tokenizer(folder: Path, kind: str = "qwen3") -> str:
    """A tiny model with another vocabulary."""
    saved(kind, folder, seed=0)
    AutoTokenizer.from_pretrained(CUES).save_pretrained(folder)
    return str(folder)


def watchdogs() -> set[int]:
    """The processes that watch over servers, also over those that all tests share."""
    return {one.pid for one in psutil.Process().children(recursive=True) if "watchdog" in " ".join(one.cmdline())}


def test_launched_servers_pass_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's configuration, in a terminal of 80 columns; no process and no file is left."""
    before = watchdogs()
    code = main(["doctor", DEMO, "hub.address=tcp://127.0.0.1:0", f"engine.sglang.python={PYTHON}", f"out={tmp_path}"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert max(map(len, out.splitlines())) <= 80, out
    assert out.rstrip().endswith("nothing failed") and "warning" not in out and "not run" not in out, out
    for check in FULL:
        assert out.count(f"  {check} ") >= 2, (check, out)
    assert watchdogs() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_flight", ["abort-resume", "retract"])
@pytest.mark.parametrize("transport", ["tensor", "disk"])
def test_an_attached_server_passes_every_check(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_flight: str, transport: str
) -> None:
    own = [f"urls=[{url}]", f"in_flight={in_flight}", f"transport={transport}", f"folder={tmp_path}/w"]
    truncated = ["rollout.top_p=0.95", "rollout.top_k=16"] if transport == "disk" else []
    code, out = doctor(capsys, *(f"engine.sglang.{override}" for override in own), *truncated)
    assert ("top-p 0.8, top-k 8: " in out) == bool(truncated)
    assert code == 0, out
    assert f"3 updates by {transport}: prepare" in out and f"{in_flight}: " in out


def test_a_correct_server_passes_the_checks_at_join(url: str) -> None:
    assert on(url, join) == []


def test_another_vocabulary_is_refused(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_tokenizer(tmp_path / "other")
    code, out = doctor(capsys, f"engine.sglang.urls=[{url}]", f"model.path={model}")
    assert code == 2
    assert "its vocabulary has 56 tokens, the model's 96" in out
    assert f"failed: server {url}: model: start it with --model-path equal to model.path of the run" in out
    assert out.count("not run correct model first") >= 4


@pytest.mark.parametrize(
    ("change", "message"),
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
    url: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads(Path(CUES, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    faults = failures(on(url, lambda subject: examine(subject, JOIN), model=str(tmp_path)))
    assert len(faults) == 1 and re.search(f"^model: .*{message}.*; start it with --model-path", faults[0]), faults


def test_the_server_reports_its_vocabulary_and_keeps_running(url: str) -> None:
    assert on(url, lambda subject: vocabulary(subject.server.api, timeout_s=30.0)) == 56
    assert get(url, "/model_info")


def test_wrong_ranks_and_a_wrong_dtype_are_reported(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor(capsys, f"engine.sglang.urls=[{url}]", "engine.sglang.tp=2", "model.dtype=bfloat16")
    assert code == 2
    assert "tp_size must be 2, got 1: weights are sent and verified rank by rank" in out
    assert "dtype must be 'bfloat16', got 'float32'" in out
    assert "settings: set engine.sglang.tp to the server's --tp-size; start it with --dtype equal to model.dtype" in out


def test_a_server_without_incremental_streaming_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor(capsys, f"engine.sglang.urls=[{wrong}]")
    assert code == 2
    assert "incremental_streaming_output must be True, got False: every message would repeat all tokens" in out
    assert f"failed: server {wrong}: settings: start it with --incremental-streaming-output" in out


def test_log_probabilities_of_another_temperature_are_detected(wrong: str) -> None:
    """This check does not need the learner's model, so it also runs at join."""
    message = r"T = 0.7: log-probabilities are off by .*; check what changes logits .*ORIGINAL_LOGPROB"
    with pytest.raises(CheckFailed, match=message):
        on(wrong, lambda subject: consistent(subject, {}))


def test_weights_that_differ_from_the_learners_are_detected(url: str, tmp_path: Path) -> None:
    """The server has the weights of its folder; the learner has others with the same names and shapes."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(CUES)
    other.model.norm.weight.data[0] *= 1.5
    other.save_pretrained(tmp_path)

    async def compared(subject: Subject) -> str:
        findings = await examine(subject, {"weight update": FULL["weight update"]})
        assert not failures(findings)
        return await teacher_forced(
            replace(subject, reference=Reference(str(tmp_path), dtype="float32", digest=digest)), {}
        )

    with pytest.raises(CheckFailed, match="T = 1: log-probabilities are off by"):
        on(url, compared)


def test_a_server_that_another_client_uses_gets_no_weight_update(url: str) -> None:
    async def used(subject: Subject) -> list[Finding]:
        async def use(name: str) -> None:
            while not over.is_set():
                await subject.server.api.post("/generate", body | {"rid": name}, timeout_s=120)

        body, over = {"input_ids": [1], "sampling_params": {"max_new_tokens": 120, "ignore_eos": True}}, asyncio.Event()
        uses = [asyncio.create_task(use(f"x{i}")) for i in range(32)]
        await asyncio.sleep(0.1)
        findings = await examine(subject, {"weight update": FULL["weight update"]})
        over.set()
        await asyncio.gather(*uses)
        return findings

    (fault,) = failures(on(url, used))
    assert "requests of another client run on it; stop the actor that uses it, and try again" in fault


def test_a_url_without_a_server_fails(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One of two URLs; the server at the other URL is examined."""
    code, out = doctor(capsys, f"engine.sglang.urls=[http://127.0.0.1:9,{url}]", "--light")
    assert code == 2
    assert "failed: server http://127.0.0.1:9: answers: start the server there, or correct the URL" in out
    assert f"server {url} version ok" in out and "1 failed" in out


def test_a_server_that_cannot_start_fails(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = doctor(capsys, "engine.sglang.args=--no-such-option", "engine.sglang.servers=1")
    assert code == 2
    assert "start failed server" in out and "unrecognized arguments: --no-such-option" in out


def test_an_actor_refuses_a_server_that_fails(url: str) -> None:
    """It fails at its start, with an error in one line."""
    own = Sglang(urls=[url], tp=2, phase_timeout_s=30.0)
    engine = SglangEngine(CUES, Engine(kind="sglang", device="cpu", sglang=own), dtype="float32", digest=digest)
    message = rf"^{url}: settings: tp_size must be 2, got 1: .*; set engine.sglang.tp"
    with pytest.raises(EngineError, match=message) as error:
        engine.start()
    assert "\n" not in str(error.value)


def test_ctrl_c_stops_the_servers() -> None:
    command = [sys.executable, "-m", "sgpo_async.cli", "doctor", DEMO, f"engine.sglang.python={PYTHON}"]
    process = subprocess.Popen(
        [*command, "hub.address=tcp://127.0.0.1:0"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    try:
        deadline, parent = time.monotonic() + 60, psutil.Process(process.pid)
        while len(members := parent.children(recursive=True)) < 4:  # two watchdogs, two servers
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        _, alive = psutil.wait_procs(members, timeout=120)
        assert not alive, alive
    finally:
        process.kill()

"""The strategies command with a real SGLang server and a tiny random model whose tokens are bytes.

Without constraints the model writes nonsense: the replies are refused with a reason, and their tokens are counted. With
SGLang's grammar for the reply formats it writes letters in text fields and digits in score fields, and the pipeline
writes a library.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sglang_support import PYTHON, post
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from sgpo_async.cli.main import main
from sgpo_async.config.schema import Engine, Sglang
from sgpo_async.engines.sglang.processes.launch import CPU_LAUNCHER
from sgpo_async.engines.sglang.serving.texts import text_server
from sgpo_async.local.children import ROOT
from sgpo_async.strategies import Endpoint, Server
from sgpo_async.strategies.prompts import Prompt
from sgpo_async.tasks.files import read_problems

pytestmark = [pytest.mark.sglang, pytest.mark.process]

ITEMS = 4
SERVE = ["--serve", f"engine.sglang.python={PYTHON}", "engine.device=cpu", "engine.slots=16"]
LOGITS = dict.fromkeys("etaoinshrdlu", 5.7) | {'"': 3.8, "<eos>": -8.0} | dict.fromkeys("0123456789\\ĠĊĉč", -12.0)
"""Logits of these bytes relative to all others: they give texts of about 80 letters, then a quote.
Digits are avoided because they might count as a leak; Ġ, Ċ, ĉ, č are white space in the tokenizer's alphabet."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    vocabulary = {symbol: i for i, symbol in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=8192, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=vocabulary["<eos>"],
    )  # fmt: skip
    network = Qwen3ForCausalLM(config)
    with torch.no_grad():  # dimension 0 is 1 for every token, so the head uses it as a bias
        network.model.embed_tokens.weight[:, 0] = 1.0
        network.lm_head.weight[:, 0] = 0.0
        for symbol, logit in LOGITS.items():
            network.lm_head.weight[vocabulary[symbol], 0] = logit / config.hidden_size**0.5
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"problem": f"What is {i} + 40?", "answer": str(i + 40), "response": "Add."} for i in range(ITEMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A text server that the command did not start."""
    settings = Engine(kind="sglang", device="cpu", slots=16, sglang=Sglang(python=PYTHON))
    log = tmp_path_factory.mktemp("log") / "server.log"
    with asyncio.Runner() as runner:
        server = text_server(str(model), settings, dtype="float32", served_name="bytes", log=log)
        yield runner.run(server.__aenter__()).url
        runner.run(server.__aexit__(None, None, None))


def strategies(*arguments: Any) -> int:
    return main(["strategies", *map(str, arguments), "--max-tokens", "3000"])


def records_of(work: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in work.read_bytes().split(b"\n")[:-1]]  # the last line may be incomplete
    return [line for line in lines if "reply" not in line]


def test_nonsense_is_refused_its_tokens_are_counted_and_it_is_retried(url: str, problems: Path, tmp_path: Path) -> None:
    work, library = tmp_path / "work.jsonl", tmp_path / "library.jsonl"
    arguments = ["extract", problems, "--work", work, "--library", library, "--url", url, "--model", "bytes"]
    for _ in range(2):
        main(["strategies", *map(str, arguments), "--candidates", "2", "--max-tokens", "80"])
    records = records_of(work)
    assert len(records) == 2 * ITEMS
    assert {record["failed"] for record in records} == {"no candidate is left (unreadable)"}
    details = {one["detail"] for record in records for one in record["rejected"]}
    assert details == {"the reply must be one JSON object, got none"}
    assert all(0 < record["completion_tokens"] <= 2 * 80 for record in records[:ITEMS])
    assert all(record["prompt_tokens"] > 2 * 800 for record in records[:ITEMS])  # a byte is a token
    assert {record["key"] for record in records[ITEMS:]} == {record["key"] for record in records[:ITEMS]}
    assert not library.exists()


def test_the_pipeline_runs_on_its_own_server_and_another_server_ranks_the_result(
    url: str, model: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, library, ranked = tmp_path / "work.jsonl", tmp_path / "library.jsonl", tmp_path / "ranked.parquet"
    own, others = ["--model", model, "--structured", *SERVE], of_sglang(os.getpid())
    assert strategies("extract", problems, "--work", work, "--library", library, *own) == 0
    assert f"{ITEMS} problems: {ITEMS} with a strategy" in capsys.readouterr().out
    assert of_sglang(os.getpid()) == others
    rows = [json.loads(line) for line in library.read_text().splitlines()]
    assert {row["problem"] for row in rows} == {f"What is {i} + 40?" for i in range(ITEMS)}
    records = {record["problem"]: record for record in records_of(work)}
    for row in rows:
        record = records[row["problem"]]
        assert row["strategy"] in record["candidates"]
        assert re.match(r"Problem type: .+\nStrategy: .+\nSteps:\n1\. .+\n2\. ", row["strategy"])
        assert (row["model"], row["endpoint"], row["judge_endpoint"]) == (str(model), "own SGLang", "own SGLang")
        assert len(record["scores"]) == len(record["candidates"])

    other = ["--model", "bytes", "--structured", "--url", url]
    assert strategies("rank", work, "--library", ranked, *other) == 0
    capsys.readouterr()
    assert strategies("check", library, ranked) == 0
    assert f"{2 * ITEMS} problems, {2 * ITEMS} with a strategy, 0 of which leak" in capsys.readouterr().out
    assert [p.problem for p in read_problems(str(ranked))] == [row["problem"] for row in rows]
    assert {record["judge"]["model"] for record in records_of(work)[ITEMS:]} == {"bytes"}
    assert strategies("stats", work) == 0
    replies = [json.loads(line)["reply"] for line in work.read_text().splitlines() if '"reply"' in line]
    sent, received = (sum(reply[name] for reply in replies) for name in ("prompt_tokens", "completion_tokens"))
    assert f"{sent:,} tokens sent, {received:,} received" in capsys.readouterr().out


def test_an_aborted_reply_is_requested_again(url: str) -> None:
    """The server returns it like a finished completion, but with another finish reason."""

    async def reply() -> str:
        async with Endpoint(Server(url=url, model="bytes", max_tokens=3000), backoff_s=0.1) as endpoint:
            chat = asyncio.create_task(endpoint.chat(Prompt("abc", {}), temperature=1.0, seed=0))
            while not endpoint.retries:
                assert not chat.done()
                await asyncio.to_thread(post, url.removesuffix("/v1"), "/abort_request", {"abort_all": True})
            return (await chat).text

    assert len(asyncio.run(reply())) > 500


@pytest.mark.parametrize("end", ["server dies", signal.SIGTERM, signal.SIGKILL])
def test_command_and_own_server_end_together(
    end: str | signal.Signals, model: Path, problems: Path, tmp_path: Path
) -> None:
    work, library = tmp_path / "work.jsonl", tmp_path / "library.jsonl"
    arguments = ["extract", problems, "--work", work, "--library", library, "--model", model, "--structured", *SERVE]
    command = [sys.executable, "-m", "sgpo_async.cli", "strategies", *map(str, arguments), "--concurrency", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        deadline = time.monotonic() + 300
        while not (work.exists() and records_of(work)):
            assert process.poll() is None and time.monotonic() < deadline, log_tail(work)
            time.sleep(0.1)
        own = of_sglang(process.pid)
        assert len(own) > 2  # watchdog, server, scheduler
        if isinstance(end, str):
            next(p for p in own if p.cmdline()[1:2] == [str(CPU_LAUNCHER)]).kill()
        else:
            process.send_signal(end)
        _, errors = process.communicate(timeout=240)
    assert psutil.wait_procs(own, timeout=120)[1] == []
    if isinstance(end, str):
        assert process.returncode == 2, errors
        assert "has ended; the end of" in errors
        assert "the server's main process ended: killed by SIGKILL" in errors
        assert "Traceback" not in errors and "never retrieved" not in errors
    else:
        assert process.returncode == (128 + end if end == signal.SIGTERM else -end), errors
    if end != signal.SIGKILL:
        finished = [record for record in records_of(work) if not record["failed"]]
        assert len(read_problems(str(library))) == len(finished) > 0


def of_sglang(command: int) -> set[psutil.Process]:
    """The processes of a command's server: watchdog, server and its children."""
    found = set()
    for process in psutil.Process(command).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            if str(CPU_LAUNCHER) in arguments or any("sglang::" in argument for argument in arguments):
                found.add(process)
    return found


def log_tail(work: Path) -> str:
    log = work.with_suffix(".sglang.log")
    return log.read_text()[-2000:] if log.exists() else "no server was launched"

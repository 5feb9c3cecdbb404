"""Strategy extraction through a real SGLang server's OpenAI interface: a tiny model of bytes that knows nothing.

Free to write, it writes nonsense, which is refused with its reason and paid for. Held to the form by SGLang's grammar,
it writes what can be read.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_support import PYTHON
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from sgpo_async.config.schema import Sglang
from sgpo_async.engines.sglang.launch import Launch
from sgpo_async.engines.sglang.process import ServerProcess
from sgpo_async.strategies import Endpoint, Journal, Pipeline, Server
from sgpo_async.tasks.base import Problem

pytestmark = pytest.mark.sglang

START_S = 180.0
PROBLEMS = [Problem(id=f"p{i}", problem=f"What is {i} + 4?", answer=str(i + 4), response="Add.") for i in range(3)]
WORDS = {"type": "string", "enum": ["sums", "parts", "rates"]}
STEPS = {"type": "array", "items": WORDS, "minItems": 2, "maxItems": 2}
FORM = {
    "type": "object",
    "properties": {
        "type": WORDS,
        "strategy": WORDS,
        "steps": {"type": "array", "items": WORDS, "minItems": 2, "maxItems": 2},
    },
    "required": ["type", "strategy", "steps"],
    "additionalProperties": False,
}


class WithTokenizer(Launch):
    """A server that reads and writes text."""

    def command(self, port: int) -> list[str]:
        return [word for word in super().command(port) if word != "--skip-tokenizer-init"]


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
        num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=vocabulary["<eos>"],
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    launch = WithTokenizer(
        settings=Sglang(python=PYTHON), model=str(model), dtype="float32", device="cpu", slots=16, longest=4096
    )
    log = tmp_path_factory.mktemp("log") / "server.log"
    process = ServerProcess(launch, log)
    try:
        deadline = time.monotonic() + START_S
        while not up(process.url):
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.3)
        yield f"{process.url}/v1"
    finally:
        process.stop()


def up(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/model_info", timeout=5).status == 200
    except OSError:
        return False


def extract(url: str, path: Path, *, tokens: int, extra: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    journal = Journal(path)

    async def run() -> None:
        server = Server(url=url, model="bytes", max_tokens=tokens, extra=extra)
        async with Endpoint(server) as endpoint:
            await Pipeline(endpoint, journal, candidates=2, concurrency=2).extract(PROBLEMS)

    asyncio.run(run())
    journal.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "reply" not in line]


def test_nonsense_is_refused_paid_for_and_tried_again(url: str, tmp_path: Path) -> None:
    records = extract(url, tmp_path / "work.jsonl", tokens=80)
    assert len(records) == len(PROBLEMS)
    assert {record["failed"] for record in records} == {"no candidate is left (unreadable)"}
    assert {one["detail"] for record in records for one in record["rejected"]} == {"not one JSON object"}
    assert all(0 < record["completion_tokens"] <= 2 * 80 for record in records)
    assert all(record["prompt_tokens"] > 2 * 800 for record in records)  # a byte is a token
    again = extract(url, tmp_path / "work.jsonl", tokens=80)
    assert [record["key"] for record in again[3:]] == [record["key"] for record in again[:3]]


def test_held_to_the_form_it_is_read(url: str, tmp_path: Path) -> None:
    extra = {"response_format": {"type": "json_schema", "json_schema": {"name": "strategy", "schema": FORM}}}
    records = extract(url, tmp_path / "work.jsonl", tokens=1000, extra=extra)  # most of them spaces
    kept = [text for record in records for text in record["candidates"]]
    assert kept, json.dumps(records[0])
    assert all(text.startswith("Problem type: ") for text in kept)
    # The ranking is held to the same form, so that its scores cannot be read.
    ranked = [record for record in records if record["candidates"]]
    assert all(record["failed"].startswith("ranking: the scores cannot be read") for record in ranked)

"""Tokens that end a completion: both those of the generation config and the tokenizer's, which SFT teaches."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from engines_models import digest, drain, weights

from sgpo_async.cli import machine
from sgpo_async.config import load
from sgpo_async.engines import EmbeddedEngine
from sgpo_async.engines.base import Generate, Weights
from sgpo_async.engines.sglang.weight_sync.model_facts import model_facts
from sgpo_async.errors import CheckWarning
from sgpo_async.learner.process_group import join_alone
from sgpo_async.learner.sft import Examples
from sgpo_async.learner.train import build
from sgpo_async.model.folder import model_folder
from sgpo_async.model.load import load_model

CUES = model_folder("builtin:cues")
EOS, OTHER = 1, 2


def folder_with(folder: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None = None) -> str:
    """The built-in model with another generation config (None: without one) and other keys in config.json."""
    shutil.copytree(CUES, folder)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    whole = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(whole))
    return str(folder)


CASES = [
    ({"eos_token_id": OTHER}, {}, {EOS, OTHER}),
    ({"eos_token_id": [OTHER, 3]}, {}, {EOS, OTHER, 3}),
    ({"eos_token_id": [OTHER, EOS]}, {}, {EOS, OTHER}),
    ({"eos_token_id": EOS}, {}, {EOS}),
    (None, {"eos_token_id": OTHER}, {EOS, OTHER}),
    (None, {"eos_token_id": None}, {EOS}),
]


@pytest.mark.parametrize(("generation", "config", "ends"), CASES)
def test_generation_stops_at_the_end_token_that_sft_teaches(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], ends: set[int]
) -> None:
    folder = folder_with(tmp_path / "model", generation, config)
    facts = model_facts(folder, dtype="float32", tp=1, device="cpu", digest=digest)
    assert facts.ends == ends
    run = load("", [f"model.path={folder}", "sft.problems=20"])
    taught = {int(tokens.completion[-1]) for tokens in Examples.read(run).training}
    assert taught == {EOS}

    engine = EmbeddedEngine.from_pretrained(folder, digest=digest, slots=16, device="cpu")
    tensors = weights(load_model(CUES, device="cpu", dtype="float32"))
    engine.load(Weights(version=0, digest=digest(tensors.items()), read=tensors.copy))
    prompts = [tokens.prompt for tokens in Examples.read(run).training][:16]
    requests = [
        Generate(id=i, prompt=prompt, max_new_tokens=64, temperature=1.0, seed=i) for i, prompt in enumerate(prompts)
    ]
    results = drain(engine, requests)
    assert len(results) == 16
    assert all(len(one.tokens) < 64 and one.tokens[-1] in ends for one in results.values())


@pytest.fixture
def one_rank() -> Iterator[Any]:
    yield join_alone()
    dist.destroy_process_group()


@pytest.mark.parametrize(("generation", "config", "ends"), CASES)
def test_two_end_tokens_are_a_warning_of_the_doctor_and_in_the_learner_s_log(
    tmp_path: Path, generation: Any, config: Any, ends: Any, one_rank: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_with(tmp_path / "model", generation, config)
    facts = model_facts(folder, dtype="float32", tp=1, device="cpu", digest=digest)
    run = load("", [f"model.path={folder}"])
    expected = (generation or config)["eos_token_id"] not in (EOS, [OTHER, EOS], None)
    with caplog.at_level(logging.WARNING):
        build(run, one_rank)
    text = r"the tokenizer ends with '<eos>' \(1\), the model's generation config with '<unk>' \(2\)"
    if expected:
        with pytest.raises(CheckWarning, match=text):
            machine.tokenizer(run, facts)
    else:
        machine.tokenizer(run, facts)
    assert [record.levelname for record in caplog.records if "end" in record.message] == ["WARNING"] * expected


def test_a_model_without_a_tokenizer_keeps_its_own_end_tokens(tmp_path: Path) -> None:
    folder = Path(folder_with(tmp_path / "model", {"eos_token_id": OTHER}))
    (folder / "tokenizer.json").unlink()
    assert model_facts(str(folder), dtype="float32", tp=1, device="cpu", digest=digest).ends == {OTHER}

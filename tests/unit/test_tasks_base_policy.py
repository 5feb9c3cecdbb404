"""The shipped base policy, its tokenizer, and prompts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sgpo_async.tasks
from sgpo_async.config import Tasks
from sgpo_async.errors import DataError
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.cues_domain import TRUE_TECHNIQUE
from sgpo_async.tasks.cues_policy import VOCABULARY, guess_probabilities
from sgpo_async.tasks.pretrain import pass_rate
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.word_policy import word_tokenizer

FOLDER = Path(sgpo_async.tasks.__file__).parent / "cues_base"
PROBLEMS = list(CuesSource(seed=11, held_out=200).held_out())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_with_a_strategy_the_policy_solves_nearly_all_problems(model: Any, tokenizer: Any) -> None:
    assert pass_rate(model, tokenizer, PROBLEMS, guided=True) >= 0.95


def test_without_a_strategy_the_policy_solves_few_problems(model: Any, tokenizer: Any) -> None:
    assert pass_rate(model, tokenizer, PROBLEMS, guided=False) <= 0.06
    assert pass_rate(model, tokenizer, PROBLEMS, guided=False, sample=False) <= 0.06


def test_the_folder_of_the_base_policy_is_below_4_mb() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4e6


def test_texts_are_unchanged_by_encoding_and_decoding(tokenizer: Any) -> None:
    for problem in PROBLEMS:
        for text in (problem.problem, problem.strategy, problem.response):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_the_shipped_tokenizer_equals_the_tokenizer_that_the_code_builds(tokenizer: Any) -> None:
    assert tokenizer.get_vocab() == word_tokenizer(VOCABULARY).get_vocab()
    assert tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None


def test_guesses_prefer_a_wrong_technique_and_give_the_true_one_over_37_percent() -> None:
    for cue, true in TRUE_TECHNIQUE.items():
        guess = guess_probabilities(cue, p_true=0.44, p_favourite=0.50)
        assert sum(guess.values()) == pytest.approx(1.0)
        assert max(guess, key=guess.__getitem__) != true
        assert guess[true] > 0.37


def test_a_plain_prompt_puts_the_strategy_before_the_problem(tokenizer: Any) -> None:
    problem = PROBLEMS[0]
    plain = build_prompt(problem.problem, None, tasks=Tasks(), tokenizer=tokenizer)
    guided = build_prompt(problem.problem, problem.strategy, tasks=Tasks(), tokenizer=tokenizer)
    assert tokenizer.decode(plain) == problem.problem
    assert tokenizer.decode(guided) == f"{problem.strategy} {problem.problem}"


def test_a_chat_prompt_uses_the_chat_template() -> None:
    tokenizer = word_tokenizer(VOCABULARY)
    with pytest.raises(DataError, match="no chat template"):
        build_prompt("problem", None, tasks=Tasks(prompt="chat"), tokenizer=tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} from{% endif %}"
    )
    plain = build_prompt("problem amber", None, tasks=Tasks(prompt="chat"), tokenizer=tokenizer)
    guided = build_prompt("problem amber", "strategy amber raise", tasks=Tasks(prompt="chat"), tokenizer=tokenizer)
    assert tokenizer.decode(plain) == "problem amber from"
    known = [word for word in tokenizer.decode(guided).split() if word != "<unk>"]
    assert known == ["problem", "strategy", "amber", "raise", "problem", "amber", "from"]

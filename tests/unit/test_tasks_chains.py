"""The chains domain: its words, texts, verifier and source, and what its base policy is trained on."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.config.experiment import PRETRAINING, Base, Domain
from sgpo_async.config.schema import Context, Tasks
from sgpo_async.errors import DataError
from sgpo_async.model.folder import model_folder
from sgpo_async.tasks import cues_policy
from sgpo_async.tasks.chains import ChainsSource
from sgpo_async.tasks.chains_domain import (
    DIGITS,
    FAMILIAR,
    MARKS,
    MEANINGS,
    PEOPLE,
    TRUE_MEANING,
    UNFAMILIAR,
    WORDS,
    Meaning,
    Sentence,
    Story,
)
from sgpo_async.tasks.chains_policy import VOCABULARY, draw_example, guess_probabilities
from sgpo_async.tasks.contexts import ContextSource
from sgpo_async.tasks.cues_domain import Exercise
from sgpo_async.tasks.pretrain import SPECIFICATIONS, Recipe, pretrain
from sgpo_async.tasks.sources import GENERATED
from sgpo_async.tasks.verify import INLINE, VERIFIERS
from sgpo_async.tasks.word_policy import KINDS, LONGEST, word_tokenizer

positions = st.integers(min_value=0, max_value=10**9)
SOURCE = ChainsSource(seed=3, held_out=40)
STORY = Story(
    known={"ann": 3, "bob": 8},
    sentences=(
        Sentence("cat", "near", ("ann", "bob"), 2),
        Sentence("dan", "under", ("cat", "ann"), 4),
        Sentence("eve", "past", ("bob", "dan"), 1),
    ),
)


def test_every_meaning_has_one_familiar_word_and_two_to_be_learned() -> None:
    assert len(set(WORDS)) == 24
    assert Counter(TRUE_MEANING[word] for word in FAMILIAR) == dict.fromkeys(MEANINGS, 1)
    assert Counter(TRUE_MEANING[word] for word in UNFAMILIAR) == dict.fromkeys(MEANINGS, 2)


@given(positions)
def test_problems_have_no_familiar_word(position: int) -> None:
    assert not set(SOURCE.training(position).problem.split()) & set(FAMILIAR)


def test_the_texts_equal_an_example_worked_out_by_hand() -> None:
    plan = (Meaning("richer", "minus"), Meaning("second", "plus"), Meaning("poorer", "plus"))
    assert STORY.problem_text() == (
        "story ann 3 bob 8 ; cat near ann bob 2 ; dan under cat ann 4 ; eve past bob dan 1 ; ask dan eve"
    )
    # cat: the richer of 3 and 8, minus 2. dan: the second, ann, plus 4. eve: the poorer of bob's 8 and dan's 7, plus 1.
    assert STORY.solution_text(plan) == (
        "cat near ann 3 bob 8 bob minus 2 6 dan under cat 6 ann 3 ann plus 4 7 "
        "eve past bob 8 dan 7 dan plus 1 8 answer 7 8"
    )
    assert STORY.solution_text(plan, mark="planned", hence=True).split()[0] == "planned"
    assert STORY.strategy_text(plan) == "plan cat bob minus dan ann plus eve dan plus"
    assert STORY.answer_text(plan) == "7 8"


def test_amounts_are_modulo_ten_and_of_equals_the_first_is_meant() -> None:
    story = Story(known={"ann": 1, "bob": 1}, sentences=(Sentence("cat", "near", ("bob", "ann"), 3),))
    for rule in ("richer", "poorer", "first"):
        assert story.solution_text([Meaning(rule, "minus")]) == "cat near bob 1 ann 1 bob minus 3 8 answer 8"
    assert story.solution_text([Meaning("second", "plus")]) == "cat near bob 1 ann 1 ann plus 3 4 answer 4"


@given(positions)
def test_a_strategy_names_people_and_signs_and_no_number(position: int) -> None:
    problem = SOURCE.training(position)
    assert problem.strategy is not None
    assert set(problem.strategy.split()) <= {"plan", "plus", "minus", *PEOPLE}
    assert not set(problem.problem.split()) & {"plus", "minus"}


@given(positions)
def test_training_is_reproducible_and_its_responses_are_correct(position: int) -> None:
    problem = SOURCE.training(position)
    assert problem == ChainsSource(seed=3, held_out=0).training(position)
    assert problem.problem not in {held_out.problem for held_out in SOURCE.held_out()}
    assert problem.response is not None
    assert VERIFIERS["chains"](problem.answer, problem.response)


@given(positions, st.sampled_from(["answer 5", "answer", "", "5 5", "hence"]), st.integers(1, 9))
def test_only_the_right_answer_at_the_end_is_correct(position: int, end: str, shift: int) -> None:
    problem = SOURCE.training(position)
    x, y = problem.answer.split()
    assert VERIFIERS["chains"](problem.answer, f"whatever answer {x} {y}")
    assert not VERIFIERS["chains"](problem.answer, f"answer {x} {(int(y) + shift) % 10}")
    assert not VERIFIERS["chains"](problem.answer, f"answer {x} {y} {end or '0'}")
    assert not VERIFIERS["chains"](problem.answer, f"{x} {y}")


def test_sources_of_all_seeds_hold_out_the_same_problems() -> None:
    assert SOURCE.held_out() == ChainsSource(seed=4, held_out=40).held_out()
    assert len({problem.problem for problem in SOURCE.held_out()}) == 40
    assert {problem.problem.count(";") for problem in SOURCE.held_out()} == {3, 4}


@pytest.mark.parametrize("word", UNFAMILIAR)
def test_the_favourite_guess_differs_in_the_sign_and_the_true_one_is_second(word: str) -> None:
    guess = guess_probabilities(word, p_true=0.4, p_favourite=0.54)
    favourite, second = sorted(guess, key=lambda meaning: guess[meaning], reverse=True)[:2]
    assert sum(guess.values()) == pytest.approx(1.0)
    assert second == TRUE_MEANING[word]
    assert favourite.sign != second.sign
    assert favourite.rule != second.rule


def test_examples_of_all_contexts_fit_the_model_and_its_vocabulary() -> None:
    rng, tokenizer = random.Random(0), word_tokenizer(VOCABULARY)
    begins: Counter[str] = Counter()
    for _ in range(2000):
        prompt, solution = draw_example(rng, 1.0, contexts=True, p_true=0.4, p_favourite=0.54)
        ids = tokenizer.encode(f"{prompt} {solution}", add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert len(ids) < LONGEST
        begins[solution.split()[0]] += 1
    marked = sum(begins[mark] for mark in set(MARKS.values()))
    assert marked / 2000 == pytest.approx(0.5 * (1 - KINDS["none"]), abs=0.05)


def test_without_contexts_half_of_the_examples_have_a_strategy() -> None:
    rng = random.Random(0)
    prompts = [draw_example(rng, 1.0, p_true=0.4, p_favourite=0.54)[0] for _ in range(1000)]
    assert sum(prompt.startswith("plan ") for prompt in prompts) / 1000 == pytest.approx(0.5, abs=0.06)
    assert all(prompt.startswith(("plan ", "story ")) for prompt in prompts)


def test_guesses_have_their_probabilities_in_unguided_examples() -> None:
    # The sign of a sentence follows from the guess alone: the true one has 0.40 and half of what is left.
    rng, right, of = random.Random(1), 0, 0
    for _ in range(3000):
        prompt, solution = draw_example(rng, 1.0, p_true=0.4, p_favourite=0.54)
        if not prompt.startswith("story "):
            continue
        words = [words.split()[1] for words in prompt.split(" ; ")[1:-1]]
        signs = re.findall(r"plus|minus", solution)
        agree = [(word, TRUE_MEANING[word].sign == sign) for word, sign in zip(words, signs, strict=True)]
        assert all(same for word, same in agree if word in FAMILIAR)
        right += sum(same for word, same in agree if word in UNFAMILIAR)
        of += sum(word in UNFAMILIAR for word in words)
    assert right / of == pytest.approx(0.40 + 0.06 / 2, abs=0.02)


@pytest.mark.parametrize("context", ["strategy", "response", "partial-response", "answer", "other-strategy"])
def test_every_context_of_a_problem_leaves_room_for_a_completion(context: Context) -> None:
    source = SOURCE if context == "strategy" else ContextSource(SOURCE, context)
    for problem in (source.training(position) for position in range(100)):
        prompt = f"{problem.strategy} {problem.problem}".split()
        assert set(prompt) <= set(VOCABULARY)
        assert len(prompt) + 48 < LONGEST


@pytest.mark.parametrize("domain", ["cues", "chains"])
def test_the_plan_of_an_example_agrees_with_its_context(domain: Domain) -> None:
    """What the beginning of a solution, or the answer, tells is so in the solution that is trained."""
    rng, draw, kinds = random.Random(2), SPECIFICATIONS[domain].draw_example, Counter[str]()
    begins = {"cues": "problem", "chains": "story"}[domain]
    for _ in range(3000):
        prompt, solution = draw(rng, rng.random(), contexts=True, p_true=0.4, p_favourite=0.5)
        words = [word for word in solution.split() if word not in MARKS.values()]
        before = prompt.split()[: prompt.split().index(begins)]
        if not before or before[0] in ("strategy", "plan"):
            continue
        if set(before) <= set(DIGITS):
            kinds["answer"] += 1
            told = (
                re.findall(r"[a-z]+ (\d) (\d)(?= |$)", solution)
                if domain == "cues"
                else [words[words.index("answer") + 1 :]]
            )
            assert [digit for pair in told for digit in pair] == before
        elif "answer" not in before[:-2] and len(before) < len(words) / 2:
            kinds["beginning"] += 1
            decided = (Story if domain == "chains" else Exercise).decided_after
            assert before[:decided] == words[: min(len(before), decided)]
    assert min(kinds["answer"], kinds["beginning"]) > 100


def test_a_policy_of_another_domain_is_no_start(tmp_path: Path) -> None:
    recipe = Recipe(**Base(domain="chains", contexts=True).pretraining)
    with pytest.raises(DataError, match="has another vocabulary than the domain chains; start from a policy of it"):
        pretrain(recipe, out=tmp_path / "never", start=model_folder("builtin:cues"))


def test_the_random_numbers_of_the_shipped_policy_have_not_changed() -> None:
    """Digest of the first examples that builtin:cues was trained on, by the code that made it."""
    rng, text = random.Random(7), ""
    for number in range(300):
        text += "|".join(cues_policy.draw_example(rng, number / 300, p_true=0.44, p_favourite=0.50)) + "\n"
    assert xxhash.xxh64(text.encode()).hexdigest() == "67aa6dcd71c93876"


def test_the_places_that_list_the_domains_agree() -> None:
    domains = set(get_args(Domain))
    assert domains == set(GENERATED) == set(SPECIFICATIONS) == set(PRETRAINING) == set(INLINE)
    assert {*domains, "file"} == set(get_args(get_type_hints(Tasks)["source"]))

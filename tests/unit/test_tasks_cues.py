"""The cues domain: its facts, texts, verifier and source."""

import re
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.cues_domain import (
    CUES,
    DIGITS,
    NOVEL_PAIRS,
    STEPS,
    TECHNIQUES,
    TRUE_TECHNIQUE,
    Exercise,
)
from sgpo_async.tasks.verify import VERIFIERS

positions = st.integers(min_value=0, max_value=10**9)
SOURCE = CuesSource(seed=3, held_out=40)


def cues_of(text: str) -> list[str]:
    return [word for word in text.split() if word in CUES]


def test_every_technique_has_nine_of_36_cues() -> None:
    assert len(set(CUES)) == 36
    assert sorted(TRUE_TECHNIQUE.values()) == sorted(list(TECHNIQUES) * 9)


def test_states_and_solution_text_equal_an_example_worked_out_by_hand() -> None:
    exercise = Exercise(amounts=(3, 1, 4, 2), cues=("amber", "birch", "cedar", "delta"), start=(4, 7))
    techniques = ("raise", "swap", "both", "lower")
    # (4,7) raise 3 (4,0); swap 1: (9-0, 4+1) = (9,5); both 4: (3,9); lower 2: (3,7)
    assert exercise.states(techniques) == [(4, 0), (9, 5), (3, 9), (3, 7)]
    assert exercise.solution_text(techniques) == (
        "3 amber raise 4 0 1 birch swap 9 5 4 cedar both 3 9 2 delta lower 3 7"
    )


@given(positions)
def test_a_strategy_names_techniques_and_no_number(position: int) -> None:
    problem = SOURCE.training(position)
    assert problem.strategy is not None
    assert not re.search(r"\d", problem.strategy)
    assert cues_of(problem.strategy) == cues_of(problem.problem)
    assert [w for w in problem.strategy.split() if w in TECHNIQUES] == [
        TRUE_TECHNIQUE[cue] for cue in cues_of(problem.problem)
    ]


@given(positions)
def test_a_problem_names_no_technique(position: int) -> None:
    assert not set(SOURCE.training(position).problem.split()) & set(TECHNIQUES)


@given(positions)
def test_training_is_reproducible_and_contains_no_novel_pair(position: int) -> None:
    problem = SOURCE.training(position)
    assert problem == CuesSource(seed=3, held_out=0).training(position)
    assert problem.problem not in {held_out.problem for held_out in SOURCE.held_out()}
    cues = cues_of(problem.problem)
    assert len(set(cues)) == STEPS
    assert not set(pairwise(cues)) & NOVEL_PAIRS


def test_half_of_the_held_out_problems_have_a_novel_pair() -> None:
    novel = 0
    for problem in SOURCE.held_out():
        cues = cues_of(problem.problem)
        novel += bool(set(pairwise(cues)) & NOVEL_PAIRS)
    assert novel == 20
    assert len({problem.problem for problem in SOURCE.held_out()}) == 40


def test_sources_of_other_seeds_differ() -> None:
    assert SOURCE.training(0).problem != CuesSource(seed=4, held_out=0).training(0).problem


def test_sources_of_all_seeds_hold_out_the_same_problems() -> None:
    assert SOURCE.held_out() == CuesSource(seed=4, held_out=40).held_out()


@given(positions)
def test_the_response_is_correct(position: int) -> None:
    problem = SOURCE.training(position)
    assert problem.response is not None
    assert VERIFIERS["cues"](problem.answer, problem.response)


@given(positions, st.integers(0, STEPS - 1), st.integers(3, 4), st.integers(1, 9))
def test_one_wrong_digit_in_any_state_makes_a_completion_incorrect(
    position: int, step: int, slot: int, shift: int
) -> None:
    problem = SOURCE.training(position)
    words = problem.response.split()  # type: ignore[union-attr]
    words[5 * step + slot] = str((int(words[5 * step + slot]) + shift) % 10)
    assert not VERIFIERS["cues"](problem.answer, " ".join(words))


@given(positions, st.integers(0, 5 * STEPS - 1), st.sampled_from(["", "<eos>", "12", "from", "3 4"]))
def test_malformed_completions_are_incorrect(position: int, at: int, word: str) -> None:
    problem = SOURCE.training(position)
    assert problem.response is not None
    words = problem.response.split()
    assert not VERIFIERS["cues"](problem.answer, " ".join([*words[:at], word, *words[at + 1 :]]))
    assert not VERIFIERS["cues"](problem.answer, " ".join(words[:at]))
    assert not VERIFIERS["cues"](problem.answer, problem.response + " " + DIGITS[at % 10])


def test_a_completion_that_contains_only_states_is_incorrect() -> None:
    problem = SOURCE.training(0)
    assert not VERIFIERS["cues"](problem.answer, problem.answer)


@pytest.mark.parametrize("module", ["sources", "verify", "prompts", "reward_pool", "reward_worker"])
def test_importing_a_task_module_does_not_import_torch(module: str) -> None:
    code = f"import sys, sgpo_async.tasks.{module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=True, timeout=240, capture_output=True).stdout == b"set()\n"

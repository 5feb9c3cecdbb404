"""Numeric answers within a tolerance t, in cases worked out by hand: correct if |answer - found| <= 1.01 t."""

import pytest

from sgpo_async.tasks.reward_pool import RewardPool
from sgpo_async.tasks.rewards import Sample
from sgpo_async.tasks.tolerance import Tolerant
from sgpo_async.tasks.verify import VERIFIERS


def tolerant(*parts: tuple[str, float | None]) -> str:
    return Tolerant(answer=", ".join(part for part, _ in parts), parts=parts).to_text()


def is_correct(completion: str, *parts: tuple[str, float | None]) -> bool:
    return VERIFIERS["math-tolerance"](tolerant(*parts), f"so it is \\boxed{{{completion}}}")


@pytest.mark.parametrize(
    ("answer", "tolerance", "completion", "correct"),
    [
        ("79.67", 0.1, "79.67", True),
        ("79.67", 0.1, "79.58", True),  # 0.09
        ("79.67", 0.1, "79.57", True),  # 0.1, plus a rounding error
        ("79.67", 0.1, "79.771", True),  # exactly 1.01 t
        ("79.67", 0.1, "79.772", False),
        ("79.67", None, "79.66", False),
        ("3.14", 0.01, "\\pi", True),  # 0.0016
        ("3.14", 0.001, "\\pi", False),
        ("3.14", 0.01, "\\frac{22}{7}", True),  # 0.0029
        ("\\sqrt{2}", 0.01, "1.41", True),  # 0.0042
        ("1,234", 2, "1233", True),
        ("10^6", 10, "1000005", True),
        ("0", 0.1, "-0.1", True),
        ("3.2", 0.1, "3.25 \\text{ cm}", True),  # units are ignored
        ("3.2", 0.1, "x = 3.25", True),
        ("x = 3.2", 0.1, "3.25", True),
        ("x = 3.2", 0.1, "x = 3.25", True),
        ("x = 3.2", 0.1, "y = 3.25", False),
        ("3.2", 0.1, "3.2, 3.25", False),  # two answers instead of one
        ("3.2", 1, "3.2 + 0.01i", False),
        ("3.2", 1, "\\infty", False),
        ("\\infty", 1, "\\infty", True),
        ("3.2", 1, "\\frac{1}{0}", False),
        ("x + 1", 0.1, "1 + x", True),  # not numbers: the tolerance is ignored
        ("x + 1", 0.1, "x + 1.05", False),
        ("B", 5, "C", False),
    ],
)
def test_a_number_within_the_tolerance_is_correct(
    answer: str, tolerance: float | None, completion: str, correct: bool
) -> None:
    assert is_correct(completion, (answer, tolerance)) is correct


@pytest.mark.parametrize(
    ("answer", "tolerance", "completion", "correct"),
    [
        ("50\\%", 1, "49.5\\%", True),
        ("50\\%", 1, "48.5\\%", False),
        ("50\\%", 1, "0.495", True),
        ("50\\%", 1, "0.45", False),  # five percentage points off, although 0.05 is less than 1
        ("50", 1, "49.5\\%", True),  # the answer's % sign is in another column
        ("0.5", 0.01, "49.5\\%", True),
        ("0.5", 0.01, "48\\%", False),
    ],
)
def test_a_percentage_is_compared_on_the_answers_scale(
    answer: str, tolerance: float, completion: str, correct: bool
) -> None:
    assert is_correct(completion, (answer, tolerance)) is correct


@pytest.mark.parametrize(
    ("answer", "completion", "correct"),
    [
        ("(1, 2.5)", "(1.05, 2.45)", True),
        ("(1, 2.5)", "(1.05, 2.35)", False),
        ("(5, 2.5)", "(5.05, 2.45)", True),  # a point: the order matters
        ("(5, 2.5)", "(2.45, 5.05)", False),
        ("(2.5, 2.52)", "(2.53, 2.5)", True),  # answer read as an interval, completion as a point
        ("[1, 2.5)", "[1.05, 2.45)", True),
        ("[1, 2.5)", "(1.05, 2.45)", False),
        ("(1, 2, 3)", "(1, 2, 3.05)", True),
        ("(1, 2, 3)", "(1, 2)", False),
        ("(-\\infty, 3)", "(-\\infty, 3.05)", True),
    ],
)
def test_tuples_and_intervals_are_compared_element_by_element(answer: str, completion: str, correct: bool) -> None:
    assert is_correct(completion, (answer, 0.1)) is correct


def test_several_answers_are_accepted_in_any_order_each_within_its_own_tolerance() -> None:
    both = ("3.5", 0.1), ("4.5", None)
    assert is_correct("4.5, 3.45", *both)
    assert is_correct("(3.45, 4.5)", *both)  # all answers in one pair of parentheses
    assert not is_correct("4.45, 3.5", *both)
    assert not is_correct("3.45", *both)
    assert is_correct("2.55, 3.45", ("3 \\pm 0.5", 0.1))
    assert is_correct("(2.05, 1), (1, 1.95)", ("(1, 2)", 0.1), ("(2, 1)", 0.1))


def test_answers_with_overlapping_tolerances_are_matched_if_a_matching_exists() -> None:
    wide, narrow = ("1.0", 0.3), ("1.2", 0.1)
    assert is_correct("1.15, 0.8", wide, narrow)  # 1.15 is within both tolerances; 0.8 is only within that of 1.0
    assert is_correct("1.1, 0.8, 1.4", ("1.0", 0.3), ("1.2", 0.3), ("1.1", 0.02))
    assert not is_correct("1.15, 1.6", wide, narrow)


def test_a_completion_without_an_answer_is_incorrect() -> None:
    assert not VERIFIERS["math-tolerance"](tolerant(("3.5", 0.1)), "")
    assert not VERIFIERS["math-tolerance"](tolerant(("3.5", 0.1)), "I do not know.")


@pytest.mark.process
def test_the_reward_pool_applies_tolerances() -> None:
    pool = RewardPool(workers=1, limit_s=60.0)
    try:
        pool.submit("near", "math-tolerance", Sample(answer=tolerant(("3.5", 0.1)), completion="\\boxed{3.45}"))
        pool.submit("far", "math-tolerance", Sample(answer=tolerant(("3.5", 0.1)), completion="\\boxed{3.3}"))
        verdicts = pool.poll(timeout_s=120.0)
        if len(verdicts) == 1:
            verdicts += pool.poll(timeout_s=120.0)
        assert {verdict.key: verdict.reward for verdict in verdicts} == {"near": 1.0, "far": 0.0}
    finally:
        pool.close()

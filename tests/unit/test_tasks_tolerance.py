"""Numeric answers within a tolerance, against cases worked out by hand: |answer - found| <= 1.01 t."""

import pytest

from sgpo_async.tasks.reward_pool import RewardPool
from sgpo_async.tasks.tolerance import Tolerant
from sgpo_async.tasks.verify import VERIFIERS


def tolerant(*parts: tuple[str, float | None]) -> str:
    return Tolerant(answer=", ".join(part for part, _ in parts), parts=parts).to_text()


def judged(completion: str, *parts: tuple[str, float | None]) -> bool:
    return VERIFIERS["math-tolerance"](tolerant(*parts), f"so it is \\boxed{{{completion}}}")


@pytest.mark.parametrize(
    ("answer", "tolerance", "completion", "correct"),
    [
        ("79.67", 0.1, "79.67", True),
        ("79.67", 0.1, "79.58", True),  # 0.09
        ("79.67", 0.1, "79.57", True),  # 0.1, but for what floating point adds
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
        ("3.2", 0.1, "3.25 \\text{ cm}", True),  # units are ignored, as ever
        ("3.2", 0.1, "x = 3.25", True),
        ("x = 3.2", 0.1, "3.25", True),
        ("x = 3.2", 0.1, "x = 3.25", True),
        ("x = 3.2", 0.1, "y = 3.25", False),
        ("3.2", 0.1, "3.2, 3.25", False),  # one answer was asked for
        ("3.2", 1, "3.2 + 0.01i", False),
        ("3.2", 1, "\\infty", False),
        ("\\infty", 1, "\\infty", True),
        ("3.2", 1, "\\frac{1}{0}", False),
        ("x + 1", 0.1, "1 + x", True),  # not numbers: as without a tolerance
        ("x + 1", 0.1, "x + 1.05", False),
        ("B", 5, "C", False),
    ],
)
def test_a_number(answer: str, tolerance: float | None, completion: str, correct: bool) -> None:
    assert judged(completion, (answer, tolerance)) is correct


@pytest.mark.parametrize(
    ("answer", "tolerance", "completion", "correct"),
    [
        ("50\\%", 1, "49.5\\%", True),
        ("50\\%", 1, "48.5\\%", False),
        ("50\\%", 1, "0.495", True),
        ("50\\%", 1, "0.45", False),  # five points off, though 0.05 is less than 1
        ("50", 1, "49.5\\%", True),  # the answer's unit stands in another column
        ("0.5", 0.01, "49.5\\%", True),
        ("0.5", 0.01, "48\\%", False),
    ],
)
def test_a_percentage_is_compared_on_the_answers_scale(
    answer: str, tolerance: float, completion: str, correct: bool
) -> None:
    assert judged(completion, (answer, tolerance)) is correct


@pytest.mark.parametrize(
    ("answer", "completion", "correct"),
    [
        ("(1, 2.5)", "(1.05, 2.45)", True),
        ("(1, 2.5)", "(1.05, 2.35)", False),
        ("(5, 2.5)", "(5.05, 2.45)", True),  # a point, in this order
        ("(5, 2.5)", "(2.45, 5.05)", False),
        ("(2.5, 2.52)", "(2.53, 2.5)", True),  # read as an interval there, as a point here
        ("[1, 2.5)", "[1.05, 2.45)", True),
        ("[1, 2.5)", "(1.05, 2.45)", False),
        ("(1, 2, 3)", "(1, 2, 3.05)", True),
        ("(1, 2, 3)", "(1, 2)", False),
        ("(-\\infty, 3)", "(-\\infty, 3.05)", True),
    ],
)
def test_tuples_and_intervals_element_by_element(answer: str, completion: str, correct: bool) -> None:
    assert judged(completion, (answer, 0.1)) is correct


def test_several_answers_in_any_order_each_with_its_tolerance() -> None:
    both = ("3.5", 0.1), ("4.5", None)
    assert judged("4.5, 3.45", *both)
    assert judged("(3.45, 4.5)", *both)  # parentheses around all of them, as without a tolerance
    assert not judged("4.45, 3.5", *both)
    assert not judged("3.45", *both)
    assert judged("2.55, 3.45", ("3 \\pm 0.5", 0.1))
    assert judged("(2.05, 1), (1, 1.95)", ("(1, 2)", 0.1), ("(2, 1)", 0.1))


def test_overlapping_tolerances_find_the_pairs_that_exist() -> None:
    wide, narrow = ("1.0", 0.3), ("1.2", 0.1)
    assert judged("1.15, 0.8", wide, narrow)  # 1.15 is near both, and only 1.2 can have it
    assert judged("1.1, 0.8, 1.4", ("1.0", 0.3), ("1.2", 0.3), ("1.1", 0.02))
    assert not judged("1.15, 1.6", wide, narrow)


def test_a_completion_without_an_answer_is_incorrect() -> None:
    assert not VERIFIERS["math-tolerance"](tolerant(("3.5", 0.1)), "")
    assert not VERIFIERS["math-tolerance"](tolerant(("3.5", 0.1)), "I do not know.")


@pytest.mark.process
def test_the_pool_judges_within_tolerances() -> None:
    pool = RewardPool(workers=1, limit_s=60.0)
    try:
        pool.submit("near", "math-tolerance", tolerant(("3.5", 0.1)), "\\boxed{3.45}")
        pool.submit("far", "math-tolerance", tolerant(("3.5", 0.1)), "\\boxed{3.3}")
        verdicts = pool.poll(timeout_s=120.0) + pool.poll(timeout_s=120.0)
        assert {verdict.key: verdict.correct for verdict in verdicts} == {"near": True, "far": False}
    finally:
        pool.close()

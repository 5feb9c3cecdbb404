"""avg@k, pass@k, bootstrap and the paired test, compared with values by hand, enumeration and simulation."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from sgpo_async.metrics.paired import compare, sign_flip
from sgpo_async.metrics.pass_rates import avg_at, interval, pass_at, powers_of_two, share_interval


def array(*values: int) -> np.ndarray:
    return np.array(values)


def test_avg_at_is_the_share_of_correct_samples() -> None:
    assert avg_at(array(0, 1, 4), array(4, 4, 4)).tolist() == [0, 0.25, 1]
    assert avg_at(array(1, 1), array(2, 8)).tolist() == [0.5, 0.125]


def test_pass_at_equals_values_computed_by_hand() -> None:
    """n = 4: for c = 1, 3 of the 6 pairs of samples contain the correct sample; for c = 2, 5 pairs contain one."""
    assert pass_at(array(0, 1, 2, 3, 4), array(4, 4, 4, 4, 4), 2) == pytest.approx([0, 1 / 2, 5 / 6, 1, 1])
    assert pass_at(array(3), array(10), 1)[0] == pytest.approx(0.3)


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_equals_enumeration_of_all_choices_of_k(samples: int) -> None:
    for correct, k in product(range(samples + 1), range(1, samples + 1)):
        verdicts = [i < correct for i in range(samples)]
        choices = list(combinations(verdicts, k))
        expected = sum(any(choice) for choice in choices) / len(choices)
        assert pass_at(array(correct), array(samples), k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_is_unbiased() -> None:
    """Its expectation over the binomial distribution of c is 1 - (1 - p)^k."""
    p, n, k = 0.3, 6, 3
    estimates = pass_at(np.arange(n + 1), np.full(n + 1, n), k)
    weights = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert np.dot(estimates, weights) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_one_is_avg_and_many_samples_do_not_overflow() -> None:
    correct, samples = array(0, 7, 500, 1000), np.full(4, 1000)
    assert pass_at(correct, samples, 1) == pytest.approx(avg_at(correct, samples))
    assert np.isfinite(pass_at(correct, samples, 512)).all()


def test_powers_of_two_up_to_the_limit() -> None:
    assert [powers_of_two(limit) for limit in (1, 4, 7, 32)] == [[1], [1, 2, 4], [1, 2, 4], [1, 2, 4, 8, 16, 32]]


def test_the_interval_of_two_problems_comes_from_all_four_resamples() -> None:
    """Means 0, 1/2, 1/2, 1 with equal probability: the quantiles at 2.5 % and 97.5 % are 0 and 1."""
    found = interval(np.array([0.0, 1.0]))
    assert found is not None and (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    narrow = interval(np.array([0.0, 1.0]), level=0.4)
    assert narrow is not None and (narrow.low, narrow.high) == (0.5, 0.5)


@pytest.mark.parametrize(("correct", "low", "high"), [(0, 0.0, 0.1157), (30, 0.8843, 1.0)])
def test_the_interval_of_equal_shares_is_the_exact_binomial_interval(correct: int, low: float, high: float) -> None:
    """0 of 30 at 95 %: (1 - 0.1157)^30 = 0.025, as in binomial tables."""
    found = share_interval(np.full(30, correct / 30))
    assert (found.mean, round(found.low, 4), round(found.high, 4)) == (correct / 30, low, high)
    all_solved = pass_at(np.array([1, 3]), np.array([4, 4]), k=4)  # both are 1, although some samples are incorrect
    assert share_interval(all_solved).low == pytest.approx(1 - 0.8419, abs=1e-4)
    half = np.array([0.0, 1.0])
    assert share_interval(half) == interval(half)


def test_an_interval_depends_on_the_seed_and_not_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(50)
    whole = interval(values, resamples=1000)
    assert whole == interval(values, resamples=1000) != interval(values, resamples=1000, seed=1)
    monkeypatch.setattr("sgpo_async.metrics.pass_rates._CHUNK", 200)
    assert interval(values, resamples=1000) == whole
    assert interval(np.array([])) is None


def test_the_interval_covers_the_true_value_about_as_often_as_its_level() -> None:
    """400 benchmarks of 60 problems with 4 samples each; the pass rates are uniform, so the true mean is 1/2.

    Of 400 intervals at 95 %, 380 are expected to cover; 4 standard deviations of the count are 17.
    """
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        correct = generator.binomial(4, generator.random(60))
        found = interval(avg_at(correct, np.full(60, 4)), resamples=1000)
        assert found is not None
        covered += found.low <= 0.5 <= found.high
    # The percentile bootstrap covers slightly less often than its level.
    assert 400 * 0.95 - 22 <= covered <= 400 * 0.95 + 17


@pytest.mark.parametrize("differences", [[1], [0, 0], [3, -1, 2, 0, 2], [1, 1, 1, 1, 1, -1], [5, 5, -7, 2, 1, -1, 4]])
def test_the_sign_flip_test_equals_enumeration_of_all_signs(differences: list[int]) -> None:
    found = abs(sum(differences))
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in product((-1, 1), repeat=len(differences))]  # fmt: skip
    expected = sum(abs(total) >= found for total in sums) / len(sums)
    assert sign_flip(np.array(differences)) == pytest.approx(expected, abs=1e-12)


def test_with_one_sample_per_problem_the_p_value_equals_mcnemars_exact_test() -> None:
    """9 problems are solved only by a, 2 only by b: 2 P(X <= 2) for X ~ Binomial(11, 1/2)."""
    correct_a = array(*[1] * 9, *[0] * 2, *[1] * 20, *[0] * 5)
    correct_b = array(*[0] * 9, *[1] * 2, *[1] * 20, *[0] * 5)
    ones = np.ones(36, int)
    found = compare(correct_a, ones, correct_b, ones)
    assert found.p_value == pytest.approx(2 * sum(comb(11, i) for i in range(3)) / 2**11, abs=1e-12)
    assert (found.better, found.worse, found.problems) == (9, 2, 36)
    assert found.difference.mean == pytest.approx(7 / 36)


def test_the_p_value_is_valid_under_the_null_hypothesis() -> None:
    """Two evaluations of the same 30 problems: p <= 0.05 in at most 5 % of 400, plus 4 standard deviations."""
    generator = np.random.default_rng(3)
    rates = generator.random(30)
    eights = np.full(30, 8)
    rejected = sum(
        compare(generator.binomial(8, rates), eights, generator.binomial(8, rates), eights).p_value <= 0.05
        for _ in range(400)
    )
    assert 5 <= rejected <= 400 * 0.05 + 18


def test_different_numbers_of_samples_are_compared_by_their_shares() -> None:
    """1/2, 1/4, 1 and 1/3, 1, 1: the differences are 1/6, -3/4, 0, or in twelfths 2, -9, 0."""
    found = compare(array(1, 1, 2), array(2, 4, 2), array(1, 3, 3), array(3, 3, 3))
    assert found.difference.mean == pytest.approx((1 / 6 - 3 / 4) / 3)
    assert found.p_value == sign_flip(array(2, -9, 0)) == 1.0
    assert (found.better, found.worse) == (1, 1)


def test_a_clear_difference_is_found_and_its_interval_excludes_zero() -> None:
    generator = np.random.default_rng(8)
    rates = generator.random(100) * 0.5
    eights = np.full(100, 8)
    found = compare(generator.binomial(8, rates + 0.3), eights, generator.binomial(8, rates), eights)
    assert found.p_value < 1e-6 and found.difference.low > 0.2
    swapped = compare(generator.binomial(8, rates), eights, generator.binomial(8, rates + 0.3), eights)
    assert swapped.difference.high < -0.2

"""The time of decoding steps: against a sum over single steps, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.simulation import Lengths
from sgpo_async.simulation.rates import EngineRates
from sgpo_async.simulation.workload import Workload, median_of

RATES = st.builds(
    EngineRates,
    slots=st.just(64),
    base_s=st.floats(1e-4, 0.1),
    context_s=st.sampled_from([0.0, 1e-8, 1e-6]),
    compute_s=st.sampled_from([0.0, 1e-5, 1e-3]),
)


def slow_seconds(rates: EngineRates, steps: int, sequences: int, context: float) -> float:
    """Step by step; in the middle of each, as sequences grow continuously in the model."""
    return sum(rates.step_s(sequences, context + sequences * (step + 0.5)) for step in range(steps))


@given(rates=RATES, steps=st.integers(1, 3000), sequences=st.integers(1, 64), context=st.floats(0, 1e5))
def test_seconds_are_the_sum_over_steps(rates: EngineRates, steps: int, sequences: int, context: float) -> None:
    expected = slow_seconds(rates, steps, sequences, context)
    # One step may be divided where arithmetic and memory traffic take equally long.
    step = rates.step_s(sequences, context + sequences * steps)
    assert rates.seconds(steps, sequences, context) == pytest.approx(expected, rel=1e-9, abs=step)


@given(rates=RATES, steps=st.floats(0.01, 1e5), sequences=st.integers(1, 64), context=st.floats(0, 1e5))
def test_steps_are_the_inverse_of_seconds(rates: EngineRates, steps: float, sequences: int, context: float) -> None:
    seconds = rates.seconds(steps, sequences, context)
    assert rates.steps(seconds, sequences, context) == pytest.approx(steps, rel=1e-6)


@pytest.mark.parametrize(("mean", "sigma", "longest"), [(200, 0.5, 4096), (1500, 1.9, 16_384), (900, 1.0, 1024)])
def test_lengths_have_the_mean_that_their_median_was_chosen_for(mean: float, sigma: float, longest: int) -> None:
    lengths = Lengths(longest=longest, median=median_of(mean, sigma, longest), sigma=sigma)
    work = Workload(lengths, size=8, seed=3)
    found = [work.length(task, slot) for task in range(4000) for slot in range(8)]
    assert sum(found) / len(found) == pytest.approx(mean, rel=0.08)
    assert min(found) >= 1 and max(found) <= longest


def test_lengths_belong_to_the_task_whatever_the_order() -> None:
    one, other = (Workload(Lengths(longest=500), size=4, seed=1) for _ in range(2))
    keys = [(task, slot) for task in range(50) for slot in range(4)]
    forwards = [one.length(*key) for key in keys]
    assert [other.length(*key) for key in reversed(keys)] == forwards[::-1]
    assert [Workload(Lengths(longest=500), size=4, seed=2).length(*key) for key in keys] != forwards


def test_recorded_lengths_are_drawn_as_often_as_they_were_recorded() -> None:
    work = Workload(Lengths(longest=100, recorded=(10, 10, 10, 50)), size=4, seed=0)
    found = [work.length(task, slot) for task in range(2000) for slot in range(4)]
    assert set(found) == {10, 50}
    assert found.count(50) / len(found) == pytest.approx(0.25, abs=0.03)

"""Whole simulated runs: the hub's promises hold, they repeat exactly, and the closed form agrees with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sgpo_async.simulation import EngineRates, LearnerRates, Lengths, Settings, generation_bound, simulate
from sgpo_async.simulation.hardware import QWEN_1_5B, QWEN_7B, Hardware, Shape, engine_rates, learner_rates
from sgpo_async.simulation.predict import predict

SMALL = Settings(
    nodes=3,
    engine=EngineRates(slots=16, base_s=0.01, context_s=1e-7, prefill_s=1e-5, load_s=0.05),
    learner=LearnerRates(ranks=2, token_s=2e-4, step_s=0.2, publish_s=0.01, arrive_s=0.1),
    lengths=Lengths(longest=600, median=100, sigma=0.8, prompt=30, strategy=20),
    problems=8,
    autonomous=4,
    guided=2,
    max_lag=1,
    steps=20,
)


def test_the_same_settings_give_the_same_result_and_another_seed_another_one() -> None:
    first, again = simulate(SMALL), simulate(SMALL)
    assert first.plain() == again.plain()
    assert simulate(replace(SMALL, seed=1)).plain() != first.plain()


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_a_run_trains_what_it_must_and_its_times_add_up(lag: int) -> None:
    found = simulate(replace(SMALL, max_lag=lag))
    assert sum(found.learner.values()) == pytest.approx(1)
    assert sum(found.engines.values()) == pytest.approx(1)
    assert sum(found.lag.values()) == pytest.approx(1)
    assert found.dropped == 0
    assert min(found.lag) >= 0 and (lag or set(found.lag) == {0})
    assert found.generated_tokens == pytest.approx(found.trained_tokens, rel=0.35)  # what is in flight at both ends


def test_no_run_is_faster_than_either_side_alone() -> None:
    for lag in (0, 1, 4):
        found = simulate(replace(SMALL, max_lag=lag))
        alone = generation_bound(replace(SMALL, max_lag=lag))
        assert found.step_s > 0.97 * max(alone.step_s, found.learner["trains"] * found.step_s)


def test_lag_buys_throughput_until_a_side_is_full() -> None:
    rates = [simulate(replace(SMALL, max_lag=lag)).tokens_per_s for lag in (0, 1, 4)]
    assert rates[0] < rates[1] < 1.02 * rates[2]


def test_dropping_what_is_stale_costs_rollouts() -> None:
    uneven = replace(SMALL, lengths=Lengths(longest=4000, median=60, sigma=1.9), max_lag=1, stale="drop")
    assert simulate(uneven).dropped > 0
    assert simulate(replace(uneven, stale="correct")).dropped == 0


def test_gpus_that_take_turns_lose_the_time_of_switching() -> None:
    turns = replace(SMALL, max_lag=0)
    costly = replace(turns, learner=replace(turns.learner, switch_s=1.0))
    assert simulate(costly).step_s == pytest.approx(simulate(turns).step_s + 2.0, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "ranks", "lag"),
    [(QWEN_7B, ranks, lag) for ranks in (1, 4, 6) for lag in (0, 1, 8)] + [(QWEN_1_5B, 4, 2), (QWEN_1_5B, 2, 4)],
    ids=str,
)
def test_the_closed_form_agrees_with_the_simulation(shape: Shape, ranks: int, lag: int) -> None:
    settings = Settings(
        nodes=8 - ranks,
        engine=engine_rates(shape, Hardware(), slots=96),
        learner=learner_rates(shape, Hardware(), ranks=ranks),
        lengths=Lengths(longest=4096, median=500, sigma=0.9),
        problems=24,
        max_lag=lag,
        steps=10,
    )
    found, predicted = simulate(settings), predict(settings)
    assert predicted.tokens_per_s == pytest.approx(found.tokens_per_s, rel=0.1)
    assert predicted.mean_lag == pytest.approx(found.mean_lag, abs=0.5 + 0.1 * lag)

"""The simulation of staleness at a small size: what is counted, and that the hub's own core decides."""

import pytest

from sgpo_async.bench import staleness


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BATCH": 4, "SERVERS": 4, "LONGEST": 1024, "TASKS_PER_SERVER": 4, "REPORT_S": 2.0}.items():
        monkeypatch.setattr(staleness, name, value)


@pytest.mark.parametrize("stale", ["drop", "correct"])
def test_only_dropping_loses_groups_and_favours_short_rollouts(stale: str) -> None:
    found = staleness.simulate(step_s=2.0, steps=30, max_lag=1, stale=stale)
    if stale == "correct":
        assert found["groups_dropped"] == found["tokens_dropped"] == found["length_bias"] == 0
        assert found["stale"] > 0.1, "but old tokens are trained"
    else:
        assert found["tokens_dropped"] > found["groups_dropped"] > 0.05
        assert found["length_bias"] < -2 * found["length_bias_interval"] < 0
        assert found["stale"] == 0


def test_lengths_and_rewards_belong_to_the_task() -> None:
    assert staleness.length_of(3, 1) == staleness.length_of(3, 1)
    lengths = {staleness.length_of(task, slot) for task in range(9) for slot in range(9)}
    assert len(lengths) > 5 and min(lengths) >= 1 and max(lengths) <= 1024 // staleness.UNIT

"""What is trained against what was sampled: shares, biases, and the alarm."""

from dataclasses import replace

import numpy as np
import pytest
from hub_support import Driver, make_part, make_rollout, make_run

from sgpo_async.hub.events import Warn
from sgpo_async.hub.settled import ENOUGH, Settled
from sgpo_async.rollout.partial import Arrived
from sgpo_async.wire import records as wire


def rollouts(count: int, *, tokens: int, correct: int = 0, guided: bool = False) -> list[wire.Rollout]:
    lease = make_run_lease()
    made = make_rollout(lease, 2 if guided else 0)
    ids = np.zeros(tokens, np.int32)
    return [
        replace(made, guided=guided, tokens=ids, reward=float(index < correct), unguided_logprob=None)
        for index in range(count)
    ]


def make_run_lease() -> wire.Lease:
    driver = Driver(make_run())
    driver.learner()
    driver.actor(b"a", credit=1)
    driver.serve_evaluation(b"a")
    return driver.leases(b"a")[0]


def test_biases_by_hand() -> None:
    settled = Settled()
    assert set(settled.metrics().values()) == {None}
    settled.trained.add([*rollouts(8, tokens=10, correct=4), *rollouts(4, tokens=10, correct=4, guided=True)])
    settled.dropped.add(rollouts(4, tokens=40, correct=0))
    found = settled.metrics()
    assert found["tokens_dropped"] == pytest.approx(160 / 280)
    assert found["length_bias"] == pytest.approx(10 / (280 / 16) - 1)
    assert found["pass_bias"] == pytest.approx(4 / 8 - 4 / 12)


def test_a_group_that_ends_early_counts_with_the_tokens_that_are_known() -> None:
    settled = Settled()
    arrived = Arrived(size=3)
    arrived.finish(rollouts(1, tokens=10)[0])
    arrived.report(make_part(1, 0, tokens=30))
    arrived.report(make_part(1, 30, tokens=20))
    settled.drop_unfinished(arrived)
    assert (settled.dropped.rollouts, settled.dropped.tokens) == (2, 60)


def test_the_alarm_is_raised_once_when_enough_is_known() -> None:
    settled = Settled()
    settled.trained.add(rollouts(ENOUGH, tokens=10))
    settled.dropped.add(rollouts(ENOUGH - 1, tokens=30))
    assert settled.alarm() == ""
    settled.dropped.add(rollouts(1, tokens=30))
    assert settled.alarm() == (
        "stale groups: 75% of the sampled tokens are dropped, and the trained completions are 50% shorter than all; "
        "set hub.stale=correct or raise hub.max_lag"
    )
    assert settled.alarm() == ""


def test_dropped_groups_that_are_as_long_as_others_raise_no_alarm() -> None:
    settled = Settled()
    settled.trained.add(rollouts(ENOUGH, tokens=10))
    settled.dropped.add(rollouts(ENOUGH, tokens=10))
    assert settled.alarm() == ""


def test_the_hub_counts_trained_and_dropped_groups_and_warns() -> None:
    driver = Driver(make_run(batch=1, max_lag=0, steps=9))
    driver.learner()
    driver.actor(b"a", credit=1)
    driver.serve_evaluation(b"a")
    driver.serve(b"a", driver.leases(b"a")[0])
    driver.send(b"r0", wire.BatchRequest(step=0))
    driver.send(b"r0", wire.Commit(step=0))
    assert driver.core.status()["tokens_dropped"] == 0 and driver.core.status()["length_bias"] == 0
    settled = driver.core.training.settled
    assert settled.trained.rollouts == 3
    settled.trained.add(rollouts(ENOUGH, tokens=10))
    settled.dropped.add(rollouts(ENOUGH, tokens=30))
    driver.advance(1.0)
    assert [effect for effect in driver.effects if isinstance(effect, Warn)] == [
        Warn(
            "stale groups: 75% of the sampled tokens are dropped, and the trained completions are 50% shorter than "
            "all; set hub.stale=correct or raise hub.max_lag"
        )
    ]

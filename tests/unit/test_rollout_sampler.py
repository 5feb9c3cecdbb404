"""The rollout loop, with an engine whose answers the test sets."""

from collections.abc import Iterator

import pytest
from rollout_support import RIGHT, TOKENIZER, ScriptedEngine, generated, lease, scored

from sgpo_async.config.schema import Tasks
from sgpo_async.engines.base import Failed, Score
from sgpo_async.errors import EngineError
from sgpo_async.rollout.sampler import RolloutSampler, Sampled, Unservable


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def sampler(engine: ScriptedEngine) -> Iterator[RolloutSampler]:
    sampler = RolloutSampler(engine, TOKENIZER, Tasks())  # type: ignore[arg-type]
    yield sampler
    sampler.close()


def test_every_rollout_of_a_lease_is_requested_and_the_last_one_ends_it(
    engine: ScriptedEngine, sampler: RolloutSampler
) -> None:
    sampler.add(lease(7))
    assert [request.id for request in engine.submitted] == [(7, 0, 0), (7, 0, 1)]
    engine.answers = [generated((7, 0, 1), RIGHT)]
    (first,) = sampler.step(0.0)
    assert isinstance(first, Sampled)
    assert (first.rollout.slot, first.rollout.reward, first.text, first.timed_out, first.last) == (
        1, 1.0, RIGHT, False, False,
    )  # fmt: skip
    assert [lease.task for lease in sampler.leases] == [7]
    engine.answers = [generated((7, 0, 0), "wrong")]
    (second,) = sampler.step(0.0)
    assert isinstance(second, Sampled)
    assert (second.rollout.slot, second.rollout.reward, second.last) == (0, 0.0, True)
    assert sampler.leases == []


def test_a_correct_guided_rollout_is_scored_without_its_strategy_first(
    engine: ScriptedEngine, sampler: RolloutSampler
) -> None:
    sampler.add(lease(7, autonomous=1, guided=2))
    engine.answers = [generated((7, 0, 1), RIGHT), generated((7, 0, 2), "wrong"), generated((7, 0, 0), RIGHT)]
    outcomes = sampler.step(0.0)
    assert [outcome.rollout.slot for outcome in outcomes if isinstance(outcome, Sampled)] == [2, 0]
    score = engine.submitted[-1]
    assert isinstance(score, Score) and score.id == (7, 0, 1)
    assert score.prompt.tolist() == [ord(c) for c in "a problem"]
    engine.answers = [scored((7, 0, 1), -1.0, *[-0.5] * (len(RIGHT) - 1))]
    (last,) = sampler.step(0.0)
    assert isinstance(last, Sampled)
    assert (last.rollout.unguided_logprob, last.rollout.reward, last.text, last.last) == (
        -1.0 - 0.5 * (len(RIGHT) - 1),
        1.0,
        RIGHT,
        True,
    )


def test_rollouts_of_an_evaluation_are_not_scored(engine: ScriptedEngine, sampler: RolloutSampler) -> None:
    sampler.add(lease(7, autonomous=0, guided=1, purpose="evaluate"))
    engine.answers = [generated((7, 0, 0), RIGHT)]
    (only,) = sampler.step(0.0)
    assert isinstance(only, Sampled) and only.rollout.unguided_logprob is None and only.last


def test_a_lease_that_the_engine_refuses_leaves_no_request_behind(
    engine: ScriptedEngine, sampler: RolloutSampler
) -> None:
    engine.refuses = (7, 0, 1)
    with pytest.raises(EngineError, match="too long"):
        sampler.add(lease(7))
    assert engine.cancelled == [(7, 0, 0), (7, 0, 1)]
    assert sampler.leases == []


def test_a_failed_request_ends_only_its_own_lease(engine: ScriptedEngine, sampler: RolloutSampler) -> None:
    sampler.add(lease(7))
    sampler.add(lease(8))
    engine.answers = [
        generated((7, 0, 0)),  # its verdict arrives after the lease has ended
        Failed(id=(7, 0, 1), error=EngineError("request (7, 0, 1): 3 servers died while it ran on them")),
        generated((8, 0, 0)),
    ]
    failed, other = sampler.step(0.0)
    assert isinstance(failed, Unservable) and failed.lease.task == 7 and "3 servers died" in str(failed.error)
    assert isinstance(other, Sampled) and other.rollout.task == 8
    assert engine.cancelled == [(7, 0, 0), (7, 0, 1)]
    engine.answers = [generated((7, 0, 1))]  # the answer was already on its way
    assert sampler.step(0.0) == []
    assert [lease.task for lease in sampler.leases] == [8]


def test_verdicts_wait_while_the_engine_is_out_of_service(engine: ScriptedEngine, sampler: RolloutSampler) -> None:
    """A correct guided rollout must be scored next, which an engine without weights cannot do."""
    sampler.add(lease(7, autonomous=1, guided=1))
    engine.answers = [generated((7, 0, 1), RIGHT)]
    engine.version = None
    assert sampler.step(0.0) == [] and not isinstance(engine.submitted[-1], Score)
    engine.version = 1
    assert sampler.step(0.0) == [] and isinstance(engine.submitted[-1], Score)


def test_a_completion_that_the_engine_cannot_score_gives_its_lease_back(
    engine: ScriptedEngine, sampler: RolloutSampler
) -> None:
    """Another actor may have sampled it, with ids that this model does not know."""
    sampler.add(lease(7, autonomous=1, guided=1))
    sampler.add(lease(8))
    engine.answers = [generated((7, 0, 1), RIGHT)]
    engine.refuses = (7, 0, 1)
    (failed,) = sampler.step(0.0)
    assert isinstance(failed, Unservable) and failed.lease.task == 7
    assert engine.cancelled == [(7, 0, 0), (7, 0, 1)]
    assert [lease.task for lease in sampler.leases] == [8]

"""The group of one lease in an actor: its requests to the engine, and its rollouts in any order of completion."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.config import load
from sgpo_async.engines.base import Generate, Generated, Score, Scored
from sgpo_async.rollout.group import RolloutGroup, rollout_seed
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import Lease, Purpose, Rollout

PLAIN, GUIDED = np.array([1, 2], np.int32), np.array([7, 1, 2], np.int32)


def make_group(
    autonomous: int = 2,
    guided: int = 2,
    *,
    purpose: Purpose = "train",
    top_p: float = 1.0,
    top_k: int = 0,
    top_logprobs_num: int = 0,
    unguided_scores: bool = True,
    cut_scores: bool = True,
) -> RolloutGroup:
    lease = Lease(
        task=4,
        attempt=1,
        purpose=purpose,
        problem="p",
        answer="a",
        verifier="math",
        strategy="s",
        autonomous=autonomous,
        guided=guided,
        min_version=3,
        seed=99,
        temperature=0.7,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=5,
        top_logprobs_num=top_logprobs_num,
        unguided_scores=unguided_scores,
        cut_scores=cut_scores,
    )
    return RolloutGroup(lease, plain=PLAIN, guided=GUIDED if guided else None)


def completion(request: Generate) -> Generated:
    return Generated(
        id=request.id,
        tokens=np.array([5, 6], np.int32),
        logprobs=np.array([-0.5, -0.25], np.float32),
        versions=np.array([3], np.int32),
        digests=np.zeros(1, np.int64),
        ends=np.array([2], np.int32),
        finish="stop",
    )


def test_autonomous_slots_come_first_and_get_the_plain_prompt() -> None:
    requests = make_group().requests()
    assert [request.id for request in requests] == [(4, 1, 0), (4, 1, 1), (4, 1, 2), (4, 1, 3)]
    assert [list(request.prompt) for request in requests] == [[1, 2], [1, 2], [7, 1, 2], [7, 1, 2]]
    assert {request.temperature for request in requests} == {0.7}
    assert len({request.seed for request in requests}) == 4


def test_every_request_has_the_sampling_parameters_of_the_lease() -> None:
    for request in make_group(purpose="evaluate", top_p=0.95, top_k=9).requests():
        assert (request.temperature, request.top_p, request.top_k, request.max_new_tokens) == (0.7, 0.95, 9, 5)


@pytest.mark.parametrize(
    ("lease", "reported"),
    [
        ({}, False),
        ({"top_p": 0.95}, True),
        ({"top_k": 9}, True),
        ({"purpose": "evaluate", "top_p": 0.95, "top_k": 9}, False),
    ],
)
def test_only_truncated_rollouts_of_training_report_what_was_kept(lease: dict[str, Any], reported: bool) -> None:
    group = make_group(**lease)
    request = group.requests()[0]
    assert request.report_kept == reported
    kept = {"kept": np.array([4], np.int32), "kept_sizes": np.array([0, 1], np.int32)} if reported else {}
    group.generated(replace(completion(request), **kept))
    rollout = group.judged(request.id, reward=1.0)
    assert isinstance(rollout, Rollout)
    assert (rollout.kept is not None, rollout.kept_sizes is not None) == (reported, reported)


def test_a_rollout_has_the_logprobs_that_the_engine_returned() -> None:
    group = make_group()
    group.generated(completion(group.requests()[0]))
    rollout = group.judged((4, 1, 0), reward=1.0)
    assert isinstance(rollout, Rollout)
    assert (rollout.task, rollout.attempt, rollout.slot, rollout.guided) == (4, 1, 0, False)
    assert rollout.reward == 1.0
    assert rollout.unguided_logprob is None
    np.testing.assert_array_equal(rollout.logprobs, np.array([-0.5, -0.25], np.float32))


def test_a_correct_guided_rollout_is_finished_at_once_if_the_lease_asks_for_no_score() -> None:
    """Its likeliest tokens are kept: the behaviour policy can teach without Eq. 4."""
    group = make_group(top_logprobs_num=1, unguided_scores=False)
    request = group.requests()[2]
    likeliest = {"top_tokens": np.array([5, 6], np.int32), "top_logprobs": np.array([-0.1, -0.2], np.float32)}
    group.generated(replace(completion(request), **likeliest))
    rollout = group.judged(request.id, reward=1.0)
    assert isinstance(rollout, Rollout) and rollout.may_be_distilled
    assert rollout.unguided_logprob is None
    assert rollout.top_tokens is likeliest["top_tokens"] and rollout.top_logprobs is likeliest["top_logprobs"]


def test_a_correct_guided_rollout_is_scored_on_the_plain_prompt_and_the_score_is_a_sum() -> None:
    group = make_group()
    group.generated(completion(group.requests()[2]))
    score = group.judged((4, 1, 2), reward=1.0)
    assert isinstance(score, Score)
    assert list(score.prompt) == [1, 2]
    assert list(score.tokens) == [5, 6]
    assert score.temperature == 0.7
    rollout = group.scored(Scored(id=score.id, logprobs=np.array([-3.0, -1.5], np.float32), version=3))
    assert rollout.unguided_logprob == pytest.approx(-4.5)
    assert rollout.guided
    assert list(rollout.prompt) == [7, 1, 2]


def test_top_tokens_are_requested_for_guided_rollouts_and_sent_with_correct_ones() -> None:
    group = make_group(1, 2, top_logprobs_num=2)
    requests = group.requests()
    assert [request.top_logprobs_num for request in requests] == [0, 2, 2]
    top = {"top_tokens": np.arange(4, dtype=np.int32), "top_logprobs": -np.ones(4, np.float32)}
    for slot, correct in ((1, True), (2, False)):
        group.generated(replace(completion(requests[slot]), **top))
        outcome = group.judged((4, 1, slot), reward=float(correct))
        if isinstance(outcome, Score):
            outcome = group.scored(Scored(id=outcome.id, logprobs=np.zeros(2, np.float32), version=3))
        found = (outcome.top_tokens, outcome.top_logprobs)
        assert found == (top["top_tokens"], top["top_logprobs"]) if correct else found == (None, None)


def test_a_wrong_guided_rollout_is_not_scored() -> None:
    group = make_group()
    group.generated(completion(group.requests()[3]))
    rollout = group.judged((4, 1, 3), reward=0.0)
    assert isinstance(rollout, Rollout)
    assert (rollout.reward, rollout.unguided_logprob) == (0.0, None)


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.parametrize(("cut_scores", "reward"), [(True, 1.0), (False, 0.0)])
def test_a_completion_that_was_cut_is_no_target_and_has_the_reward_that_the_lease_says(
    slot: int, cut_scores: bool, reward: float
) -> None:
    group = make_group(cut_scores=cut_scores)
    cut = replace(completion(group.requests()[slot]), finish="length")
    group.generated(cut)
    rollout = group.judged(cut.id, reward=1.0)
    assert isinstance(rollout, Rollout)
    assert rollout.reward == reward and rollout.unguided_logprob is None and not rollout.may_be_distilled


def test_an_evaluation_rollout_is_not_scored() -> None:
    group = make_group(1, 1, purpose="evaluate")
    group.generated(completion(group.requests()[1]))
    assert isinstance(group.judged((4, 1, 1), reward=1.0), Rollout)


@given(st.permutations(range(5)), st.lists(st.booleans(), min_size=5, max_size=5))
def test_in_any_order_every_slot_yields_one_rollout_and_then_the_group_is_done(
    order: list[int], correct: list[bool]
) -> None:
    group = make_group(3, 2)
    requests = group.requests()
    rollouts = []
    for slot in order:
        assert not group.done
        group.generated(completion(requests[slot]))
        outcome = group.judged((4, 1, slot), reward=float(correct[slot]))
        if isinstance(outcome, Score):
            outcome = group.scored(Scored(id=outcome.id, logprobs=np.zeros(2, np.float32), version=3))
        rollouts.append(outcome)
    assert group.done
    assert sorted(rollout.slot for rollout in rollouts) == list(range(5))
    assert [bool(rollout.reward) for rollout in rollouts] == [correct[slot] for slot in order]


def test_seeds_are_reproducible_and_differ_between_slots_and_leases() -> None:
    assert rollout_seed(99, 0) == rollout_seed(99, 0)
    seeds = {rollout_seed(lease_seed, slot) for lease_seed in range(50) for slot in range(12)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("override", "scored"),
    [
        ("algorithm.objective=sgpo", True),
        ("algorithm.target=all", False),
        ("builtin:methods/pi-distill", False),
        ("builtin:methods/pope", False),
    ],
)
def test_actors_score_guided_rollouts_only_for_equation_4(override: str, scored: bool) -> None:
    run = load("", [override])
    lease = TaskSampler(run, source_of(run)).task(0).lease(attempt=0, min_version=0)
    assert lease.unguided_scores == scored

"""Rewards other than 0 and 1: `tasks.solved_at` decides everywhere what is correct; advantages use the rewards."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.algorithm import group_advantages
from sgpo_async.config.schema import Algorithm
from sgpo_async.engines.base import Generated, Score, Scored
from sgpo_async.hub.batch_metrics import batch_metrics
from sgpo_async.hub.rollout_checks import Limits, violation
from sgpo_async.hub.served_weights import ServedWeights
from sgpo_async.learner.objectives import OBJECTIVES
from sgpo_async.learner.objectives.base import TaskGroup
from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.rollout.group import RolloutGroup
from sgpo_async.wire import decode, encode
from sgpo_async.wire.records import Lease, Rollout, is_correct

SOLVED_AT = 0.5
LIMITS = Limits(50, 2, ServedWeights(published={(2, 0): None}).objection)
OWN = [0.7, -2.0, 0.5, 0.4]  # two of four are correct
GUIDED = [3.0, 0.5, 0.0]  # two of three


def lease(**changes: Any) -> Lease:
    made = Lease(
        task=0, attempt=0, purpose="train", problem="p", answer="a", verifier="my:f", strategy="s", autonomous=4,
        guided=3, min_version=0, seed=0, temperature=1.0, top_p=1.0, max_new_tokens=4, solved_at=SOLVED_AT,
        unguided_scores=True,
    )  # fmt: skip
    return replace(made, **changes)


def rollouts(lease: Lease, rewards: list[float], *, binary: bool = False) -> list[Rollout]:
    """The rollouts that an actor makes of these rewards, by slot; the first guided ones are the most reachable.

    With `binary`, those of a verifier which gives 1 to the same rollouts, and 0 to the others.
    """
    if binary:
        lease, rewards = replace(lease, solved_at=1.0), [float(reward >= SOLVED_AT) for reward in rewards]
    group = RolloutGroup(lease, plain=np.array([1, 2], np.int32), guided=np.array([7, 1, 2], np.int32))
    made: list[Rollout] = []
    for request, reward in zip(group.requests(), rewards, strict=True):
        tokens, one = np.array([5, 6], np.int32), np.array([2], np.int32)
        group.generated(
            Generated(
                id=request.id,
                tokens=tokens,
                logprobs=-np.ones(2, np.float32),
                versions=one,
                digests=np.zeros(1, np.int64),
                ends=one,
                finish="stop",
            )
        )
        outcome = group.judged(request.id, reward=reward)
        if isinstance(outcome, Score):
            sums = np.full(2, -float(len(made)), np.float32)
            outcome = group.scored(Scored(id=request.id, logprobs=sums, version=2))
        made.append(outcome)
    assert group.done
    return made


def trained(objective: str, made: list[Rollout], **keys: Any) -> Any:
    own, guided = (tuple(one for one in made if one.guided == flag) for flag in (False, True))
    demonstration = np.array([5, 6, 2], np.int32)
    group = TaskGroup(autonomous=own, guided=guided, demonstration=demonstration, problems=2)
    return OBJECTIVES[objective](group, Algorithm(objective=objective, **keys))


ROLLOUTS, BINARY = rollouts(lease(), OWN + GUIDED), rollouts(lease(), OWN + GUIDED, binary=True)


def test_a_rollout_is_correct_from_solved_at_on() -> None:
    assert is_correct(0.5, 0.5) and not is_correct(0.4999, 0.5)
    assert [one.reward for one in ROLLOUTS] == OWN + GUIDED
    assert [one.correct for one in ROLLOUTS] == [True, False, True, False, True, True, False]
    assert [one.correct for one in BINARY] == [one.correct for one in ROLLOUTS]


def test_the_actor_scores_guided_rollouts_that_are_correct_and_the_hub_expects_it() -> None:
    assert [one.unguided_logprob is not None for one in ROLLOUTS] == [False] * 4 + [True, True, False]
    for one in ROLLOUTS:
        assert violation(lease(), one, LIMITS, prompt=None) is None
        assert violation(lease(solved_at=0.6), one, LIMITS, prompt=None) == "solved_at differs from the lease's"
        (sent,) = [decode(encode(one), max_bytes=2**20)]
        assert (sent.reward, sent.solved_at, sent.correct) == (one.reward, SOLVED_AT, one.correct)  # type: ignore[union-attr]
    unscored = replace(ROLLOUTS[4], unguided_logprob=None)
    reason = violation(lease(), unscored, LIMITS, prompt=None)
    assert reason and reason.startswith("unguided_logprob must come with a correct, complete guided rollout")


def test_pass_rates_count_correct_rollouts_and_rewards_are_reported_beside_them() -> None:
    metrics = batch_metrics([CompletedGroup(number=0, attempt=0, rollouts=tuple(ROLLOUTS))], version=3)
    assert (metrics["pass_auto"], metrics["pass_guided"]) == (0.5, pytest.approx(2 / 3))
    assert (metrics["reward_auto"], metrics["reward_guided"]) == pytest.approx((-0.1, 3.5 / 3))


@pytest.mark.parametrize("keys", [{}, {"target": "all"}, {"weight": "group-advantage"}, {"guide_gate": 0.7}])
def test_alpha_and_targets_are_those_of_the_same_rollouts_with_rewards_0_and_1(keys: dict[str, Any]) -> None:
    found, expected = trained("sgpo", ROLLOUTS, **keys), trained("sgpo", BINARY, **keys)
    assert found.metrics == expected.metrics
    chosen = [[(one.rollout.slot, one.weight) for one in result.distillation] for result in (found, expected)]
    assert chosen[0] == chosen[1] and bool(chosen[0]) == ("guide_gate" not in keys)


def test_advantages_use_the_reward_itself() -> None:
    mean, std = np.mean(OWN), np.std(OWN)
    for objective in ("sgpo", "grpo"):
        found = [one.advantage for one in trained(objective, ROLLOUTS).policy_gradient]
        assert found == pytest.approx(list((np.array(OWN) - mean) / std))
    with_demonstration = np.array([*OWN, SOLVED_AT])
    found = [one.advantage for one in trained("luffy", ROLLOUTS).policy_gradient]
    assert found == pytest.approx(
        list(((with_demonstration - with_demonstration.mean()) / with_demonstration.std())[:4])
    )


@pytest.mark.parametrize(("gate", "supervised"), [(1, False), (2, True)])
def test_the_gate_of_hpt_counts_correct_rollouts(gate: int, supervised: bool) -> None:
    assert bool(trained("hpt", ROLLOUTS, hpt_gate=gate).likelihood) is supervised


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_any_finite_rewards_give_finite_advantages(rewards: list[float]) -> None:
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64))[0]
    assert torch.isfinite(advantages).all()
    assert advantages.abs().max() <= len(rewards) ** 0.5 + 1e-6


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=9))
def test_rewards_of_0_and_1_give_the_same_bits_as_without_scaling(rewards: list[float]) -> None:
    values = torch.tensor([rewards], dtype=torch.float64)
    centred = values - values.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    expected = centred / std if len(set(rewards)) > 1 else torch.zeros_like(values)
    assert torch.equal(group_advantages(values), expected)

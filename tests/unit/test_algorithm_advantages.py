"""Group-relative advantages: Eq. 1, MaxRL and Dr. GRPO."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.algorithm import group_advantages
from tests.reference import sgpo as reference

BINARY_GROUPS = st.integers(1, 12).flatmap(
    lambda size: st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=size, max_size=size), min_size=1)
)


@settings(deadline=None)
@given(BINARY_GROUPS)
def test_equals_the_reference(rewards):
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    np.testing.assert_allclose(got.numpy(), reference.advantages(np.array(rewards)), atol=1e-12)


@settings(deadline=None)
@given(BINARY_GROUPS)
def test_each_mixed_group_has_mean_0_and_mean_square_1(rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantages(rewards)
    mixed = (rewards.amax(-1) > rewards.amin(-1)).double()
    torch.testing.assert_close(advantages.mean(-1), torch.zeros(len(rewards), dtype=torch.float64))
    torch.testing.assert_close(advantages.square().mean(-1), mixed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(deadline=None)
@given(value=st.floats(-1e3, 1e3), size=st.integers(1, 12))
def test_the_advantages_of_a_uniform_group_are_exactly_0(dtype, value, size):
    advantages = group_advantages(torch.full((2, size), value, dtype=dtype))
    assert advantages.dtype == dtype
    assert torch.equal(advantages, torch.zeros(2, size, dtype=dtype))


def test_the_advantages_of_one_success_in_eight():
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64))
    expected = torch.tensor([[7.0, -1, -1, -1, -1, -1, -1, -1]], dtype=torch.float64) / 7**0.5
    torch.testing.assert_close(advantages, expected)


@settings(deadline=None)
@given(st.floats(0.1, 10), st.floats(-10, 10))
def test_scale_and_offset_of_the_rewards_do_not_change_the_advantages(scale, offset):
    rewards = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards * scale + offset), group_advantages(rewards))


@settings(deadline=None)
@given(BINARY_GROUPS)
def test_maxrl_and_dr_grpo_equal_their_equations(rewards):
    found = {scale: group_advantages(torch.tensor(rewards, dtype=torch.float64), scale) for scale in ("mean", "none")}
    np.testing.assert_allclose(found["mean"].numpy(), reference.maxrl_advantages(np.array(rewards)), atol=1e-12)
    np.testing.assert_allclose(found["none"].numpy(), reference.centred_rewards(np.array(rewards)), atol=1e-12)


def test_a_single_success_counts_for_all_its_group_with_maxrl():
    rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [1.0, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.float64)
    advantages = group_advantages(rewards, "mean")
    torch.testing.assert_close(advantages[:, 0], torch.tensor([7.0, 1 / 7], dtype=torch.float64))
    torch.testing.assert_close(advantages[:, -1], torch.tensor([-1.0, -1.0], dtype=torch.float64))


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 0), min_size=2, max_size=6))
def test_without_a_positive_mean_maxrl_has_no_advantages(rewards):
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64), "mean")
    assert torch.equal(advantages, torch.zeros_like(advantages))

"""The reachable target (Eq. 4)."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sgpo_async.algorithm import select_reachable
from tests.reference import sgpo as reference

GROUPS = array_shapes(min_dims=2, max_dims=2, max_side=6).flatmap(
    lambda shape: st.tuples(
        arrays(np.float64, shape, elements=st.floats(-1e4, 0) | st.just(-math.inf)), arrays(np.bool_, shape)
    )
)


@settings(deadline=None)
@given(GROUPS)
def test_equals_the_reference(group):
    scores, correct = group
    index, found = select_reachable(torch.from_numpy(scores), torch.from_numpy(correct))
    expected = reference.select_reachable(scores, correct)
    assert found.tolist() == [best is not None for best in expected]
    for got, best in zip(index.tolist(), expected, strict=True):
        assert best is None or got == best


def test_an_incorrect_rollout_is_never_selected_however_likely_it_is():
    index, found = select_reachable(torch.tensor([[-1.0, -9.0, -8.0]]), torch.tensor([[False, True, True]]))
    assert (index.item(), found.item()) == (2, True)


def test_a_correct_rollout_of_probability_0_ranks_above_an_incorrect_one():
    index, found = select_reachable(torch.tensor([[-1.0, -math.inf]]), torch.tensor([[False, True]]))
    assert (index.item(), found.item()) == (1, True)


def test_the_index_is_0_if_no_rollout_is_correct():
    index, found = select_reachable(torch.tensor([[-3.0, -1.0]]), torch.tensor([[False, False]]))
    assert (index.item(), found.item()) == (0, False)


def test_rewards_are_accepted_as_correctness_flags():
    index, _ = select_reachable(torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([[1.0, 0.0, 1.0]]))
    assert index.item() == 2

"""The adaptive distillation weight (Eq. 6)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.algorithm import adaptive_weight
from tests.reference import sgpo as reference

RATES = st.floats(0, 1)


def alpha(p_auto, p_guide, **constants):
    tensors = (torch.tensor([p], dtype=torch.float64) for p in (p_auto, p_guide))
    return adaptive_weight(*tensors, **constants).item()


@pytest.mark.parametrize(
    ("p_auto", "p_guide", "expected"),
    [
        (0.0, 0.25, 0.8),
        (0.0, 0.5, 0.8),
        (0.0, 1.0, 0.8),
        (0.25, 0.5, 0.5),
        (0.5, 0.75, 0.35 / 1.2),
        (0.5, 0.5, 0.05 / 0.6),
        (1.0, 1.0, 0.05 / 1.1),
        (0.75, 0.25, 0.0),
        (1.0, 0.5, 0.0),
        (0.1, 0.0, 0.0),
    ],
)
def test_the_table_of_the_paper_s_constants(p_auto, p_guide, expected):
    assert alpha(p_auto, p_guide) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(RATES, RATES, st.floats(0, 2), st.floats(0.01, 1), st.floats(0, 2))
def test_equals_the_reference(p_auto, p_guide, alpha0, gamma, alpha_max):
    got = alpha(p_auto, p_guide, alpha0=alpha0, gamma=gamma, alpha_max=alpha_max)
    assert got == pytest.approx(reference.adaptive_weight(p_auto, p_guide, alpha0, gamma, alpha_max))


@settings(deadline=None)
@given(RATES, RATES, RATES)
def test_falls_as_the_policy_learns_and_rises_with_the_help_of_the_strategy(p, lower, higher):
    lower, higher = sorted((lower, higher))
    assert alpha(lower, p) >= alpha(higher, p)
    assert alpha(p, lower) <= alpha(p, higher)


def test_is_a_constant_to_autograd():
    rates = torch.tensor([0.25, 0.5], dtype=torch.float64, requires_grad=True)
    assert not adaptive_weight(rates, rates * 0.9).requires_grad

"""The distillation weights (Eq. 6, 8) and the corrected pass rates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.algorithm import adaptive_weight, corrected_pass_rate, group_advantage_weight
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
def test_eq_6_with_the_constants_of_the_paper(p_auto, p_guide, expected):
    assert alpha(p_auto, p_guide) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(RATES, RATES, st.floats(0, 2), st.floats(0.01, 1), st.floats(0, 2))
def test_equals_the_reference(p_auto, p_guide, alpha0, gamma, alpha_max):
    got = alpha(p_auto, p_guide, alpha0=alpha0, gamma=gamma, alpha_max=alpha_max)
    assert got == pytest.approx(reference.adaptive_weight(p_auto, p_guide, alpha0, gamma, alpha_max))


@settings(deadline=None)
@given(RATES, RATES, RATES)
def test_alpha_falls_with_p_auto_and_rises_with_p_guide(p, lower, higher):
    lower, higher = sorted((lower, higher))
    assert alpha(lower, p) >= alpha(higher, p)
    assert alpha(p, lower) <= alpha(p, higher)


def test_no_gradient_flows_through_alpha():
    rates = torch.tensor([0.25, 0.5], dtype=torch.float64, requires_grad=True)
    assert not adaptive_weight(rates, rates * 0.9).requires_grad


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=16), st.floats(0, 3))
def test_group_advantage_weight_equals_the_reference(rewards, alpha_max):
    got = group_advantage_weight(torch.tensor([rewards], dtype=torch.float64), alpha_max=alpha_max).item()
    assert got == pytest.approx(reference.group_advantage_weight(rewards, alpha_max), abs=1e-12)
    assert got == pytest.approx(reference.group_advantage_weight(rewards, alpha_max, e=1e-6), abs=1e-4)


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.floats(0.01, 20)), min_size=1, max_size=8), st.floats(1, 5))
def test_corrected_pass_rate_equals_the_reference(rollouts, bound):
    rewards, rho = (torch.tensor([values], dtype=torch.float64) for values in zip(*rollouts, strict=True))
    got = corrected_pass_rate(rewards, rho.log(), bound=bound).item()
    assert got == pytest.approx(reference.corrected_mean(rewards[0].tolist(), rho[0].tolist(), bound), abs=1e-9)
    assert 0 <= got <= 1


def test_corrected_pass_rate_equals_the_observed_rate_if_all_ratios_are_equal():
    rewards = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    for log_rho in (0.0, -3000.0):  # the ratio of a very long rollout underflows
        rates = corrected_pass_rate(rewards, torch.full((2, 3), log_rho), bound=2.0)
        assert torch.equal(rates, rewards.mean(-1))


def test_the_corrected_pass_rate_approaches_the_mean_under_pi_with_many_rollouts():
    """There are two possible rollouts; the correct one has probability 0.6 under pi and 0.3 under mu."""
    mu, pi = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64)
    samples = torch.multinomial(mu, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    log_rho = (pi / mu).log()[samples][None]
    rewards = (samples == 1).double()[None]
    assert corrected_pass_rate(rewards, log_rho, bound=math.inf).item() == pytest.approx(0.6, abs=0.01)
    assert rewards.mean().item() == pytest.approx(0.3, abs=0.01)

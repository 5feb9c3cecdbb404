"""Importance weights: every mode against its transcription, and the properties common to all modes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sgpo_async.algorithm import MODES, WHOLE_SEQUENCE_MODES, correction_weights
from tests.reference import sgpo as reference

T = 6
every_mode = pytest.mark.parametrize("mode", MODES)
PROBABILITIES = arrays(np.float64, (2, T), elements=st.floats(0.01, 1))
MASKS = arrays(np.bool_, (2, T))
BOUNDS = st.sampled_from([1.0, 1.3, 2.0, 7.0, math.inf])


def weights(pi, mu, mask, mode, bound):
    log_pi, log_mu = torch.from_numpy(pi).log(), torch.from_numpy(mu).log()
    return correction_weights(log_pi, log_mu, torch.from_numpy(mask), mode=mode, bound=bound)


def far_from_the_edge_of_the_band(pi, mu, mask, mode, bound):
    """Return whether rounding cannot move a ratio across the edge of the band [1/c, c]."""
    for p, m, keep in zip(pi, mu, mask, strict=True):
        ratios = (p / m)[keep]
        if mode == "sequence-geometric" and len(ratios):
            ratios = [math.prod(ratios) ** (1 / len(ratios))]
        if any(math.isclose(abs(math.log(r)), math.log(bound), abs_tol=1e-9) for r in ratios):
            return False
    return True


def test_every_mode_has_a_reference():
    assert set(MODES) == set(reference.CORRECTIONS)


@every_mode
@settings(deadline=None)
@given(pi=PROBABILITIES, mu=PROBABILITIES, mask=MASKS, bound=BOUNDS)
def test_equals_the_reference(mode, pi, mu, mask, bound):
    if mode in ("token-mask", "sequence-geometric") and not far_from_the_edge_of_the_band(pi, mu, mask, mode, bound):
        return
    rows = zip(pi, mu, mask, strict=True)
    expected = np.stack([reference.correction_weights(p, m, keep, mode, bound) for p, m, keep in rows])
    np.testing.assert_allclose(weights(pi, mu, mask, mode, bound).numpy(), expected, rtol=1e-10)


@every_mode
def test_the_declared_modes_and_no_others_depend_on_later_tokens(mode):
    pi, mask = np.full((1, T), 0.5), np.ones((1, T), bool)
    mu = pi * np.array([0.9, 1.2, 0.8, 1.1, 0.7, 1.0])
    found = weights(pi, mu, mask, mode, 7.0)[0, :-1]
    mu[0, -1] *= 0.5
    assert torch.equal(found, weights(pi, mu, mask, mode, 7.0)[0, :-1]) == (mode not in WHOLE_SEQUENCE_MODES)


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(deadline=None)
@given(mu=PROBABILITIES, mask=MASKS, bound=BOUNDS)
def test_the_weight_is_exactly_1_on_policy(mode, dtype, mu, mask, bound):
    log_mu, mask = torch.from_numpy(mu).log().to(dtype), torch.from_numpy(mask)
    got = correction_weights(log_mu.clone(), log_mu, mask, mode=mode, bound=bound)
    assert torch.equal(got, mask.to(dtype))


@every_mode
@settings(deadline=None)
@given(pi=PROBABILITIES, mu=PROBABILITIES, mask=MASKS, garbage=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_values_outside_the_mask_have_no_effect(mode, pi, mu, mask, garbage):
    log_pi, log_mu, mask = torch.from_numpy(pi).log(), torch.from_numpy(mu).log(), torch.from_numpy(mask)
    expected = correction_weights(log_pi, log_mu, mask, mode=mode, bound=2.0)
    spoiled_pi, spoiled_mu = (x.masked_fill(~mask, garbage) for x in (log_pi, log_mu))
    got = correction_weights(spoiled_pi, spoiled_mu, mask, mode=mode, bound=2.0)
    assert torch.equal(got, expected)


@every_mode
def test_no_gradient_flows_through_the_weights(mode):
    log_pi = torch.zeros(2, T, requires_grad=True)
    mask = torch.ones(2, T, dtype=torch.bool)
    assert not correction_weights(log_pi * 2, log_pi, mask, mode=mode, bound=2.0).requires_grad


@every_mode
@pytest.mark.parametrize("shape", [(0,), (3, 0), (5,), (2, 3, 4)])
def test_the_weights_have_the_shape_of_the_input(mode, shape):
    log_pi = torch.zeros(shape)
    assert correction_weights(log_pi, log_pi, torch.ones(shape), mode=mode, bound=2.0).shape == shape


@every_mode
def test_the_weights_of_long_sequences_with_extreme_ratios_are_finite(mode):
    log_pi = torch.stack([torch.full((4096,), 3.0), torch.full((4096,), -3.0)])
    mask = torch.ones_like(log_pi, dtype=torch.bool)
    got = correction_weights(log_pi, torch.zeros_like(log_pi), mask, mode=mode, bound=math.inf)
    assert got.isfinite().all()
    assert (got >= 0).all()


@settings(deadline=None)
@given(PROBABILITIES, PROBABILITIES, st.integers(0, T - 1), st.floats(0.01, 1))
def test_prefix_weights_depend_only_on_earlier_tokens(pi, mu, t, probability):
    mask = np.ones((2, T), dtype=bool)
    before = weights(pi, mu, mask, "prefix", 2.0)
    pi[:, t] = probability
    assert torch.equal(weights(pi, mu, mask, "prefix", 2.0)[:, : t + 1], before[:, : t + 1])
    assert torch.equal(before[:, 0], torch.ones(2, dtype=torch.float64))


def test_an_unknown_mode_and_a_bound_below_1_are_rejected():
    x = torch.zeros(1, T)
    modes = "none, token, token-mask, prefix, sequence, sequence-geometric"
    with pytest.raises(AssertionError, match=f"^mode must be one of {modes}, got 'tokens'"):
        correction_weights(x, x, x, mode="tokens", bound=2.0)
    reason = "a lower bound would change the weights of on-policy rollouts"
    with pytest.raises(AssertionError, match=f"^bound must be >= 1, got 0.5: {reason}"):
        correction_weights(x, x, x, mode="token", bound=0.5)


def test_every_mode_equals_values_computed_by_hand():
    pi, mu = np.array([[0.4, 0.1, 0.6, 0.5]]), np.array([[0.1, 0.2, 0.2, 0.5]])  # ratios 4, 1/2, 3, 1
    mask = np.array([[True, True, True, True]])
    expected_weights = {
        "none": [1, 1, 1, 1],
        "token": [2.5, 0.5, 2.5, 1],
        "token-mask": [0, 0.5, 0, 1],
        "prefix": [1, 2.5, 1.25, 3.125],
        "sequence": [2.5, 2.5, 2.5, 2.5],
        "sequence-geometric": [6**0.25] * 4,
    }
    assert set(expected_weights) == set(MODES)
    for mode, expected in expected_weights.items():
        np.testing.assert_allclose(weights(pi, mu, mask, mode, 2.5).numpy()[0], expected)


def test_engine_noise_makes_the_prefix_weights_of_long_sequences_unusable():
    """A limit of `prefix`: engine and learner hold equal weights but differ by 0.01 nats on average, as in bfloat16.

    With bound 1, truncation keeps the errors of one sign and removes those of the other, so the weights go to 0. With
    bound 2 their mean stays near 1, but single weights are far from 1.
    """
    generator = torch.Generator().manual_seed(0)
    scale = 0.01 * math.sqrt(math.pi / 2)  # a Gaussian with this scale has a mean absolute value of 0.01
    log_rho = scale * torch.randn(64, 4000, generator=generator, dtype=torch.float64) - scale**2 / 2  # E[rho] = 1
    log_mu, mask = torch.zeros_like(log_rho), torch.ones(log_rho.shape, dtype=torch.bool)
    at_1, at_2 = (correction_weights(log_rho, log_mu, mask, mode="prefix", bound=bound) for bound in (1.0, 2.0))
    assert at_1[:, 1000].max() < 0.02 and at_1[:, :1000].mean() < 0.25
    assert at_2.mean() == pytest.approx(1, abs=0.2) and at_2[:, -1].std() > 0.5
    token = correction_weights(log_rho, log_mu, mask, mode="token", bound=2.0)
    assert token.mean() == pytest.approx(1, abs=1e-3) and token.min() > 0.9

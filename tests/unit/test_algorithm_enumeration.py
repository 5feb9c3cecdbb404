"""Corrections against exact expectations: vocabulary 3, horizon 4, all 81 sequences.

Teacher pi, behaviour mu and student are independent random tables, conditional on the whole prefix.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from sgpo_async.algorithm import MODES, correction_weights
from tests.reference import enumeration

VOCABULARY, HORIZON = 3, 4
EVERY = enumeration.sequences(VOCABULARY, HORIZON)
seeds = pytest.mark.parametrize("seed", range(5))


def tables(seed, count):
    rng = np.random.default_rng(seed)
    return [enumeration.random_table(rng, VOCABULARY, HORIZON) for _ in range(count)]


def weights(pi, mu, sequence, mode, bound):
    log_pi, log_mu = (torch.from_numpy(enumeration.token_probabilities(p, sequence)).log() for p in (pi, mu))
    return correction_weights(log_pi, log_mu, torch.ones(HORIZON), mode=mode, bound=bound).numpy()


def corrected_kl(seed, mode, bound):
    """(E_mu[sum_t C_t d_t], E_pi[sum_t d_t])."""
    pi, mu, student = tables(seed, 3)

    def d(o):
        return enumeration.prefix_kl(pi, student, o)

    corrected = enumeration.expectation(mu, EVERY, lambda o: float(weights(pi, mu, o, mode, bound) @ d(o)))
    return corrected, enumeration.expectation(pi, EVERY, lambda o: float(d(o).sum()))


@seeds
@pytest.mark.parametrize("mode", ["prefix", "sequence"])
def test_without_truncation_the_expected_corrected_kl_equals_the_on_policy_kl(seed, mode):
    corrected, on_policy = corrected_kl(seed, mode, math.inf)
    assert corrected == pytest.approx(on_policy, abs=1e-12)


@seeds
def test_without_correction_the_expected_kl_differs_from_the_on_policy_kl(seed):
    corrected, on_policy = corrected_kl(seed, "none", math.inf)
    assert abs(corrected - on_policy) > 1e-3


@seeds
@pytest.mark.parametrize("mode", ["prefix", "sequence"])
def test_the_truncation_error_falls_to_0_as_the_bound_grows(seed, mode):
    errors = []
    for bound in (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, math.inf):
        corrected, on_policy = corrected_kl(seed, mode, bound)
        errors.append(on_policy - corrected)
    assert all(larger >= smaller - 1e-12 for larger, smaller in itertools.pairwise(errors))
    assert errors[0] > 1e-3
    assert errors[-1] == pytest.approx(0, abs=1e-12)


def per_token(seed, mode, bound, kept):
    """(E_mu[w_t f(o_t)], E_pi[f(o_t) 1[kept(rho_t)]]) at t = 0, where the prefix needs no correction."""
    pi, mu, f = *tables(seed, 2), np.random.default_rng(seed + 100).standard_normal(VOCABULARY)
    weighted = enumeration.expectation(mu, EVERY, lambda o: weights(pi, mu, o, mode, bound)[0] * f[o[0]])
    rho = pi[()] / mu[()]
    return weighted, sum(pi[()][v] * f[v] for v in range(VOCABULARY) if kept(rho[v]))


@seeds
def test_mode_token_corrects_the_token_given_its_prefix(seed):
    weighted, on_policy = per_token(seed, "token", math.inf, lambda _rho: True)
    assert weighted == pytest.approx(on_policy, abs=1e-12)


@seeds
def test_mode_token_mask_corrects_the_tokens_within_its_band(seed):
    weighted, on_policy = per_token(seed, "token-mask", 1.5, lambda rho: 1 / 1.5 <= rho <= 1.5)
    assert weighted == pytest.approx(on_policy, abs=1e-12)


@seeds
def test_the_geometric_mean_to_the_power_of_the_length_is_the_sequence_ratio(seed):
    pi, mu = tables(seed, 2)

    def total(o):
        return float(weights(pi, mu, o, "sequence-geometric", math.inf)[0] ** HORIZON)

    assert enumeration.expectation(mu, EVERY, total) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_changes_the_on_policy_expectation(mode):
    pi, student = tables(0, 2)

    def kl(o):
        return float(weights(pi, pi, o, mode, 1.0) @ enumeration.prefix_kl(pi, student, o))

    on_policy = enumeration.expectation(pi, EVERY, lambda o: float(enumeration.prefix_kl(pi, student, o).sum()))
    assert enumeration.expectation(pi, EVERY, kl) == pytest.approx(on_policy, abs=1e-12)

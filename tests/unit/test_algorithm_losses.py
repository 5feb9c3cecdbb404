"""The losses of GRPO, distillation, likelihood and SGPO (Eq. 1, 5, 7)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.algorithm import (
    LIMITERS,
    MODES,
    WHOLE_SEQUENCE_LIMITERS,
    Clip,
    correction_weights,
    distillation_loss,
    grpo_loss,
    is_clipped,
    kl_mass,
    limit,
    loss_weights,
    nll_loss,
    sgpo_loss,
    shaped_loss,
)
from tests.reference import sgpo as reference

N, T = 5, 7
SEEDS = st.integers(0, 2**32 - 1)
# Rounded to 6 digits: at 1 - 1e-16, say, floating-point error would decide on which side of the quantile a token is.
QUANTILES = st.floats(0, 1).map(lambda share: round(share, 6))


def batch(seed):
    """Log-probabilities under pi, prox and mu [N, T], advantages [N], and a mask of rollouts of 1 to T tokens."""
    rng = np.random.default_rng(seed)
    log_mu = np.log(rng.uniform(0.05, 1, (N, T)))
    log_prox, log_pi = (log_mu + 0.4 * rng.standard_normal((N, T)) for _ in range(2))
    mask = np.arange(T) < rng.integers(1, T + 1, (N, 1))
    return [torch.from_numpy(x) for x in (log_pi, log_prox, log_mu, rng.standard_normal(N), mask)]


def targets(seed):
    """d [N, T] with values below and above delta = 1, corrections [N, T], and a mask of targets of 1 to T tokens."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(1, T + 1, (N, 1))
    return [torch.from_numpy(x) for x in (rng.exponential(1, (N, T)), rng.uniform(0, 2, (N, T)), mask)]


class TestGRPO:
    @settings(deadline=None)
    @given(SEEDS, st.sampled_from([(0.2, 0.28), (0.1, 0.1), (0.2, 5.0)]))
    def test_equals_the_reference(self, seed, clip):
        log_pi, log_prox, log_mu, advantages, mask = batch(seed)
        c = correction_weights(log_prox, log_mu, mask, mode="token", bound=2.0)
        got = grpo_loss(log_pi, mask, advantages, correction=c, log_prox=log_prox, clip=Clip(*clip))
        for n in range(N):
            pi, prox, weights = (x[n, mask[n]].numpy() for x in (log_pi.exp(), log_prox.exp(), c))
            expected = reference.grpo_loss(pi, prox, weights, advantages[n].item(), clip)
            assert got[n].item() == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_gradient_equals_finite_differences(self, seed):
        log_pi, log_prox, _, advantages, mask = batch(seed)
        c = torch.rand(N, T, dtype=torch.float64)

        def loss(x):
            return grpo_loss(x, mask, advantages, correction=c, log_prox=log_prox)

        assert torch.autograd.gradcheck(loss, log_pi.requires_grad_())

    def test_by_default_the_gradient_is_the_corrected_policy_gradient(self):
        log_pi, _, log_mu, advantages, mask = batch(0)
        log_pi.requires_grad_()
        c = correction_weights(log_pi, log_mu, mask, mode="token", bound=2.0)
        grpo_loss(log_pi, mask, advantages, correction=c).sum().backward()
        torch.testing.assert_close(log_pi.grad, -c * advantages[:, None] * mask / mask.sum(-1, keepdim=True))

    @pytest.mark.parametrize(("advantage", "shift"), [(1.0, 0.3), (-1.0, -0.3)])
    def test_a_token_beyond_the_clip_has_no_gradient(self, advantage, shift):
        log_pi = torch.tensor([[shift, 0.0]], requires_grad=True)
        one = torch.ones(1, 2)
        loss = grpo_loss(log_pi, one.bool(), torch.tensor([advantage]), correction=one, log_prox=torch.zeros(1, 2))
        loss.sum().backward()
        assert log_pi.grad.tolist() == [[0.0, -advantage / 2]]

    @settings(deadline=None)
    @given(SEEDS, st.sampled_from([(0.2, 0.28, 1.5), (0.1, 0.1, 3.0), (0.2, 0.28, math.inf)]))
    def test_with_the_behaviour_policy_as_the_old_one_it_is_ppo_with_a_dual_clip(self, seed, clip):
        low, high, dual = clip
        log_pi, _, log_mu, advantages, mask = batch(seed)
        log_pi.requires_grad_()
        ones = torch.ones(N, T, dtype=torch.float64)
        losses = grpo_loss(log_pi, mask, advantages, correction=ones, log_prox=log_mu, clip=Clip(*clip))
        losses.sum().backward()
        clipped = is_clipped(log_pi - log_mu, advantages, Clip(*clip))
        for n in range(N):
            a, total, length = advantages[n].item(), 0.0, int(mask[n].sum())
            for t in range(length):
                r = math.exp(log_pi[n, t].item() - log_mu[n, t].item())
                term = min(r * a, min(max(r, 1 - low), 1 + high) * a)
                term = max(term, dual * a) if a < 0 and dual < math.inf else term
                total += term
                passes = r <= 1 + high if a > 0 else 1 - low <= r <= dual
                assert clipped[n, t].item() == (not passes)
                assert log_pi.grad[n, t].item() == pytest.approx(-(r if passes else 0.0) * a / length, abs=1e-12)
            assert losses[n].item() == pytest.approx(-total / length, abs=1e-12)

    def test_a_huge_ratio_gives_a_finite_loss_and_gradient(self):
        log_pi = torch.tensor([[0.0, 0.0]], requires_grad=True)
        old, ones = torch.tensor([[-300.0, 0.0]]), torch.ones(1, 2)
        clip = Clip(dual=3.0)
        loss = grpo_loss(log_pi, ones.bool(), torch.tensor([-1.0]), correction=ones, log_prox=old, clip=clip)
        loss.sum().backward()
        assert loss.item() == pytest.approx((3 + 1) / 2)
        assert log_pi.grad.tolist() == [[0.0, 0.5]]

    def test_no_gradient_reaches_the_correction_or_the_proximal_policy(self):
        log_pi, log_prox, log_mu, advantages, mask = (x.requires_grad_(x.is_floating_point()) for x in batch(1))
        grpo_loss(log_pi, mask, advantages, correction=log_mu.exp(), log_prox=log_prox).sum().backward()
        assert log_pi.grad is not None
        assert log_prox.grad is log_mu.grad is advantages.grad is None

    @pytest.mark.parametrize("mode", MODES)
    def test_on_policy_every_correction_gives_exactly_the_uncorrected_loss(self, mode):
        log_pi, _, _, advantages, mask = batch(2)
        log_pi = log_pi.float().requires_grad_()
        c = correction_weights(log_pi, log_pi.detach().clone(), mask, mode=mode, bound=2.0)
        results = []
        for correction in (c, torch.ones(N, T)):
            loss = grpo_loss(log_pi, mask, advantages.float(), correction=correction)
            results.append((loss, *torch.autograd.grad(loss.sum(), log_pi)))
        for corrected, plain in zip(*results, strict=True):
            assert torch.equal(corrected, plain)

    def test_padding_does_not_change_the_loss_of_a_sequence(self):
        log_pi, log_prox, log_mu, advantages, mask = batch(3)
        c = correction_weights(log_prox, log_mu, mask, mode="prefix", bound=2.0)
        padded = grpo_loss(log_pi, mask, advantages, correction=c, log_prox=log_prox)
        for n in range(N):
            keep = slice(0, int(mask[n].sum()))
            pi, prox, mu, m = (x[n : n + 1, keep] for x in (log_pi, log_prox, log_mu, mask))
            c = correction_weights(prox, mu, m, mode="prefix", bound=2.0)
            alone = grpo_loss(pi, m, advantages[n : n + 1], correction=c, log_prox=prox)
            torch.testing.assert_close(alone[0], padded[n], rtol=0, atol=1e-12)

    def test_nan_in_the_padding_reaches_neither_value_nor_gradient(self):
        log_pi, _, _, advantages, mask = batch(4)
        clean = grpo_loss(log_pi, mask, advantages, correction=torch.ones(N, T))
        spoiled = log_pi.masked_fill(~mask, math.nan).requires_grad_()
        loss = grpo_loss(spoiled, mask, advantages, correction=torch.ones(N, T))
        assert torch.equal(loss, clean)
        assert torch.autograd.grad(loss.sum(), spoiled)[0].isfinite().all()


class TestDistillation:
    @settings(deadline=None)
    @given(SEEDS, st.floats(0.1, 3), QUANTILES, st.sampled_from(list(LIMITERS)))
    def test_equals_the_reference(self, seed, delta, quantile, limiter):
        d, c, mask = targets(seed)
        d.requires_grad_()
        got = distillation_loss(d, mask, c, delta=delta, limiter=limiter, quantile=quantile)
        (gradient,) = torch.autograd.grad(got.sum(), d)
        assert torch.count_nonzero(gradient[~mask]) == 0
        for n in range(N):
            kl, weights = d[n, mask[n]].detach().numpy(), c[n, mask[n]].numpy()
            values = reference.limited(kl, limiter, delta, quantile)
            assert got[n].item() == pytest.approx(sum(weights * values) / len(kl))
            factors = reference.limited_gradient_factors(kl, limiter, delta, quantile)
            np.testing.assert_allclose(gradient[n, mask[n]], weights * factors / len(kl), atol=1e-14)
            if limiter == "mask":
                assert got[n].item() == pytest.approx(reference.distillation_loss(kl, weights, delta))

    @pytest.mark.parametrize("limiter", LIMITERS)
    def test_values_in_the_padding_have_no_effect(self, limiter):
        d, _, mask = targets(0)
        clean = limit(d, mask, limiter=limiter, delta=1.0, quantile=0.8)
        spoiled = d.masked_fill(~mask, math.nan).requires_grad_()
        found = limit(spoiled, mask, limiter=limiter, delta=1.0, quantile=0.8)
        assert torch.equal(found, clean)
        assert torch.count_nonzero(found[~mask]) == 0
        assert torch.autograd.grad(found.sum(), spoiled)[0].isfinite().all()

    @pytest.mark.parametrize("limiter", LIMITERS)
    def test_each_target_is_limited_independently(self, limiter):
        d, c, mask = targets(3)
        together = distillation_loss(d, mask, c, limiter=limiter, quantile=0.5)
        for n in range(N):
            own = mask[n : n + 1, : int(mask[n].sum())]
            alone = distillation_loss(
                d[n : n + 1, : own.shape[1]], own, c[n : n + 1, : own.shape[1]], limiter=limiter, quantile=0.5
            )
            torch.testing.assert_close(alone[0], together[n], rtol=0, atol=1e-14)

    @pytest.mark.parametrize("limiter", LIMITERS)
    def test_the_declared_limiters_and_no_others_depend_on_later_tokens(self, limiter):
        d, mask = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.5, 0.4, 0.3, 2.0]]), torch.ones(2, 4).bool()
        found, changed = limit(d, mask, limiter=limiter, delta=0.35, quantile=0.5)
        assert torch.equal(found[:3], changed[:3]) == (limiter not in WHOLE_SEQUENCE_LIMITERS)

    def test_clamp_has_a_gradient_where_a_minimum_would_have_none(self):
        d = torch.tensor([[0.5, 1.0, 4.0, 0.0, -1e-9]], requires_grad=True)
        found = limit(d, torch.ones(1, 5).bool(), limiter="clamp", delta=1.0, quantile=1.0)
        assert torch.equal(found, torch.tensor([[0.5, 1.0, 1.0, 0.0, -1e-9]]))
        assert torch.equal(torch.autograd.grad(found.sum(), d)[0], torch.tensor([[1.0, 1.0, 0.25, 1.0, 1.0]]))

    def test_the_gradient_equals_finite_differences(self):
        d, c, mask = targets(0)
        assert torch.autograd.gradcheck(lambda x: distillation_loss(x, mask, c), d.requires_grad_())

    def test_a_token_at_delta_is_kept_and_the_divisor_is_the_length(self):
        d = torch.tensor([[1.0, 1.5, 0.5, 0.0]])
        one = torch.ones(1, 4)
        assert distillation_loss(d, one.bool(), one).item() == 1.5 / 4
        assert distillation_loss(d, one.bool(), one, limiter="none").item() == 3.0 / 4

    def test_loss_and_gradient_are_exactly_0_without_a_target(self):
        d, c, _ = targets(1)
        d.requires_grad_()
        loss = distillation_loss(d, torch.zeros(N, T, dtype=torch.bool), c)
        assert torch.equal(loss, torch.zeros(N, dtype=torch.float64))
        assert torch.equal(torch.autograd.grad(loss.sum(), d)[0], torch.zeros_like(d))

    def test_no_gradient_reaches_the_correction_of_distillation(self):
        d, c, mask = targets(2)
        distillation_loss(d.requires_grad_(), mask, c.requires_grad_()).sum().backward()
        assert c.grad is None

    @settings(deadline=None)
    @given(SEEDS, st.floats(0.1, 3))
    def test_the_masked_kl_is_the_kl_that_the_mask_removes(self, seed, delta):
        d, _, mask = targets(seed)
        mass = kl_mass(d, mask, delta=delta)
        kept, whole = (
            distillation_loss(d, mask, torch.ones(N, T), delta=delta, limiter=name) for name in ("mask", "none")
        )
        torch.testing.assert_close(mass.kl, whole * mass.tokens)
        torch.testing.assert_close(mass.masked_kl, (whole - kept) * mass.tokens)
        for n in range(N):
            assert mass.tokens[n] == mask[n].sum()
            assert mass.masked_tokens[n] == sum(x > delta for x in d[n, mask[n]].tolist())


class TestLikelihood:
    @settings(deadline=None)
    @given(SEEDS, st.floats(0.01, 2))
    def test_equals_the_reference(self, seed, gamma):
        log_pi, *_, mask = batch(seed)
        plain, shaped = nll_loss(log_pi, mask), shaped_loss(log_pi, mask, gamma=gamma)
        for n in range(N):
            pi = log_pi[n, mask[n]].exp().numpy()
            assert plain[n].item() == pytest.approx(reference.nll_loss(pi))
            assert shaped[n].item() == pytest.approx(reference.shaped_loss(pi, gamma))

    def test_gradients_equal_finite_differences(self):
        log_pi, *_, mask = batch(0)
        for loss in (nll_loss, shaped_loss):
            assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, mask), log_pi.requires_grad_())

    def test_the_shaped_gradient_is_largest_for_tokens_of_probability_gamma(self):
        p = torch.linspace(0.01, 1, 100, dtype=torch.float64)
        log_pi = p.log()[None].requires_grad_()
        loss = shaped_loss(log_pi, torch.ones(1, 100).bool(), gamma=0.1)
        gradient = -100 * torch.autograd.grad(loss.sum(), log_pi)[0][0]
        torch.testing.assert_close(gradient, 0.1 * p / (p + 0.1) ** 2)
        assert p[gradient.argmax()].item() == pytest.approx(0.1)

    def test_sequences_without_tokens_have_loss_0_and_nan_in_the_padding_has_no_effect(self):
        log_pi, *_, mask = batch(1)
        mask[0] = False
        spoiled = log_pi.masked_fill(~mask, math.nan).requires_grad_()
        for loss in (nll_loss, shaped_loss):
            value = loss(spoiled, mask)
            assert value[0] == 0
            assert torch.autograd.grad(value.sum(), spoiled)[0].isfinite().all()


class TestSGPO:
    P, G1 = 6, 4

    def problems(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        grpo = torch.randn(self.P, self.G1, dtype=torch.float64, generator=g)
        distillation, alpha = torch.rand(2, self.P, dtype=torch.float64, generator=g)
        return grpo, distillation, alpha, torch.tensor([True, False, True, True, False, True])

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_the_reference(self, seed):
        batch = self.problems(seed)
        expected = reference.sgpo_loss(*(x.numpy() for x in batch))
        assert sgpo_loss(*batch).item() == pytest.approx(expected, abs=1e-12)

    def test_no_gradient_reaches_alpha(self):
        grpo, distillation, alpha, found = self.problems()
        sgpo_loss(grpo.requires_grad_(), distillation, alpha.requires_grad_(), found).backward()
        assert alpha.grad is None

    def test_without_a_target_the_weight_is_0_for_every_alpha(self):
        *_, alpha, found = self.problems()
        weights = loss_weights(alpha, found, problems=self.P, group_size=self.G1)
        assert torch.equal(weights.guided == 0, ~found)

    @pytest.mark.parametrize("size", [1, 2, 4, 5, 6])
    def test_micro_batches_of_problems_sum_to_the_whole_batch(self, size):
        grpo, distillation, alpha, found = self.problems()
        total = torch.zeros((), dtype=torch.float64)
        for i in range(0, self.P, size):
            part = slice(i, i + size)
            weights = loss_weights(alpha[part], found[part], problems=self.P, group_size=self.G1)
            for loss in grpo[part].flatten():
                total += weights.autonomous * loss
            total += weights.guided @ distillation[part]
        torch.testing.assert_close(total, sgpo_loss(grpo, distillation, alpha, found), rtol=0, atol=1e-12)

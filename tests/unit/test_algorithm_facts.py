"""Properties of the whole SGPO loss, on a very small policy.

The policy is one output matrix W [V, H]: the logits are features @ W.T, and the features differ between prompts with
and without the strategy. Teacher and student share W on purpose: the test checks that the teacher gets no gradient.
"""

import pytest
import torch

from sgpo_async.algorithm import (
    adaptive_weight,
    correction_weights,
    distillation_loss,
    forward_kl,
    group_advantages,
    grpo_loss,
    loss_weights,
    select_reachable,
    sgpo_loss,
)

P, G1, G2, T, H, V = 3, 4, 2, 5, 6, 7
N = P * G1


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def lengths(n):
        return torch.arange(T) < torch.randint(1, T + 1, (n, 1), generator=g)

    return {
        "W": randn(V, H).requires_grad_(),
        "auto": randn(N, T, H),
        "auto_tokens": torch.randint(V, (N, T), generator=g),
        "auto_mask": lengths(N),
        "unguided": randn(P, T, H),
        "guided": randn(P, T, H),
        "guided_tokens": torch.randint(V, (P, T), generator=g),
        "guided_mask": lengths(P),
        "rewards": torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.float64),
        "guided_rewards": torch.tensor([[1.0, 1], [1, 0], [0, 1]], dtype=torch.float64),
        "lag": 0.3 * randn(N, T),
        "guided_lag": 0.3 * randn(P, T),
    }


def log_prob(features, weight, tokens):
    return (features @ weight.T).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def grpo(b, keep=slice(None)):
    features, tokens, mask = b["auto"][keep], b["auto_tokens"][keep], b["auto_mask"][keep]
    log_pi = log_prob(features, b["W"], tokens)
    c = correction_weights(log_pi, log_pi + b["lag"][keep], mask, mode="token", bound=2.0)
    return grpo_loss(log_pi, mask, group_advantages(b["rewards"]).flatten()[keep], correction=c)


def distillation(b, keep=slice(None)):
    tokens, mask = b["guided_tokens"][keep], b["guided_mask"][keep]
    teacher, student = (b[name][keep] @ b["W"].T for name in ("guided", "unguided"))
    d, log_teacher = forward_kl(teacher, student), log_prob(b["guided"][keep], b["W"], tokens)
    c = correction_weights(log_teacher, log_teacher + b["guided_lag"][keep], mask, mode="prefix", bound=2.0)
    return distillation_loss(d, mask, c, limiter="none")


def alpha_and_found(b):
    alpha = adaptive_weight(b["rewards"].mean(-1), b["guided_rewards"].mean(-1))
    _, found = select_reachable(torch.zeros(P, G2), b["guided_rewards"])
    return alpha, found


def value_and_gradient(loss, b):
    return loss.detach(), *torch.autograd.grad(loss, b["W"])


def whole(b, alpha=None):
    adaptive, found = alpha_and_found(b)
    alpha = adaptive if alpha is None else alpha
    return value_and_gradient(sgpo_loss(grpo(b).view(P, G1), distillation(b), alpha, found), b)


def test_alpha_0_gives_exactly_the_grpo_loss_and_gradient(batch):
    weights = loss_weights(torch.zeros(P), torch.ones(P).bool(), problems=P, group_size=G1)
    expected = value_and_gradient(weights.autonomous * grpo(batch).sum(), batch)
    for got, plain in zip(whole(batch, torch.zeros(P, dtype=torch.float64)), expected, strict=True):
        assert torch.equal(got, plain)


def test_without_a_correct_guided_rollout_the_loss_is_exactly_grpo(batch):
    batch["guided_rewards"] = torch.zeros(P, G2, dtype=torch.float64)
    assert adaptive_weight(torch.zeros(1), torch.zeros(1)).item() == 0.5  # Eq. 6 alone would give a positive weight
    expected = whole(batch, torch.zeros(P, dtype=torch.float64))
    for got, plain in zip(whole(batch), expected, strict=True):
        assert torch.equal(got, plain)


def test_an_empty_strategy_distils_nothing(batch):
    batch["guided"] = batch["unguided"].clone()
    loss = distillation(batch)
    assert torch.equal(loss, torch.zeros(P, dtype=torch.float64))
    assert torch.autograd.grad(loss.sum(), batch["W"])[0].abs().max() < 1e-14


def test_a_uniform_group_still_learns_from_the_strategy(batch):
    alpha, found = alpha_and_found(batch)
    assert batch["rewards"][1].sum() == 0
    assert (alpha[1].item(), found[1].item()) == (0.8, True)
    assert torch.equal(grpo(batch)[G1 : 2 * G1], torch.zeros(G1, dtype=torch.float64))
    assert distillation(batch)[1] > 0


def test_the_gradient_equals_central_differences_with_teacher_and_correction_fixed(batch):
    """Only the distillation term is compared: the value of the GRPO term is constant by construction (r_t = 1)."""
    W, step = batch["W"], 1e-6
    gradient = torch.autograd.grad(distillation(batch).sum(), W)[0]
    mask, fixed = batch["guided_mask"], W.detach().clone()
    log_teacher = log_prob(batch["guided"], fixed, batch["guided_tokens"])
    c = correction_weights(log_teacher, log_teacher + batch["guided_lag"], mask, mode="prefix", bound=2.0)

    def loss(weight):
        d = forward_kl(batch["guided"] @ fixed.T, batch["unguided"] @ weight.T)
        return distillation_loss(d, mask, c, limiter="none").sum()

    for v in range(V):
        for h in range(H):
            delta = torch.zeros_like(W)
            delta[v, h] = step
            with torch.no_grad():
                slope = (loss(W + delta) - loss(W - delta)) / (2 * step)
            assert gradient[v, h].item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_micro_batches_of_any_size_sum_to_the_whole_batch(batch, size):
    alpha, found = alpha_and_found(batch)
    weights = loss_weights(alpha, found, problems=P, group_size=G1)
    total, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(batch["W"])
    parts = [weights.autonomous * grpo(batch, slice(i, i + size)).sum() for i in range(0, N, size)]
    parts += [(weights.guided[i : i + size] * distillation(batch, slice(i, i + size))).sum() for i in range(0, P, size)]
    for part in parts:
        value, grad = value_and_gradient(part, batch)
        total, gradient = total + value, gradient + grad
    expected = whole(batch)
    torch.testing.assert_close(total, expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-10)

"""Truncated sampling (top-p, top-k): what is kept, renormalised, compared with enumeration of all completions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from sgpo_async.algorithm import Kept, LogProbability, Part, TeacherDivergence, correction_weights, linear_loss

V, T, H = 11, 9, 6
TEMPERATURE = 0.7


def naive_kept(probabilities: Sequence[float], top_p: float, top_k: int) -> list[int]:
    """The likeliest tokens, one after another, until they have `top_p` together or are `top_k` (0: no limit)."""
    kept: list[int] = []
    for token in sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token)):
        kept.append(token)
        if sum(probabilities[own] for own in kept) >= top_p or len(kept) == top_k:
            break
    return kept


def kept_sets(sets: Sequence[Sequence[int]], targets: Sequence[int]) -> Kept:
    """As an engine reports them: without the targets."""
    others = [[token for token in kept if token != target] for kept, target in zip(sets, targets, strict=True)]
    flat = [token for own in others for token in own]
    return Kept(np.array(flat, np.int32), np.array([len(own) for own in others], np.int32))


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """Hidden states, an output matrix, targets, and kept sets of 1 to V tokens, each with its target."""
    rng = np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.normal(size=(T, H))).requires_grad_()
    weight = torch.from_numpy(rng.normal(size=(V, H))).requires_grad_()
    targets = torch.from_numpy(rng.integers(0, V, T))
    sizes = [1, V, 2, 3, 1, 5, V - 1, 4, 2]
    sets = []
    for target, size in zip(targets.tolist(), sizes, strict=True):
        others = [token for token in rng.permutation(V).tolist() if token != target]
        sets.append([target, *others[: size - 1]])
    return hidden, weight, targets, sets


def masked_log_softmax(logits: Tensor, sets: Sequence[Sequence[int]]) -> Tensor:
    """The definition: log softmax(z/T) of logits that are -inf outside of the kept set."""
    outside = torch.ones_like(logits, dtype=torch.bool)
    for row, kept in enumerate(sets):
        outside[row, kept] = False
    return torch.log_softmax(logits.masked_fill(outside, -torch.inf) / TEMPERATURE, -1)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, T, 100])
def test_log_probability_entropy_and_gradient_are_those_of_the_renormalised_distribution(
    chunk: int, whole: bool
) -> None:
    hidden, weight, targets, sets = inputs()
    upstream = torch.linspace(-1, 2, T, dtype=torch.float64)
    measure = LogProbability(targets, kept_sets(sets, targets.tolist()))
    part = Part(measure, lambda value, _: (value * upstream).sum(), whole)
    loss, (found,) = linear_loss(hidden, weight, [part], temperature=TEMPERATURE, chunk=chunk)

    log_q = masked_log_softmax(hidden @ weight.T, sets)
    expected = log_q[torch.arange(T), targets]
    entropy = -torch.stack([(row[kept].exp() * row[kept]).sum() for row, kept in zip(log_q, sets, strict=True)])
    torch.testing.assert_close(found.value, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.aside, entropy.detach(), rtol=0, atol=1e-12)
    assert (found.value[[0, 4]] == 0).all(), "a token that was kept alone is certain"
    fused = torch.autograd.grad(loss, (hidden, weight))
    plain = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [2, T])
def test_of_a_teacher_only_its_log_probability_is_renormalised(chunk: int) -> None:
    hidden, weight, targets, sets = inputs()
    states, matrix, _, _ = inputs(1)
    states, matrix = states.detach(), matrix.detach()
    found = [
        linear_loss(
            hidden,
            weight,
            [Part(TeacherDivergence(states, matrix, targets, "forward", kept), lambda d, _: d.sum())],
            temperature=TEMPERATURE,
            chunk=chunk,
        )[1][0]
        for kept in (None, kept_sets(sets, targets.tolist()))
    ]
    assert torch.equal(found[0].value, found[1].value)
    expected = masked_log_softmax(states @ matrix.T, sets)[torch.arange(T), targets]
    torch.testing.assert_close(found[1].aside, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, 0), (0.95, 3), (1.0, 2)])
def test_the_policy_gradient_over_all_completions_is_that_of_the_expected_reward(top_p: float, top_k: int) -> None:
    """Sum mu(o) times the gradient of each completion's loss over all completions of two tokens, without sampling.

    The policy is truncated to what the behaviour policy, which has other weights, kept. Its expected reward and the
    gradient of that are computed by enumeration. Correction weights are those of the whole sequence, without a bound.
    """
    vocabulary = 5
    rng = np.random.default_rng(3)
    shape = (vocabulary, 1 + vocabulary)  # a matrix of logits: one state before the first token, one after each token
    behaviour, policy = (torch.from_numpy(rng.normal(scale=1.5, size=shape)) for _ in range(2))
    policy.requires_grad_()
    rewards = torch.from_numpy(rng.normal(size=(vocabulary, vocabulary)))
    mu = torch.softmax(behaviour.T / TEMPERATURE, -1).numpy()
    sets = [naive_kept(row, top_p, top_k) for row in mu]
    assert any(len(kept) < vocabulary for kept in sets) and any(len(kept) > 1 for kept in sets)

    def log_probability(matrix: Tensor, state: int, token: int) -> Tensor:
        logits = matrix[:, state] / TEMPERATURE
        return logits[token] - logits[sets[state]].logsumexp(0)

    possible = [(a, b) for a in sets[0] for b in sets[1 + a]]
    expected_reward = sum(
        (
            (log_probability(policy, 0, a) + log_probability(policy, 1 + a, b)).exp() * rewards[a, b]
            for a, b in possible
        ),
        torch.zeros((), dtype=torch.float64),
    )
    (exact,) = torch.autograd.grad(expected_reward, policy)

    estimate, total = torch.zeros_like(exact), 0.0
    for a, b in itertools.product(range(vocabulary), repeat=2):
        if (a, b) not in possible:
            continue
        log_mu = torch.stack([log_probability(behaviour, 0, a), log_probability(behaviour, 1 + a, b)])
        total += float(log_mu.sum().exp())
        states = torch.eye(1 + vocabulary, dtype=torch.float64)[[0, 1 + a]]
        kept = kept_sets([sets[0], sets[1 + a]], [a, b])

        def loss(log_pi: Tensor, _: Tensor, log_mu: Tensor = log_mu, reward: float = float(rewards[a, b])) -> Tensor:
            mask = torch.ones(1, 2, dtype=torch.bool)
            weights = correction_weights(log_pi[None], log_mu[None], mask, mode="sequence", bound=float("inf"))
            return (weights.detach() * log_pi[None]).sum() * reward

        part = Part(LogProbability(torch.tensor([a, b]), kept), loss, whole=True)
        value, _ = linear_loss(states, policy, [part], temperature=TEMPERATURE)
        estimate += log_mu.sum().exp() * torch.autograd.grad(value, policy)[0]
    assert total == pytest.approx(1, abs=1e-12), "the behaviour probabilities of all possible completions"
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-12)


def test_ratios_over_the_whole_vocabulary_would_be_biased() -> None:
    """By enumeration: E_mu[pi/mu] is 1 over the kept tokens, and another number over the vocabulary."""
    rng = np.random.default_rng(5)
    behaviour, policy = (np.exp(rng.normal(size=V)) for _ in range(2))
    mu, pi = behaviour / behaviour.sum(), policy / policy.sum()
    kept = naive_kept(mu, 0.8, 0)
    renormalised = mu[kept] / mu[kept].sum()
    exact = renormalised @ (pi[kept] / pi[kept].sum() / renormalised)
    plain = renormalised @ (pi[kept] / mu[kept])
    assert exact == pytest.approx(1)
    assert abs(plain - 1) > 0.05

"""Divergences between teacher and student (Eq. 3): values, gradients, and no gradient for the teacher."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sgpo_async.algorithm import DIVERGENCES, divergence, forward_kl
from sgpo_async.algorithm.divergences import divergence_of
from tests.reference import sgpo as reference

LOGITS = arrays(np.float64, (3, 5), elements=st.floats(-8, 8))
TEMPERATURES = st.floats(0.3, 3)
kinds = pytest.mark.parametrize("kind", DIVERGENCES)


def logits(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@kinds
@settings(deadline=None)
@given(LOGITS, LOGITS, TEMPERATURES)
def test_equals_the_reference(kind, teacher, student, temperature):
    got = divergence(torch.from_numpy(teacher), torch.from_numpy(student), kind=kind, temperature=temperature)
    np.testing.assert_allclose(got.numpy(), reference.DIVERGENCES[kind](teacher, student, temperature), atol=1e-12)


@settings(deadline=None)
@given(LOGITS, LOGITS, st.floats(1e-3, 1.0))
def test_the_clipped_forward_kl_bounds_each_term_of_the_sum(teacher, student, clip):
    log_p, log_q = (torch.from_numpy(x).log_softmax(-1) for x in (teacher, student))
    p = log_p.exp()
    expected = [
        sum(min(float(p[t, v] * (log_p[t, v] - log_q[t, v])), clip) for v in range(p.shape[1])) for t in range(len(p))
    ]
    np.testing.assert_allclose(divergence_of("forward", clip).value(log_p, log_q).numpy(), expected, atol=1e-12)


def test_the_slope_of_the_clipped_forward_kl_is_its_derivative_and_clipped_terms_have_none():
    teacher, student = 3 * logits(1, 4, 6), 3 * logits(2, 4, 6)
    log_p, clip = teacher.log_softmax(-1), 0.05
    z = student.clone().requires_grad_()
    value, slope = divergence_of("forward", clip)
    d = value(log_p, z.log_softmax(-1))
    (expected,) = torch.autograd.grad(d.sum(), z)
    torch.testing.assert_close(slope(log_p, student.log_softmax(-1)), expected, atol=1e-12, rtol=0)
    terms = log_p.exp() * (log_p - student.log_softmax(-1))
    assert (terms > clip).any() and (terms < clip).any()
    assert torch.equal(divergence_of("forward").value(log_p, log_p), torch.zeros(4, dtype=torch.float64))


def test_every_kind_has_a_reference_and_forward_is_eq_3():
    assert DIVERGENCES.keys() == reference.DIVERGENCES.keys()
    teacher, student = logits(1, 4, 6), logits(2, 4, 6)
    assert torch.equal(divergence(teacher, student, temperature=0.7), forward_kl(teacher, student, temperature=0.7))


@kinds
@settings(deadline=None)
@given(LOGITS, LOGITS)
def test_a_divergence_is_never_negative(kind, teacher, student):
    d = divergence(torch.from_numpy(teacher), torch.from_numpy(student), kind=kind)
    assert (d >= -1e-12).all()
    assert kind != "jensen-shannon" or (d <= math.log(2) + 1e-12).all()


def test_jensen_shannon_is_symmetric_and_the_others_are_not():
    teacher, student = logits(1, 4, 6), logits(2, 4, 6)
    for kind in DIVERGENCES:
        forward, backward = divergence(teacher, student, kind=kind), divergence(student, teacher, kind=kind)
        assert torch.allclose(forward, backward) == (kind == "jensen-shannon")


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_divergence_between_identical_logits_is_0(kind, dtype):
    """Exactly 0, except for rounding in the mixture of Jensen-Shannon."""
    same = logits(0, 7, 11).to(dtype)
    d = divergence(same, same.clone(), kind=kind, temperature=0.7)
    assert d.dtype == dtype
    assert torch.allclose(d, torch.zeros(7, dtype=dtype), rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert kind == "jensen-shannon" or torch.equal(d, torch.zeros(7, dtype=dtype))


def test_any_leading_dimensions_are_accepted():
    teacher, student = logits(1, 2, 4, 3, 5), logits(2, 2, 4, 3, 5)
    flat = forward_kl(teacher.reshape(-1, 5), student.reshape(-1, 5))
    torch.testing.assert_close(forward_kl(teacher, student), flat.view(2, 4, 3))


@kinds
def test_the_gradient_of_the_student_equals_finite_differences(kind):
    teacher, student = logits(3, 4, 6), logits(4, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: divergence(teacher, s, kind=kind, temperature=0.8), student)


@kinds
def test_the_slope_is_the_gradient_and_shared_logits_give_none_to_the_teacher(kind):
    shared = logits(5, 4, 6).requires_grad_()
    shift = logits(6, 4, 6)
    divergence(shared + shift, shared, kind=kind).sum().backward()
    log_p, log_q = ((shared + x).detach().log_softmax(-1) for x in (shift, 0))
    torch.testing.assert_close(shared.grad, DIVERGENCES[kind].slope(log_p, log_q))


@kinds
def test_a_token_of_probability_0_on_both_sides_has_no_effect(kind):
    teacher, student = logits(7, 4, 6), logits(8, 4, 6)
    excluded = torch.full((4, 2), -torch.inf, dtype=torch.float64)
    log_p, log_q = (torch.cat([x, excluded], -1).log_softmax(-1) for x in (teacher, student))
    value, slope = (f(log_p, log_q) for f in DIVERGENCES[kind])
    torch.testing.assert_close(value, divergence(teacher, student, kind=kind))
    torch.testing.assert_close(slope[:, :-2], DIVERGENCES[kind].slope(log_p[:, :-2], log_q[:, :-2]))
    assert torch.equal(slope[:, -2:], torch.zeros_like(excluded))

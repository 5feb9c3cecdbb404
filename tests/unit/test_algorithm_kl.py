"""Forward KL from teacher to student (Eq. 3)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sgpo_async.algorithm import forward_kl
from tests.reference import sgpo as reference

LOGITS = arrays(np.float64, (3, 5), elements=st.floats(-8, 8))
TEMPERATURES = st.floats(0.3, 3)


def logits(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(LOGITS, LOGITS, TEMPERATURES)
def test_equals_the_reference(teacher, student, temperature):
    got = forward_kl(torch.from_numpy(teacher), torch.from_numpy(student), temperature=temperature)
    np.testing.assert_allclose(got.numpy(), reference.forward_kl(teacher, student, temperature), atol=1e-12)


@settings(deadline=None)
@given(LOGITS, LOGITS)
def test_is_never_negative(teacher, student):
    assert (forward_kl(torch.from_numpy(teacher), torch.from_numpy(student)) >= -1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_prompts_give_exactly_0(dtype):
    same = logits(0, 7, 11).to(dtype)
    d = forward_kl(same, same.clone(), temperature=0.7)
    assert d.dtype == dtype
    assert torch.equal(d, torch.zeros(7, dtype=dtype))


def test_leading_dimensions_are_arbitrary():
    teacher, student = logits(1, 2, 4, 3, 5), logits(2, 2, 4, 3, 5)
    flat = forward_kl(teacher.reshape(-1, 5), student.reshape(-1, 5))
    torch.testing.assert_close(forward_kl(teacher, student), flat.view(2, 4, 3))


def test_gradient_of_the_student_is_numerically_right():
    teacher, student = logits(3, 4, 6), logits(4, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: forward_kl(teacher, s, temperature=0.8), student)


def test_no_gradient_reaches_the_teacher_even_through_shared_logits():
    shared = logits(5, 4, 6).requires_grad_()
    shift = logits(6, 4, 6)
    forward_kl(shared + shift, shared).sum().backward()
    p, q = (shared + shift).softmax(-1), shared.softmax(-1)
    torch.testing.assert_close(shared.grad, (q - p).detach())


def test_a_word_that_both_exclude_counts_nothing():
    teacher, student = logits(7, 4, 6), logits(8, 4, 6)
    closed = torch.full((4, 2), -torch.inf, dtype=torch.float64)
    padded = torch.cat([student, closed], -1).requires_grad_()
    d = forward_kl(torch.cat([teacher, closed], -1), padded)
    torch.testing.assert_close(d, forward_kl(teacher, student))
    d.sum().backward()
    assert padded.grad.isfinite().all()

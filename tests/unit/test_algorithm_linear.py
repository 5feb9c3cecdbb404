"""Fused losses equal the plain losses in value and gradient, for any chunk size, with bounded memory."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgpo_async.algorithm import (
    DIVERGENCES,
    divergence,
    forward_kl,
    linear_divergence,
    linear_logprobs,
    linear_top_logprobs,
    top_divergence,
)
from tests.reference import sgpo as reference

T, H, H_TEACHER, V = 13, 5, 4, 11
TEMPERATURE = 0.8
chunks = pytest.mark.parametrize("chunk", [1, 4, 13, 1024])


def inputs(seed=0, rows=T):
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, H_TEACHER), (V, H_TEACHER), (rows, H), (V, H)]
    tensors = [torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes]
    return *tensors, torch.randint(V, (rows,), generator=g)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@chunks
def test_fused_logprobs_and_entropy_equal_the_plain_computation(chunk):
    _, _, hidden, weight, targets = inputs()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logp, entropy = linear_logprobs(hidden, weight, targets, temperature=TEMPERATURE, chunk=chunk)
    plain = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)[torch.arange(T), targets]
    torch.testing.assert_close(logp, plain, rtol=0, atol=1e-10)
    expected = reference.entropy((hidden @ weight.T).detach().numpy(), TEMPERATURE)
    np.testing.assert_allclose(entropy.numpy(), expected, atol=1e-10)
    assert not entropy.requires_grad
    upstream = torch.linspace(-1, 2, T, dtype=torch.float64)
    for fused, naive in zip(
        gradients(logp @ upstream, hidden, weight), gradients(plain @ upstream, hidden, weight), strict=True
    ):
        torch.testing.assert_close(fused, naive, rtol=0, atol=1e-10)


@chunks
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_fused_divergences_equal_the_plain_computation(chunk, kind):
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    teacher = teacher_hidden, teacher_weight
    d, log_teacher = linear_divergence(
        teacher, (hidden, weight), targets, kind=kind, temperature=TEMPERATURE, chunk=chunk
    )
    teacher_logits, student_logits = teacher_hidden @ teacher_weight.T, hidden @ weight.T
    plain = divergence(teacher_logits, student_logits, kind=kind, temperature=TEMPERATURE)
    torch.testing.assert_close(d, plain, rtol=0, atol=1e-10)
    expected = reference.DIVERGENCES[kind](teacher_logits.numpy(), student_logits.detach().numpy(), TEMPERATURE)
    np.testing.assert_allclose(d.detach().numpy(), expected, atol=1e-10)
    p = [reference.softmax(row, TEMPERATURE)[o] for row, o in zip(teacher_logits.numpy(), targets, strict=True)]
    np.testing.assert_allclose(log_teacher.numpy(), np.log(p), atol=1e-10)
    upstream = torch.linspace(-1, 2, T, dtype=torch.float64)
    for fused, naive in zip(
        gradients(d @ upstream, hidden, weight), gradients(plain @ upstream, hidden, weight), strict=True
    ):
        torch.testing.assert_close(fused, naive, rtol=0, atol=1e-10)


def most_likely(teacher_hidden, teacher_weight, k):
    """Return the teacher's k most likely tokens and their log-probabilities: [T, k], [T, k]."""
    log_p = (teacher_hidden @ teacher_weight.T / TEMPERATURE).log_softmax(-1)
    top = log_p.topk(k, -1)
    return top.indices, top.values


@chunks
@pytest.mark.parametrize("k", [1, 3, V - 1])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_top_k_teacher_equals_plain_loops_over_k_tokens_and_the_rest(chunk, k, kind):
    teacher_hidden, teacher_weight, hidden, weight, _ = inputs()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    tokens, log_p = most_likely(teacher_hidden, teacher_weight, k)
    log_q = linear_top_logprobs(hidden, weight, tokens, temperature=TEMPERATURE, chunk=chunk)
    teacher_logits, student_logits = teacher_hidden @ teacher_weight.T, hidden @ weight.T
    q = [reference.softmax(row, TEMPERATURE) for row in student_logits.detach().numpy()]
    p = [reference.softmax(row, TEMPERATURE) for row in teacher_logits.numpy()]
    lists = tokens.tolist()
    q, p = ([reference.merged(row, listed) for row, listed in zip(rows, lists, strict=True)] for rows in (q, p))
    np.testing.assert_allclose(log_q.detach().numpy(), np.log(np.array(q)), atol=1e-10)
    d = top_divergence(log_p, log_q, kind=kind)
    np.testing.assert_allclose(d.detach().numpy(), reference.top_divergence(p, q, kind), atol=1e-10)
    exact = divergence(teacher_logits, student_logits, kind=kind, temperature=TEMPERATURE)
    assert (d <= exact + 1e-10).all()
    upstream = torch.linspace(-1, 2, T, dtype=torch.float64)
    if k == V - 1:  # the rest is a single token, so nothing is merged
        torch.testing.assert_close(d, exact, rtol=0, atol=1e-10)
        pairs = gradients(d @ upstream, hidden, weight), gradients(exact @ upstream, hidden, weight)
        for fused, naive in zip(*pairs, strict=True):
            torch.testing.assert_close(fused, naive, rtol=0, atol=1e-10)
    elif k == 1:
        assert (d < exact - 1e-6).any()


def test_a_top_k_teacher_distributes_the_rest_in_the_student_s_proportions():
    """The gradient of the forward KL is q - p for this completed distribution p."""
    teacher_hidden, teacher_weight, hidden, weight, _ = inputs()
    tokens, log_p = most_likely(teacher_hidden, teacher_weight, 3)
    logits = (hidden @ weight.T).requires_grad_()
    log_q = linear_top_logprobs(logits, torch.eye(V, dtype=torch.float64), tokens, temperature=TEMPERATURE)
    (found,) = gradients(top_divergence(log_p, log_q).sum(), logits)
    for row, listed, log_known, gradient in zip(logits.detach().numpy(), tokens.tolist(), log_p, found, strict=True):
        q = reference.softmax(row, TEMPERATURE)
        p, rest = np.array(q), 1 - float(log_known.exp().sum())
        p *= rest / sum(x for v, x in enumerate(q) if v not in listed)
        p[listed] = log_known.exp().numpy()
        np.testing.assert_allclose(gradient.numpy(), (q - p) / TEMPERATURE, atol=1e-10)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("gap", [60.0, 2000.0])
def test_a_certain_teacher_or_student_gives_finite_values_and_gradients(kind, gap):
    """In float32 the probability of the rest may round to 0; with a gap of 2000 nats it is exactly 0."""
    logits = torch.zeros(2, V)
    logits[0, 2], logits[1, 5] = gap, gap
    student = logits.clone().requires_grad_()
    tokens, log_p = torch.tensor([[2, 3], [2, 3]]), torch.tensor([[0.0, -gap], [0.0, -gap]])
    d = top_divergence(log_p, linear_top_logprobs(student, torch.eye(V), tokens), kind=kind)
    (gradient,) = gradients(d.sum(), student)
    assert d.isfinite().all() and gradient.isfinite().all()
    assert abs(d[0]) < 1e-3 < d[1]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradients_equal_finite_differences(kind):
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs()
    student = hidden.requires_grad_(), weight.requires_grad_()
    tokens, log_p = most_likely(teacher_hidden, teacher_weight, 3)

    def top_distance(h, w):
        return top_divergence(log_p, linear_top_logprobs(h, w, tokens, temperature=TEMPERATURE, chunk=4), kind=kind)

    def logprobs(h, w):
        return linear_logprobs(h, w, targets, temperature=TEMPERATURE, chunk=4)[0]

    def distance(h, w):
        teacher = teacher_hidden, teacher_weight
        return linear_divergence(teacher, (h, w), targets, kind=kind, temperature=TEMPERATURE, chunk=4)[0]

    assert torch.autograd.gradcheck(logprobs, student)
    assert torch.autograd.gradcheck(distance, student)
    assert torch.autograd.gradcheck(top_distance, student)


def test_no_gradient_reaches_the_teacher_through_a_shared_weight():
    _, _, hidden, weight, targets = inputs()
    guided = (hidden * 1.5).requires_grad_()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    d, log_teacher = linear_divergence((guided, weight), (hidden, weight), targets, chunk=4)
    assert not log_teacher.requires_grad
    d.sum().backward()
    assert guided.grad is None
    frozen = guided.detach() @ weight.detach().T
    plain = gradients(forward_kl(frozen, hidden @ weight.T).sum(), hidden, weight)
    for fused, naive in zip((hidden.grad, weight.grad), plain, strict=True):
        torch.testing.assert_close(fused, naive, rtol=0, atol=1e-10)


def test_identical_teacher_and_student_give_exactly_0():
    _, _, hidden, weight, targets = inputs()
    d, _ = linear_divergence((hidden, weight), (hidden.clone(), weight), targets, chunk=4)
    assert torch.equal(d, torch.zeros(T, dtype=torch.float64))


def test_bfloat16_gradients_are_summed_in_float32():
    _, _, hidden, weight, targets = inputs(rows=512)
    hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    logp, entropy = linear_logprobs(hidden, weight, targets, chunk=1)
    assert logp.dtype == entropy.dtype == torch.float32
    fused = gradients(logp.sum(), hidden, weight)
    assert {x.dtype for x in fused} == {torch.bfloat16}
    exact_h, exact_w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact, _ = linear_logprobs(exact_h, exact_w, targets)
    _, grad_weight = gradients(exact.sum(), exact_h, exact_w)
    # Each row is rounded once. A running sum in bfloat16 would have an error above 0.1 here.
    error = (fused[1].double() - grad_weight).norm() / grad_weight.norm()
    assert error < 0.02


def test_empty_input_is_accepted():
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs(rows=0)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    d, log_teacher = linear_divergence((teacher_hidden, teacher_weight), (hidden, weight), targets)
    assert d.shape == log_teacher.shape == (0,)
    assert torch.equal(gradients(d.sum(), weight)[0], torch.zeros_like(weight))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_the_logits_of_all_rows_are_never_held_at_once():
    rows, chunk = 64, 8
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs(rows=rows)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as plain:
        forward_kl(teacher_hidden @ teacher_weight.T, hidden @ weight.T).sum().backward()
    with LargestTensor() as fused:
        d, _ = linear_divergence((teacher_hidden, teacher_weight), (hidden, weight), targets, chunk=chunk)
        logp, _ = linear_logprobs(hidden, weight, targets, chunk=chunk)
        log_top = linear_top_logprobs(hidden, weight, targets[:, None], chunk=chunk)
        (d + logp + log_top[:, 1]).sum().backward()
    assert plain.numel >= rows * V
    assert fused.numel <= max(chunk * V, rows * H, V * H) < rows * V

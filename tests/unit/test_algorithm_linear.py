"""Fused losses equal the plain losses in value and gradient, for any chunk size, with bounded memory."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgpo_async.algorithm import (
    DIVERGENCES,
    LIMITERS,
    MODES,
    WHOLE_SEQUENCE_LIMITERS,
    WHOLE_SEQUENCE_MODES,
    LogProbability,
    Part,
    TeacherDivergence,
    TopDivergence,
    correction_weights,
    distillation_loss,
    divergence,
    forward_kl,
    grpo_loss,
    linear,
    linear_loss,
)
from tests.reference import sgpo as reference

T, H, H_TEACHER, V = 13, 5, 4, 11
TEMPERATURE = 0.8
UPSTREAM = torch.linspace(-1, 2, T, dtype=torch.float64)
chunks = pytest.mark.parametrize("chunk", [1, 4, 13, 1024])
passes = pytest.mark.parametrize("whole", [False, True], ids=["one pass", "two passes"])
kinds = pytest.mark.parametrize("kind", DIVERGENCES)


def inputs(seed=0, rows=T):
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, H_TEACHER), (V, H_TEACHER), (rows, H), (V, H)]
    teacher_hidden, teacher_weight, hidden, weight = (
        torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes
    )
    targets = torch.randint(V, (rows,), generator=g)
    return teacher_hidden, teacher_weight, hidden.requires_grad_(), weight.requires_grad_(), targets


def weighted(value, _):
    return value @ UPSTREAM


def total(value, _):
    return value.sum()


def plain_log_probs(hidden, weight):
    return (hidden @ weight.T / TEMPERATURE).log_softmax(-1)


def assert_equal(loss, expected, *tensors):
    """Compare two losses and their gradients."""
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    pairs = (torch.autograd.grad(x, tensors) for x in (loss, expected))
    for fused, plain in zip(*pairs, strict=True):
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-10)


@chunks
@passes
def test_fused_logprobs_and_entropy_equal_the_plain_computation(chunk, whole):
    _, _, hidden, weight, targets = inputs()
    part = Part(LogProbability(targets), weighted, whole)
    loss, (found,) = linear_loss(hidden, weight, [part], temperature=TEMPERATURE, chunk=chunk)
    plain = plain_log_probs(hidden, weight)[torch.arange(T), targets]
    torch.testing.assert_close(found.value, plain.detach(), rtol=0, atol=1e-10)
    expected = reference.entropy((hidden @ weight.T).detach().numpy(), TEMPERATURE)
    np.testing.assert_allclose(found.aside.numpy(), expected, atol=1e-10)
    assert loss.requires_grad and not any(tensor.requires_grad for tensor in found)
    assert torch.equal(found.loss, loss.detach())
    assert_equal(loss, plain @ UPSTREAM, hidden, weight)


@chunks
@passes
@kinds
def test_fused_divergences_equal_the_plain_computation(chunk, whole, kind):
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs()
    part = Part(TeacherDivergence(teacher_hidden, teacher_weight, targets, kind), weighted, whole)
    loss, (found,) = linear_loss(hidden, weight, [part], temperature=TEMPERATURE, chunk=chunk)
    teacher_logits, student_logits = teacher_hidden @ teacher_weight.T, hidden @ weight.T
    expected = reference.DIVERGENCES[kind](teacher_logits.numpy(), student_logits.detach().numpy(), TEMPERATURE)
    np.testing.assert_allclose(found.value.numpy(), expected, atol=1e-10)
    p = [reference.softmax(row, TEMPERATURE)[o] for row, o in zip(teacher_logits.numpy(), targets, strict=True)]
    np.testing.assert_allclose(found.aside.numpy(), np.log(p), atol=1e-10)
    plain = divergence(teacher_logits, student_logits, kind=kind, temperature=TEMPERATURE)
    assert_equal(loss, plain @ UPSTREAM, hidden, weight)


def most_likely(teacher_hidden, teacher_weight, k, kind):
    """Return a teacher that reports its k most likely tokens."""
    top = plain_log_probs(teacher_hidden, teacher_weight).topk(k, -1)
    return TopDivergence(top.indices, top.values, top.values[:, 0], kind)


@chunks
@passes
@pytest.mark.parametrize("k", [1, 3, V - 1])
@kinds
def test_a_top_k_teacher_equals_plain_loops_over_k_tokens_and_the_rest(chunk, whole, k, kind):
    teacher_hidden, teacher_weight, hidden, weight, _ = inputs()
    teacher = most_likely(teacher_hidden, teacher_weight, k, kind)
    part = Part(teacher, weighted, whole)
    loss, (found,) = linear_loss(hidden, weight, [part], temperature=TEMPERATURE, chunk=chunk)
    teacher_logits, student_logits = teacher_hidden @ teacher_weight.T, hidden @ weight.T
    rows = [
        [reference.softmax(row, TEMPERATURE) for row in x.detach().numpy()] for x in (teacher_logits, student_logits)
    ]
    p, q = ([reference.merged(row, top) for row, top in zip(x, teacher.tokens.tolist(), strict=True)] for x in rows)
    np.testing.assert_allclose(found.value.numpy(), reference.top_divergence(p, q, kind), atol=1e-10)
    assert torch.equal(found.aside, teacher.log_targets)
    exact = divergence(teacher_logits, student_logits, kind=kind, temperature=TEMPERATURE)
    assert (found.value <= exact + 1e-10).all()
    assert k > 1 or (found.value < exact - 1e-6).any()
    if k == V - 1:  # the rest is a single token, so nothing is merged
        assert_equal(loss, exact @ UPSTREAM, hidden, weight)
    else:
        assert_equal(loss, merged_divergence(teacher, hidden, weight) @ UPSTREAM, hidden, weight)


def merged_divergence(teacher, hidden, weight):
    """Merge the unlisted tokens of all logits, and differentiate by autograd."""
    log_q = plain_log_probs(hidden, weight)
    listed = torch.zeros_like(log_q).scatter(-1, teacher.tokens, 1).bool()
    rest = log_q.exp().masked_fill(listed, 0).sum(-1, keepdim=True).log()
    log_p_rest = (1 - teacher.log_p.exp().sum(-1, keepdim=True)).log()
    log_p, log_q = torch.cat((teacher.log_p, log_p_rest), -1), torch.cat((log_q.gather(-1, teacher.tokens), rest), -1)
    return DIVERGENCES[teacher.kind].value(log_p, log_q)


def test_a_top_k_teacher_distributes_the_rest_in_the_student_s_proportions():
    """The gradient of the forward KL is q - p for this completed distribution p."""
    teacher_hidden, teacher_weight, hidden, weight, _ = inputs()
    teacher = most_likely(teacher_hidden, teacher_weight, 3, "forward")
    logits = (hidden @ weight.T).detach().requires_grad_()
    identity = torch.eye(V, dtype=torch.float64)
    loss, _ = linear_loss(logits, identity, [Part(teacher, total)], temperature=TEMPERATURE)
    (found,) = torch.autograd.grad(loss, logits)
    known = zip(logits.detach().numpy(), teacher.tokens.tolist(), teacher.log_p, found, strict=True)
    for row, listed, log_known, gradient in known:
        q = reference.softmax(row, TEMPERATURE)
        p, rest = np.array(q), 1 - float(log_known.exp().sum())
        p *= rest / sum(x for v, x in enumerate(q) if v not in listed)
        p[listed] = log_known.exp().numpy()
        np.testing.assert_allclose(gradient.numpy(), (q - p) / TEMPERATURE, atol=1e-10)


@kinds
@pytest.mark.parametrize("gap", [60.0, 2000.0])
def test_a_certain_teacher_or_student_gives_finite_values_and_gradients(kind, gap):
    """In float32 the probability of the rest may round to 0; with a gap of 2000 nats it is exactly 0."""
    logits = torch.zeros(2, V)
    logits[0, 2], logits[1, 5] = gap, gap
    student = logits.clone().requires_grad_()
    tokens, log_p = torch.tensor([[2, 3], [2, 3]]), torch.tensor([[0.0, -gap], [0.0, -gap]])
    teacher = TopDivergence(tokens, log_p, log_p[:, 0], kind)
    loss, (found,) = linear_loss(student, torch.eye(V), [Part(teacher, total)])
    (gradient,) = torch.autograd.grad(loss, student)
    assert found.value.isfinite().all() and gradient.isfinite().all()
    assert abs(found.value[0]) < 1e-3 < found.value[1]


MASK = torch.tensor([[True] * 6 + [False], [True] * 7])  # two sequences, of 6 and 7 tokens
LOG_MU = torch.linspace(-3, -0.5, MASK.numel(), dtype=torch.float64).view_as(MASK)


def padded(flat):
    return flat.new_zeros(MASK.shape).masked_scatter(MASK, flat)


def corrections(log_pi, mode):
    return correction_weights(log_pi, LOG_MU, MASK, mode=mode, bound=3.0)


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_gradient_loss_is_the_same_with_every_correction(mode):
    def loss(flat, _):
        log_pi = padded(flat)
        advantages = torch.tensor([0.7, -1.1], dtype=torch.float64)
        return grpo_loss(log_pi, MASK, advantages, correction=corrections(log_pi, mode)).sum()

    _, _, hidden, weight, targets = inputs()
    part = Part(LogProbability(targets), loss, mode in WHOLE_SEQUENCE_MODES)
    fused, _ = linear_loss(hidden, weight, [part], temperature=TEMPERATURE, chunk=4)
    assert_equal(fused, loss(plain_log_probs(hidden, weight)[torch.arange(T), targets], None), hidden, weight)


@kinds
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limiter", LIMITERS)
def test_the_distillation_loss_is_the_same_with_every_divergence_correction_and_limiter(kind, mode, limiter):
    def loss(flat, log_teacher):
        rule = {"limiter": limiter, "delta": 0.8, "quantile": 0.6}
        return distillation_loss(padded(flat), MASK, corrections(padded(log_teacher), mode), **rule).sum()

    teacher_hidden, teacher_weight, hidden, weight, targets = inputs()
    whole = mode in WHOLE_SEQUENCE_MODES or limiter in WHOLE_SEQUENCE_LIMITERS
    part = Part(TeacherDivergence(teacher_hidden, teacher_weight, targets, kind), loss, whole)
    fused, _ = linear_loss(hidden, weight, [part], temperature=TEMPERATURE, chunk=4)
    teacher_logits = teacher_hidden @ teacher_weight.T
    d = divergence(teacher_logits, hidden @ weight.T, kind=kind, temperature=TEMPERATURE)
    log_teacher = plain_log_probs(teacher_hidden, teacher_weight)[torch.arange(T), targets]
    assert_equal(fused, loss(d, log_teacher), hidden, weight)


def depends_on_earlier_values(value, aside):
    """The coefficient of token t depends on values and asides up to t."""
    known = (value + aside).detach().cumsum(-1)
    return (torch.sin(value) * known).sum()


def depends_on_all_values(value, aside):
    return (value * (value + aside).detach().sum()).sum()


@chunks
def test_a_loss_may_depend_on_all_earlier_values_in_one_pass(chunk):
    _, _, hidden, weight, targets = inputs()
    part = Part(LogProbability(targets), depends_on_earlier_values)
    loss, (found,) = linear_loss(hidden, weight, [part], temperature=TEMPERATURE, chunk=chunk)
    plain = plain_log_probs(hidden, weight)[torch.arange(T), targets]
    assert_equal(loss, depends_on_earlier_values(plain, found.aside), hidden, weight)


def test_a_loss_that_depends_on_later_values_needs_two_passes():
    _, _, hidden, weight, targets = inputs()
    losses = [
        linear_loss(hidden, weight, [Part(LogProbability(targets), depends_on_all_values, whole)], chunk=4)
        for whole in (False, True)
    ]
    (wrong, _), (loss, (found,)) = losses
    assert torch.autograd.grad(wrong, hidden)[0][:4].isnan().all()
    plain = (hidden @ weight.T).log_softmax(-1)[torch.arange(T), targets]
    assert_equal(loss, depends_on_all_values(plain, found.aside), hidden, weight)


def test_the_gradients_of_several_parts_are_summed_and_scaled():
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs()
    first = Part(LogProbability(targets[:5]), lambda log_pi, _: (log_pi * UPSTREAM[:5]).sum())
    teacher = TeacherDivergence(teacher_hidden[5:], teacher_weight, targets[5:])
    second = Part(teacher, lambda d, _: (d * d).sum(), whole=True)
    loss, found = linear_loss(hidden, weight, [first, second], temperature=TEMPERATURE, chunk=3)
    log_pi = plain_log_probs(hidden, weight)[torch.arange(5), targets[:5]]
    d = divergence(teacher_hidden[5:] @ teacher_weight.T, hidden[5:] @ weight.T, temperature=TEMPERATURE)
    parts = (log_pi * UPSTREAM[:5]).sum(), (d * d).sum()
    for own, expected in zip(found, parts, strict=True):
        torch.testing.assert_close(own.loss, expected.detach(), rtol=0, atol=1e-10)
    assert_equal(3 * loss, 3 * sum(parts), hidden, weight)


def test_the_backward_pass_runs_once():
    _, _, hidden, weight, targets = inputs()
    loss, _ = linear_loss(hidden, weight, [Part(LogProbability(targets), total)])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_without_gradients_the_values_are_the_same():
    _, _, hidden, weight, targets = inputs()
    part = Part(LogProbability(targets), total)
    loss, (found,) = linear_loss(hidden, weight, [part])
    with torch.no_grad():
        bare, (own,) = linear_loss(hidden, weight, [part])
    assert not bare.requires_grad
    assert torch.equal(bare, loss) and torch.equal(own.value, found.value) and torch.equal(own.aside, found.aside)


@pytest.mark.parametrize("own_matrix", [False, True])
def test_no_gradient_reaches_the_teacher_through_a_shared_weight(own_matrix):
    _, _, hidden, weight, targets = inputs()
    guided = (hidden.detach() * 1.5).requires_grad_()
    teacher = TeacherDivergence(guided, weight if own_matrix else None, targets)
    loss, _ = linear_loss(hidden, weight, [Part(teacher, total)], chunk=4)
    assert_equal(loss, forward_kl((guided @ weight.T).detach(), hidden @ weight.T).sum(), hidden, weight)
    assert guided.grad is None


def test_identical_teacher_and_student_give_exactly_0():
    _, _, hidden, weight, targets = inputs()
    teacher = TeacherDivergence(hidden.detach().clone(), None, targets)
    _, (found,) = linear_loss(hidden, weight, [Part(teacher, total)], chunk=4)
    assert torch.equal(found.value, torch.zeros(T, dtype=torch.float64))


def test_bfloat16_gradients_are_summed_in_float32():
    _, _, hidden, weight, targets = inputs(rows=512)
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    part = Part(LogProbability(targets), total)
    loss, (found,) = linear_loss(hidden, weight, [part], chunk=1)
    assert {x.dtype for x in (loss, *found)} == {torch.float32}
    fused = torch.autograd.grad(loss, (hidden, weight))
    assert {x.dtype for x in fused} == {torch.bfloat16}
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    _, grad_weight = torch.autograd.grad(linear_loss(*exact, [part])[0], exact)
    # Each row is rounded once. A running sum in bfloat16 would have an error above 0.1 here.
    error = (fused[1].double() - grad_weight).norm() / grad_weight.norm()
    assert error < 0.02


@pytest.mark.parametrize("parts", [0, 1])
def test_empty_input_is_accepted(parts):
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs(rows=0)
    part = Part(TeacherDivergence(teacher_hidden, teacher_weight, targets), total)
    loss, found = linear_loss(hidden, weight, [part] * parts)
    assert len(found) == parts and all(own.value.shape == own.aside.shape == (0,) for own in found)
    for gradient, tensor in zip(torch.autograd.grad(loss, (hidden, weight)), (hidden, weight), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


class Operations(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_the_logits_of_all_rows_are_never_held_at_once():
    rows, chunk = 64, 8
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs(rows=rows)
    with Operations() as plain:
        forward_kl(teacher_hidden @ teacher_weight.T, hidden @ weight.T).sum().backward()
    top = TopDivergence(targets[:, None], torch.full((rows, 1), -1.0), torch.zeros(rows))
    measures = [LogProbability(targets), TeacherDivergence(teacher_hidden, teacher_weight, targets), top]
    with Operations() as fused:
        for measure in measures:
            for whole in (False, True):
                linear_loss(hidden, weight, [Part(measure, total, whole)], chunk=chunk)[0].backward()
    assert plain.numel >= rows * V
    assert fused.numel <= max(chunk * V, rows * H, V * H) < rows * V


@pytest.mark.parametrize(("teacher", "whole", "products"), [(0, 0, 3), (0, 1, 4), (1, 0, 4), (1, 1, 6)])
def test_one_pass_needs_no_more_products_than_all_logits_at_once(teacher, whole, products):
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs()
    measure = TeacherDivergence(teacher_hidden, teacher_weight, targets) if teacher else LogProbability(targets)
    with Operations() as counted:
        linear_loss(hidden, weight, [Part(measure, total, bool(whole))], chunk=T)[0].backward()
    assert counted.products == products


@passes
def test_a_matrix_that_is_not_trained_gets_no_gradient_and_costs_no_product(whole):
    _, _, hidden, weight, targets = inputs()
    part = Part(LogProbability(targets), weighted, whole)
    with Operations() as trained:
        loss, _ = linear_loss(hidden, weight, [part], chunk=4)
        (expected,) = torch.autograd.grad(loss, hidden)
    with Operations() as frozen:
        loss, _ = linear_loss(hidden, weight.detach(), [part], chunk=4)
        (found,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(found, expected)
    assert trained.products - frozen.products == 4  # one for each chunk


def test_blocks_do_not_change_the_results(monkeypatch):
    teacher_hidden, teacher_weight, hidden, weight, targets = inputs()
    part = Part(TeacherDivergence(teacher_hidden, teacher_weight, targets), weighted)
    whole, _ = linear_loss(hidden, weight, [part], chunk=8)
    monkeypatch.setattr(linear, "CPU_SIZES", linear.Sizes(chunk=1, block=3 * V))
    assert_equal(linear_loss(hidden, weight, [part], chunk=8)[0], whole, hidden, weight)

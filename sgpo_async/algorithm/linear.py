"""Log-probabilities, entropy and divergences directly from hidden states and the output matrix.

The logits [T, V] are the largest tensor of training (16K x 152K in float32: 10 GB). The functions here compute only
`chunk` rows of them at a time, and recompute these rows in the backward pass, where the gradient has a closed form:

    d log q(o_t) / d z = onehot(o_t) - q,     q = softmax(z);     d d_t / d z: see `divergences`
    d log q(rest) / d z_v = [v in rest] q_v / q(rest) - q_v

Logits are computed in the type of the inputs. The softmax, and the sum of the weight's gradient over chunks, are
computed in float32 or wider. Weights are plain tensors; for a sharded parameter, pass the gathered tensor.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgpo_async.algorithm.divergences import DIVERGENCES

Head = tuple[Tensor, Tensor]
"""(hidden [T, H], weight [V, H]): the factors of the logits hidden @ weight.T."""


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Compute log pi(o_t|.) of the sampled tokens, and the entropy of pi at each position.

    Args:
        hidden: [T, H], position t predicts o_t.
        weight: [V, H].
        targets: [T] int64, o_t.
        temperature: the sampling temperature of the rollouts.
        chunk: rows of logits computed at a time.

    Returns:
        log-probability [T], differentiable in hidden and weight; entropy [T] in nats, without gradient.
    """
    logp, entropy = _LinearLogprobs.apply(hidden, weight, targets, temperature, chunk)
    return logp, entropy


def linear_divergence(
    teacher: Head,
    student: Head,
    targets: Tensor,
    *,
    kind: str = "forward",
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Compute `divergence` (Eq. 3) without holding all logits, and the teacher's log pi(o~_t|q,s,o~_<t).

    Args:
        teacher: (hidden [T, H'], weight [V, H']) with the strategy in the prompt; no gradient reaches either.
        student: (hidden [T, H], weight [V, H]) without the strategy; both weights may be one tensor.
        targets: [T] int64, o~_t.
        kind: a key of DIVERGENCES.
        temperature: the sampling temperature of the rollouts.
        chunk: rows of logits computed at a time, for teacher and student each.

    Returns:
        d [T] in nats, differentiable in the student's hidden and weight; the teacher's log-probability [T] of
        the targets, without gradient, for the prefix correction.
    """
    d, log_teacher = _LinearDivergence.apply(*teacher, *student, targets, kind, temperature, chunk)
    return d, log_teacher


def linear_top_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """Compute log pi of k listed tokens at each position, and of all other tokens together (the rest).

    Args:
        hidden: [T, H].
        weight: [V, H].
        tokens: [T, k] int64, k < V; the tokens of one row are distinct.
        temperature: the sampling temperature of the rollouts.
        chunk: rows of logits computed at a time.

    Returns:
        [T, k + 1], the rest in the last column; differentiable in hidden and weight.
    """
    return _LinearTopLogprobs.apply(hidden, weight, tokens, temperature, chunk)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        hidden, weight, targets, temperature, chunk = args
        logp, entropy = _rows(hidden), _rows(hidden)
        for rows in _chunks(hidden, chunk):
            log_q = _log_softmax(hidden[rows], weight, temperature)
            logp[rows] = _pick(log_q, targets[rows])
            entropy[rows] = -(log_q.exp() * log_q).sum(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors

        def grad_logits(rows: slice) -> Tensor:
            grad = _log_softmax(hidden[rows], weight, ctx.temperature).exp().neg()
            grad[torch.arange(len(grad), device=grad.device), targets[rows]] += 1
            return grad * (grads[0][rows, None] / ctx.temperature)

        return *_head_gradients(hidden, weight, grad_logits, ctx.chunk), None, None, None


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *heads, targets, kind, temperature, chunk = args
        teacher_hidden, teacher_weight, hidden, weight = heads
        d, log_teacher = _rows(hidden), _rows(teacher_hidden)
        for rows in _chunks(hidden, chunk):
            log_p = _log_softmax(teacher_hidden[rows], teacher_weight, temperature)
            log_q = _log_softmax(hidden[rows], weight, temperature)
            d[rows] = DIVERGENCES[kind].value(log_p, log_q)
            log_teacher[rows] = _pick(log_p, targets[rows])
        ctx.save_for_backward(*heads)
        ctx.kind, ctx.temperature, ctx.chunk = kind, temperature, chunk
        ctx.mark_non_differentiable(log_teacher)
        return d, log_teacher

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        teacher_hidden, teacher_weight, hidden, weight = ctx.saved_tensors

        def grad_logits(rows: slice) -> Tensor:
            log_p = _log_softmax(teacher_hidden[rows], teacher_weight, ctx.temperature)
            log_q = _log_softmax(hidden[rows], weight, ctx.temperature)
            return DIVERGENCES[ctx.kind].slope(log_p, log_q) * (grads[0][rows, None] / ctx.temperature)

        return None, None, *_head_gradients(hidden, weight, grad_logits, ctx.chunk), None, None, None, None


class _LinearTopLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden, weight, tokens, temperature, chunk = args
        log_top = hidden.new_empty(len(hidden), tokens.shape[1] + 1, dtype=_at_least_float32(hidden))
        for rows in _chunks(hidden, chunk):
            log_q = _log_softmax(hidden[rows], weight, temperature)
            log_top[rows, :-1] = log_q.gather(-1, tokens[rows])
            log_top[rows, -1] = log_q.scatter_(-1, tokens[rows], -torch.inf).logsumexp(-1)
        ctx.save_for_backward(hidden, weight, tokens, log_top[:, -1])
        ctx.temperature, ctx.chunk = temperature, chunk
        return log_top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, log_rest = ctx.saved_tensors

        def grad_logits(rows: slice) -> Tensor:
            log_q, grad = _log_softmax(hidden[rows], weight, ctx.temperature), grads[0][rows]
            within_rest = (log_q - log_rest[rows, None]).exp_().scatter_(-1, tokens[rows], 0)
            slope = within_rest * grad[:, -1:] - log_q.exp_() * grad.sum(-1, keepdim=True)
            return slope.scatter_add_(-1, tokens[rows], grad[:, :-1]) / ctx.temperature

        return *_head_gradients(hidden, weight, grad_logits, ctx.chunk), None, None, None


def _head_gradients(
    hidden: Tensor, weight: Tensor, grad_logits: Callable[[slice], Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of hidden and weight from `grad_logits`, the gradient of the logits of the given rows."""
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=_at_least_float32(weight))
    for rows in _chunks(hidden, chunk):
        grad = grad_logits(rows).to(hidden.dtype)
        grad_hidden[rows] = grad @ weight
        grad_weight += grad.T @ hidden[rows]
    return grad_hidden, grad_weight.to(weight.dtype)


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = hidden @ weight.T
    return torch.log_softmax(logits.to(_at_least_float32(logits)) / temperature, dim=-1)


def _pick(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _rows(hidden: Tensor) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=_at_least_float32(hidden))


def _chunks(hidden: Tensor, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, len(hidden), chunk))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)

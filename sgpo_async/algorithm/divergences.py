"""Divergences between the guided teacher and the unguided student at each token: Eq. 3 and two alternatives.

p is the teacher's distribution over the vocabulary and q = softmax(z) the student's, after the same output prefix:

    name             d                                     d d / d z
    forward          KL(p || q)                            q - p
    reverse          KL(q || p)                            q (log q/p - KL(q || p))
    jensen-shannon   KL(p || m)/2 + KL(q || m)/2           q (log q/m - KL(q || m)) / 2        m = (p + q)/2

`clipped_forward` bounds what each v adds to the forward KL: sum_v min(p_v log p_v/q_v, tau), as OPSD does
(https://arxiv.org/abs/2601.18734); it may be negative.

The forward KL asks the student to cover every token that the teacher considers likely. The reverse KL asks the student
to avoid every token that the teacher considers unlikely. Jensen-Shannon lies between the two and is at most ln 2. All
three depend only on the prefix o~_<t, not on the sampled token o~_t.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Divergence(NamedTuple):
    """A divergence and its derivative, both functions of log p and log q [..., V]. The student's q is softmax(z)."""

    value: Callable[[Tensor, Tensor], Tensor]  # -> [...], in nats
    slope: Callable[[Tensor, Tensor], Tensor]  # -> [..., V], the derivative of the value with respect to z


def divergence(
    teacher_logits: Tensor, student_logits: Tensor, *, kind: str = "forward", temperature: float = 1.0
) -> Tensor:
    """Compute d_t between sg[pi(.|q,s,o~_<t)] and pi(.|q,o~_<t), exactly, over the whole vocabulary.

    Position t of both arguments follows the same output prefix o~_<t; only the prompts differ. The teacher is
    the policy itself or a copy of it. In both cases no gradient reaches the teacher's logits.

    Args:
        teacher_logits: [..., T, V], with the strategy in the prompt.
        student_logits: [..., T, V], without the strategy.
        kind: a key of DIVERGENCES.
        temperature: the sampling temperature of the rollouts, applied to both.

    Returns:
        [..., T], in nats.
    """
    log_p = torch.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    return DIVERGENCES[kind].value(log_p, log_q)


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute d_t = KL( sg[pi(.|q,s,o~_<t)] || pi(.|q,o~_<t) ) (Eq. 3), that is `divergence` of kind "forward".

    This function needs all logits at once; examples/sgpo_in_one_file.py trains with it. The learner uses
    `TeacherDivergence`, which never holds all logits.
    """
    return divergence(teacher_logits, student_logits, kind="forward", temperature=temperature)


def top_divergence(log_p: Tensor, log_q: Tensor, *, kind: str = "forward") -> Tensor:
    """Compute d_t from only the teacher's k most likely tokens; all other tokens count as one outcome, the rest.

    Merging outcomes never increases these divergences (data processing inequality), so the result is at most the exact
    divergence. The two are equal for k = V - 1, and also if teacher and student distribute the rest over its tokens in
    the same proportions. The gradient of the forward KL is the same as for a teacher that distributes the rest in the
    student's proportions.

    Args:
        log_p: [..., k], the teacher's log-probabilities of its k < V most likely tokens. No gradient reaches them.
        log_q: [..., k + 1], the student's log-probabilities of the same tokens and, last, of the rest, with gradient.
        kind: a key of DIVERGENCES.

    Returns:
        [...], in nats.
    """
    return DIVERGENCES[kind].value(_with_rest(log_p.detach()), log_q)


def _with_rest(log_p: Tensor) -> Tensor:
    """Append the log-probability of the rest, whose probability is at least eps: [..., k] -> [..., k + 1]."""
    rest = 1 - log_p.double().exp().sum(-1, keepdim=True)
    return torch.cat((log_p, rest.clamp(min=torch.finfo(log_p.dtype).eps).log().to(log_p.dtype)), -1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p || q) = sum_v p_v (log p_v - log q_v), with 0 log 0 = 0: [..., V], [..., V] -> [...]."""
    return _kl_terms(log_p, log_q).sum(-1)


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute p_v (log p_v - log q_v), with 0 log 0 = 0: [..., V], [..., V] -> [..., V]."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0)


def divergence_of(kind: str, clip: float = math.inf) -> Divergence:
    """The divergence `kind`, a key of DIVERGENCES; with a finite `clip`, in nats, the clipped forward KL."""
    assert clip == math.inf or kind == "forward", f"only the forward KL can be clipped, got {kind!r}"
    return DIVERGENCES[kind] if clip == math.inf else clipped_forward(clip)


def clipped_forward(clip: float) -> Divergence:
    """Return sum_v min(p_v log p_v/q_v, clip) and its derivative, q_v sum_u p_u - p_v without clipped terms."""

    def slope(log_p: Tensor, log_q: Tensor) -> Tensor:
        p = log_p.exp().masked_fill(_kl_terms(log_p, log_q) > clip, 0)
        return log_q.exp() * p.sum(-1, keepdim=True) - p

    return Divergence(lambda log_p, log_q: _kl_terms(log_p, log_q).clamp(max=clip).sum(-1), slope)


def _forward_slope(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_q.exp() - log_p.exp()


def _reverse(log_p: Tensor, log_q: Tensor) -> Tensor:
    return kl_divergence(log_q, log_p)


def _reverse_slope(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _centred(log_q, log_p)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = _mixture(log_p, log_q)
    return (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m)) / 2


def _jensen_shannon_slope(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _centred(log_q, _mixture(log_p, log_q)) / 2


def _mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute log m for the mixture m = (p + q)/2."""
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _centred(log_q: Tensor, log_r: Tensor) -> Tensor:
    """Compute q_v (log q_v/r_v - KL(q || r)), with 0 log 0 = 0.

    This is the derivative of sum_v q_v c_v with respect to z, for the constant c = log q/r.
    """
    q = log_q.exp()
    log_ratio = torch.where(q > 0, log_q - log_r, 0)
    return q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True))


DIVERGENCES: dict[str, Divergence] = {
    "forward": Divergence(kl_divergence, _forward_slope),
    "reverse": Divergence(_reverse, _reverse_slope),
    "jensen-shannon": Divergence(_jensen_shannon, _jensen_shannon_slope),
}

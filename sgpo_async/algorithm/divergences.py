"""How far the unguided student is from the guided teacher at each token: Eq. 3, and two others in its place.

p is the teacher's distribution over the vocabulary and q = softmax(z) the student's, at the same output prefix:

    name             d                                     d d / d z
    forward          KL(p || q)                            q - p
    reverse          KL(q || p)                            q (log q/p - KL(q || p))
    jensen-shannon   KL(p || m)/2 + KL(q || m)/2           q (log q/m - KL(q || m)) / 2        m = (p + q)/2

The forward KL asks the student to cover all that the teacher does, the reverse one to do nothing that the teacher does
not; Jensen-Shannon lies between and is at most ln 2. All depend on the prefix o~_<t alone, not on the sampled o~_t.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Divergence(NamedTuple):
    """A divergence of [..., V] log-probabilities log p, log q. The student's q is softmax(z)."""

    value: Callable[[Tensor, Tensor], Tensor]  # -> [...], in nats
    slope: Callable[[Tensor, Tensor], Tensor]  # -> [..., V], its derivative by z


def divergence(
    teacher_logits: Tensor, student_logits: Tensor, *, kind: str = "forward", temperature: float = 1.0
) -> Tensor:
    """d_t from sg[pi(.|q,s,o~_<t)] to pi(.|q,o~_<t), exact over the vocabulary.

    Position t of both arguments follows the same output prefix o~_<t; only the prompts differ. The teacher is
    the policy itself or a copy of it: either way no gradient reaches its logits.

    Args:
        teacher_logits: [..., T, V], with the strategy in the prompt.
        student_logits: [..., T, V], without it.
        kind: a key of DIVERGENCES.
        temperature: that of the rollouts, applied to both.

    Returns:
        [..., T], in nats.
    """
    log_p = torch.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    return DIVERGENCES[kind].value(log_p, log_q)


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """d_t = KL( sg[pi(.|q,s,o~_<t)] || pi(.|q,o~_<t) ) (Eq. 3): `divergence` of kind "forward".

    From whole logits, for tests to compare with; the learner has `linear_divergence`, which never holds them all.
    """
    return divergence(teacher_logits, student_logits, kind="forward", temperature=temperature)


def top_divergence(log_p: Tensor, log_q: Tensor, *, kind: str = "forward") -> Tensor:
    """d_t where of the teacher only its k likeliest tokens are known; all others count as one outcome.

    Merging outcomes never raises a divergence of this kind (data processing), so it is at most the exact one; they are
    equal for k = V - 1, and where both sides divide the rest alike. The gradient of the forward KL is that towards a
    teacher whose rest is divided as the student's own is.

    Args:
        log_p: [..., k], the teacher's log-probabilities of its likeliest tokens, k below V. No gradient reaches them.
        log_q: [..., k + 1], the student's of the same tokens and of the rest (`linear_top_logprobs`), with gradient.
        kind: a key of DIVERGENCES.

    Returns:
        [...], in nats.
    """
    return DIVERGENCES[kind].value(_with_rest(log_p.detach()), log_q)


def _with_rest(log_p: Tensor) -> Tensor:
    """[..., k] -> [..., k + 1]. The rest is what is left of 1, and not less than the least that rounding leaves."""
    rest = 1 - log_p.double().exp().sum(-1, keepdim=True)
    return torch.cat((log_p, rest.clamp(min=torch.finfo(log_p.dtype).eps).log().to(log_p.dtype)), -1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), with 0 log 0 = 0: [..., V], [..., V] -> [...]."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


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
    """log m of m = (p + q)/2."""
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _centred(log_q: Tensor, log_r: Tensor) -> Tensor:
    """q_v (log q_v/r_v - KL(q || r)), with 0 log 0 = 0: the derivative of sum_v q_v c_v by z, where c = log q/r."""
    q = log_q.exp()
    surprise = torch.where(q > 0, log_q - log_r, 0)
    return q * (surprise - (q * surprise).sum(-1, keepdim=True))


DIVERGENCES: dict[str, Divergence] = {
    "forward": Divergence(kl_divergence, _forward_slope),
    "reverse": Divergence(_reverse, _reverse_slope),
    "jensen-shannon": Divergence(_jensen_shannon, _jensen_shannon_slope),
}

"""Token-wise forward KL from the guided teacher to the unguided student (Eq. 3)."""

import torch
from torch import Tensor


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """d_t = KL( sg[pi(.|q,s,o~_<t)] || pi(.|q,o~_<t) ), exact over the vocabulary (Eq. 3).

    Position t of both arguments follows the same output prefix o~_<t; only the prompts differ. The teacher is
    the policy itself or a copy of it: either way no gradient reaches its logits.

    Args:
        teacher_logits: [..., T, V], with the strategy in the prompt.
        student_logits: [..., T, V], without it.
        temperature: that of the rollouts, applied to both.

    Returns:
        [..., T], in nats.
    """
    log_p = torch.log_softmax(teacher_logits.detach() / temperature, dim=-1)
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    return kl_divergence(log_p, log_q)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), with 0 log 0 = 0: [..., V], [..., V] -> [...]."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)

"""Advantages of single tokens: a teacher that has read a context says where in a rollout its reward was earned.

p is the teacher's probability of a sampled token o_t given the context, pi the policy's without it, A the advantage of
the rollout (Eq. 1). No gradient flows through any of them.

    rlsd     A ((1 - lambda) + lambda clip((p/pi)^sign(A), 1 - eps, 1 + eps))         arXiv 2604.03128, Eq. 15
    rlcsd    A + r_t where |r_t| > delta, r_t = scale tanh(e_t/tau), never past 0;    arXiv 2606.11709
             A elsewhere; the loss is the sum of the means over the two kinds of tokens
             e_t = log p(o_t|right context) - log mean over wrong contexts of p(o_t|wrong context)
    iw-opd   (1 + gamma (1 - sum_{k<t} |a_k| / sum_k |a_k|)) a_t, a_t = log p/pi      arXiv 2606.22600

RLSD leaves the direction to the reward and takes the size from the teacher. RLCSD compares two contexts of one form, so
what the form alone changes cancels. IW-OPD has no reward: it is reverse-KL distillation, in which a token weighs less,
the more policy and teacher have differed on the tokens before it. docs/algorithm.md says
which texts and code were read.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-8  # added to the divisor of IW-OPD, as in the authors' code: at pi = p all a_t are 0


def rlsd_advantages(advantages: Tensor, log_teacher: Tensor, log_pi: Tensor, *, clip: float, weight: float) -> Tensor:
    """Scale the advantage of each token by how much more, or less, likely the context makes it: [N, T].

    Args:
        advantages: [N].
        log_teacher: [N, T], log p(o_t|context).
        log_pi: [N, T].
        clip: eps in (0, 1).
        weight: lambda in [0, 1].
    """
    advantage = advantages.unsqueeze(-1)
    factor = (advantage.sign() * (log_teacher - log_pi.detach())).exp().clamp(1 - clip, 1 + clip)
    return advantage * ((1 - weight) + weight * factor)


def rlcsd_shift(evidence: Tensor, *, scale: float, tau: float) -> Tensor:
    """Compute r_t from e_t: [N, T]."""
    return scale * (evidence / tau).tanh()


def rlcsd_advantages(
    advantages: Tensor, shift: Tensor, mask: Tensor, *, threshold: float, selected_weight: float
) -> Tensor:
    """Shift the advantage of the tokens that tell a right from a wrong context, the selected ones: [N, T].

    The loss is the mean over the other tokens of a rollout, plus `selected_weight` times the mean over the selected
    ones. The learner takes the mean over all tokens of a rollout, so the advantages of each part are multiplied by the
    number of all tokens of the rollout and divided by that of the part.

    Args:
        advantages: [N]; in a rollout with advantage 0 every token gets 0.
        shift: [N, T], r_t.
        mask: [N, T] bool, true on the tokens of the rollout.
        threshold: delta; a token is selected if its |r_t| is larger.
        selected_weight: of the selected tokens.
    """
    advantage = advantages.unsqueeze(-1)
    selected = (shift.abs() > threshold) & mask
    shifted = advantage + shift
    shifted = torch.where(advantage > 0, shifted.clamp(min=0), torch.where(advantage < 0, shifted.clamp(max=0), 0))
    tokens, chosen = (of.sum(-1, keepdim=True).to(shift.dtype) for of in (mask, selected))
    of_selected = selected_weight * tokens / chosen.clamp(min=1)
    of_others = tokens / (tokens - chosen).clamp(min=1)
    return torch.where(selected, of_selected * shifted, of_others * advantage)


def iw_opd_advantages(log_teacher: Tensor, log_pi: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Compute the weighted log-ratios to the teacher, which depend on the whole rollout: [N, T].

    Args:
        log_teacher: [N, T], log p(o_t|context).
        log_pi: [N, T].
        mask: [N, T] bool, true on the tokens of the rollout.
        gamma: >= 0; 0: every token weighs the same.
    """
    log_ratio = (log_teacher - log_pi.detach()).masked_fill(~mask, 0)
    drift = log_ratio.abs()
    before = drift.cumsum(-1) - drift
    return (1 + gamma * (1 - before / (drift.sum(-1, keepdim=True) + TINY))) * log_ratio

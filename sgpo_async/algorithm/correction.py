"""Importance weights for rollouts that another policy sampled.

A rollout came from the behaviour policy mu: an older version of the weights, in another engine. An
expectation over a newer policy pi is one over mu when each sample weighs pi/mu. Over T tokens that is a
product of ratios rho_i = pi(o_i|.)/mu(o_i|.), whose variance grows with T. The modes trade variance for bias
by a bound c >= 1:

    mode                 weight of token t                               exact, at c = infinity, for
    none                 1                                               pi = mu
    token                min(rho_t, c)                                   the token, given its prefix
    token-mask           rho_t if 1/c <= rho_t <= c, else 0              the token, given its prefix
    prefix               prod_{i<t} min(rho_i, c)                        the prefix: f(o_<t), as is d_t
    sequence             min(prod_i rho_i, c)                            the sequence: f(o)
    sequence-geometric   g if 1/c <= g <= c, else 0,                     pi = mu
                         g = (prod_i rho_i)^(1/|o|)

`token` is truncated importance sampling, `token-mask` is IcePop (https://arxiv.org/abs/2510.18855), and
`prefix` truncates each factor as V-trace does its c_i (https://arxiv.org/abs/1802.01561).

For the KL term (Eq. 3) pi is the teacher, from whose distribution o~ should have come: the policy with the
strategy in its prompt, or a frozen copy of it. d_t sums over the whole vocabulary at t and depends on o~_<t
alone, so `prefix` is its exact correction. For GRPO (Eq. 1) pi is the proximal policy, and the loss at t also
depends on the sampled o_t: `prefix` leaves that one ratio uncorrected, `token` corrects it and no other.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def correction_weights(log_pi: Tensor, log_mu: Tensor, mask: Tensor, *, mode: str, bound: float) -> Tensor:
    """Weights that turn an expectation over mu into one over pi, as the module's table says.

    Exactly 1 wherever pi = mu. Constants to autograd.

    Args:
        log_pi: [..., T], log-probability of each sampled token under the policy to correct towards.
        log_mu: [..., T], the same under the behaviour policy.
        mask: [..., T], true on the tokens of the rollout. The others get weight 0 and have no part in the
            weights of these, whatever stands there (padding may be NaN).
        mode: a key of MODES.
        bound: c >= 1; math.inf for none.

    Returns:
        [..., T].
    """
    assert mode in MODES, f"mode {mode!r} is none of {', '.join(MODES)}"
    assert bound >= 1, f"bound {bound} is below 1: it would alter on-policy rollouts"
    mask = mask.bool()
    log_rho = (log_pi - log_mu).detach().masked_fill(~mask, 0)
    return MODES[mode](log_rho, mask, math.log(bound)).masked_fill(~mask, 0)


def none(log_rho: Tensor, _mask: Tensor, _log_c: float) -> Tensor:
    return torch.ones_like(log_rho)


def token(log_rho: Tensor, _mask: Tensor, log_c: float) -> Tensor:
    return _exp(log_rho.clamp(max=log_c))


def token_mask(log_rho: Tensor, _mask: Tensor, log_c: float) -> Tensor:
    return _within_band(log_rho, log_c)


def prefix(log_rho: Tensor, _mask: Tensor, log_c: float) -> Tensor:
    through_t = log_rho.clamp(max=log_c).cumsum(-1)
    return _exp(torch.nn.functional.pad(through_t, (1, 0))[..., :-1])  # shifted by one: i < t


def sequence(log_rho: Tensor, _mask: Tensor, log_c: float) -> Tensor:
    return _exp(log_rho.sum(-1, keepdim=True).clamp(max=log_c)).expand_as(log_rho)


def sequence_geometric(log_rho: Tensor, mask: Tensor, log_c: float) -> Tensor:
    mean = log_rho.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return _within_band(mean, log_c).expand_as(log_rho)


def _within_band(log_rho: Tensor, log_c: float) -> Tensor:
    """rho where 1/c <= rho <= c, else 0."""
    return torch.where(log_rho.abs() <= log_c, _exp(log_rho), 0)


def _exp(log_weight: Tensor) -> Tensor:
    """Finite, so that a weight past the type's range times a loss of 0 is 0 and not NaN."""
    return log_weight.exp().clamp(max=torch.finfo(log_weight.dtype).max)


MODES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "none": none,
    "token": token,
    "token-mask": token_mask,
    "prefix": prefix,
    "sequence": sequence,
    "sequence-geometric": sequence_geometric,
}

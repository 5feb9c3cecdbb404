"""Importance weights for rollouts that another policy sampled.

The behaviour policy mu that sampled a rollout is an older version of the weights, in another engine. Weighting
each sample by the importance ratio pi/mu turns an expectation over mu into one over a newer policy pi. For T
tokens the ratio is a product of token ratios rho_i = pi(o_i|.)/mu(o_i|.), whose variance grows with T. The
modes below trade variance for bias with a bound c >= 1:

    mode                 weight of token t                               exact, at c = infinity, for
    none                 1                                               pi = mu
    token                min(rho_t, c)                                   the token, given its prefix
    token-mask           rho_t if 1/c <= rho_t <= c, else 0              the token, given its prefix
    prefix               prod_{i<t} min(rho_i, c)                        the prefix: f(o_<t), as is d_t
    sequence             min(prod_i rho_i, c)                            the sequence: f(o)
    sequence-geometric   g if 1/c <= g <= c, else 0,                     pi = mu
                         g = (prod_i rho_i)^(1/|o|)

`grpo_correction.mode=clip` is not in this table: Eq. 1 then contains the ratio pi/mu itself (`losses.grpo_loss`).
`token` is truncated importance sampling, `token-mask` is IcePop (https://arxiv.org/abs/2510.18855), and
`prefix` truncates each factor like the c_i of V-trace (https://arxiv.org/abs/1802.01561).

For the KL term (Eq. 3) pi is the teacher: the policy with the strategy in its prompt, or a frozen copy of it.
Eq. 3 takes its expectation over the teacher's distribution. d_t sums over the whole vocabulary at t and depends
only on o~_<t, so `prefix` corrects it exactly. For GRPO (Eq. 1) pi is the proximal policy, and the loss at t also
depends on the sampled token o_t: `prefix` does not correct the ratio of o_t, `token` corrects only that ratio.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def correction_weights(log_pi: Tensor, log_mu: Tensor, mask: Tensor, *, mode: str, bound: float) -> Tensor:
    """Compute the weights of the module's table, which turn an expectation over mu into one over pi.

    If pi = mu on all tokens of a rollout, all of its weights are exactly 1. No gradient flows through the weights.

    Args:
        log_pi: [..., T], log-probability of each sampled token under the target policy pi.
        log_mu: [..., T], log-probability of the same tokens under the behaviour policy.
        mask: [..., T], true on the tokens of the rollout. All other positions get weight 0 and do not influence
            the weights of the tokens, whatever they contain (padding may be NaN).
        mode: a key of MODES.
        bound: c >= 1; math.inf for no bound.

    Returns:
        [..., T].
    """
    assert mode in MODES, f"mode must be one of {', '.join(MODES)}, got {mode!r}"
    assert bound >= 1, f"bound must be >= 1, got {bound}: a lower bound would change the weights of on-policy rollouts"
    mask = mask.bool()
    log_rho = (log_pi - log_mu).detach().masked_fill(~mask, 0)
    return MODES[mode](log_rho, mask, math.log(bound)).masked_fill(~mask, 0)


def none(log_rho: Tensor, _mask: Tensor, _log_c: float) -> Tensor:
    """Give every token weight 1."""
    return torch.ones_like(log_rho)


def token(log_rho: Tensor, _mask: Tensor, log_c: float) -> Tensor:
    """Weight each token by its own ratio, truncated at c."""
    return _exp(log_rho.clamp(max=log_c))


def token_mask(log_rho: Tensor, _mask: Tensor, log_c: float) -> Tensor:
    """Weight each token by its own ratio, or by 0 if the ratio is outside [1/c, c]."""
    return _within_band(log_rho, log_c)


def prefix(log_rho: Tensor, _mask: Tensor, log_c: float) -> Tensor:
    """Weight each token by the product of the ratios before it, each truncated at c."""
    through_t = log_rho.clamp(max=log_c).cumsum(-1)
    return _exp(torch.nn.functional.pad(through_t, (1, 0))[..., :-1])  # shifted by one position: i < t


def sequence(log_rho: Tensor, _mask: Tensor, log_c: float) -> Tensor:
    """Weight every token by the ratio of the whole sequence, truncated at c."""
    return _exp(log_rho.sum(-1, keepdim=True).clamp(max=log_c)).expand_as(log_rho)


def sequence_geometric(log_rho: Tensor, mask: Tensor, log_c: float) -> Tensor:
    """Weight every token by the geometric mean of the token ratios, or by 0 if the mean is outside [1/c, c]."""
    mean = log_rho.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return _within_band(mean, log_c).expand_as(log_rho)


def _within_band(log_rho: Tensor, log_c: float) -> Tensor:
    """Return rho where 1/c <= rho <= c, else 0."""
    return torch.where(log_rho.abs() <= log_c, _exp(log_rho), 0)


def _exp(log_weight: Tensor) -> Tensor:
    """Exponentiate and limit to the largest finite number: an infinite weight times a loss of 0 would be NaN."""
    return log_weight.exp().clamp(max=torch.finfo(log_weight.dtype).max)


WHOLE_SEQUENCE_MODES = ("sequence", "sequence-geometric")
"""Modes whose weight of token t depends on later tokens too."""

MODES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "none": none,
    "token": token,
    "token-mask": token_mask,
    "prefix": prefix,
    "sequence": sequence,
    "sequence-geometric": sequence_geometric,
}

"""Limiters, which bound the loss and gradient of single tokens in distillation (Eq. 5 and alternatives to its mask).

    name       L_t                         gradient of L_t           effect on a token with d_t > delta
    mask       1[d_t <= delta] d_t         d_t' or 0                 it has no loss and no gradient (Eq. 5)
    clamp      sg[min(1, delta/d_t)] d_t   d_t' min(1, delta/d_t)    its loss is delta, its gradient is scaled down
    smooth     sg[delta/(delta + d_t)] d_t d_t' delta/(delta + d_t)  its loss is below delta; L_t is smooth in d_t
    quantile   1[d_t <= Q] d_t             d_t' or 0                 none: the limit Q is a quantile of d over o+
    none       d_t                         d_t'                      none

The value of `clamp` is min(d_t, delta). If it were written as a minimum, its gradient above delta would be 0, the same
as with `mask`. Therefore the factor is a constant for autograd: the gradient keeps its direction and becomes shorter.
The quantile is taken over one target, so neither the rest of the batch nor the packing can change it.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def limit(d: Tensor, mask: Tensor, *, limiter: str, delta: float, quantile: float) -> Tensor:
    """Compute the limited loss L_t of each token, by the module's table.

    Args:
        d: [K, T], divergences along each target, with gradient.
        mask: [K, T] bool, true on the tokens of the target.
        limiter: a key of LIMITERS.
        delta: limit in nats.
        quantile: in [0, 1], for the limiter `quantile`; interpolated between the values of two tokens.

    Returns:
        [K, T]; value and gradient are 0 outside the mask, whatever d contains there.
    """
    return LIMITERS[limiter](d.masked_fill(~mask, 0), mask, delta, quantile)


def mask(d: Tensor, _tokens: Tensor, delta: float, _quantile: float) -> Tensor:
    """Set the loss of every token with d_t > delta to 0."""
    return torch.where(d <= delta, d, 0)


def clamp(d: Tensor, _tokens: Tensor, delta: float, _quantile: float) -> Tensor:
    """Scale every token with d_t > delta down to a loss of delta."""
    value = d.detach()
    return torch.where(value > delta, delta / value, 1) * d


def smooth(d: Tensor, _tokens: Tensor, delta: float, _quantile: float) -> Tensor:
    """Scale every token by delta/(delta + d_t)."""
    return delta / (delta + d.detach().clamp(min=0)) * d  # rounding may make d slightly negative


def quantile(d: Tensor, tokens: Tensor, _delta: float, quantile: float) -> Tensor:
    """Set the loss of every token above the quantile of its target to 0."""
    values = d.detach().masked_fill(~tokens, torch.nan)
    bound = values.nanquantile(quantile, dim=-1, keepdim=True)  # NaN for a row without tokens; no value is <= NaN
    return torch.where(d <= bound, d, 0)


def none(d: Tensor, _tokens: Tensor, _delta: float, _quantile: float) -> Tensor:
    """Leave every loss as it is."""
    return d


WHOLE_SEQUENCE_LIMITERS = ("quantile",)
"""Limiters whose loss of token t depends on later tokens too."""

LIMITERS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "mask": mask,
    "clamp": clamp,
    "smooth": smooth,
    "quantile": quantile,
    "none": none,
}

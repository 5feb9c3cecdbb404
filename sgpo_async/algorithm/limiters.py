"""What bounds the pull of single tokens on the student (Eq. 5, and others in place of its mask).

    name       L_t                         its gradient              what becomes of a token with d_t > delta
    mask       1[d_t <= delta] d_t         d_t' or 0                 nothing is learnt from it (Eq. 5)
    clamp      sg[min(1, delta/d_t)] d_t   d_t' min(1, delta/d_t)    it weighs delta, and pulls on
    smooth     sg[delta/(delta + d_t)] d_t d_t' delta/(delta + d_t)  it weighs less than delta, without a corner
    quantile   1[d_t <= Q] d_t             d_t' or 0                 Q is a quantile of d over the tokens of o+
    none       d_t                         d_t'                      nothing

The value of `clamp` is min(d_t, delta). Written as a minimum its gradient above delta would be 0, exactly the mask's;
the factor is therefore a constant, and the gradient keeps its direction and loses length. A quantile is taken within
one target, so what else is in the batch, or how it is packed, cannot change it.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def limit(d: Tensor, mask: Tensor, *, limiter: str, delta: float, quantile: float) -> Tensor:
    """L_t of the module's table.

    Args:
        d: [K, T], divergences along each target, with gradient.
        mask: [K, T] bool, true on the tokens of the target.
        limiter: a key of LIMITERS.
        delta: in nats.
        quantile: in [0, 1]; between two tokens' values it is interpolated.

    Returns:
        [K, T]; 0 outside the mask, value and gradient, whatever stands there.
    """
    return LIMITERS[limiter](d.masked_fill(~mask, 0), mask, delta, quantile)


def mask(d: Tensor, _tokens: Tensor, delta: float, _share: float) -> Tensor:
    return torch.where(d <= delta, d, 0)


def clamp(d: Tensor, _tokens: Tensor, delta: float, _share: float) -> Tensor:
    size = d.detach()
    return torch.where(size > delta, delta / size, 1) * d


def smooth(d: Tensor, _tokens: Tensor, delta: float, _share: float) -> Tensor:
    return delta / (delta + d.detach().clamp(min=0)) * d  # rounding may leave d slightly below 0


def quantile(d: Tensor, tokens: Tensor, _delta: float, share: float) -> Tensor:
    own = d.detach().masked_fill(~tokens, torch.nan)
    bound = own.nanquantile(share, dim=-1, keepdim=True)  # of a row without tokens NaN, and nothing is below it
    return torch.where(d <= bound, d, 0)


def none(d: Tensor, _tokens: Tensor, _delta: float, _share: float) -> Tensor:
    return d


LIMITERS: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "mask": mask,
    "clamp": clamp,
    "smooth": smooth,
    "quantile": quantile,
    "none": none,
}

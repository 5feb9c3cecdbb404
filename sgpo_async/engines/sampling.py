"""Sampling with one seed per request: token t of a request depends only on the seed, on t and on the logits.

Each request has its own stream of uniform random numbers, indexed by token: u(seed, t) is output t of SplitMix64
(Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014). Numbers are computed from the index and
not drawn in order, so a token changes neither with the other sequences of its batch nor with an interruption.
"""

from __future__ import annotations

import numpy as np
import torch

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_SHIFT1, _SHIFT2, _SHIFT3, _DROP = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(14)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, [n] uint64 -> [n] uint64; arithmetic is modulo 2^64."""
    x = (x ^ (x >> _SHIFT1)) * _MIX1
    x = (x ^ (x >> _SHIFT2)) * _MIX2
    return x ^ (x >> _SHIFT3)


def stream(seed: int) -> np.uint64:
    """The start state of the stream of `seed` (any integer, taken modulo 2^64)."""
    start = np.array([seed % 2**64], np.uint64)
    return np.uint64(_mix(start + _WEYL)[0])


def uniforms(streams: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """u in [0, 1 - 2^-50] for token `indices` [n] of `streams` [n] uint64, as [n] float64."""
    bits = _mix(streams + indices.astype(np.uint64) * _WEYL)
    return (bits >> _DROP).astype(np.float64) * 2.0**-50


def distribution(logits: torch.Tensor, temperature: torch.Tensor, top_p: np.ndarray, top_k: np.ndarray) -> torch.Tensor:
    """Compute the log-probabilities to sample from: softmax(z/T), truncated where top_p < 1 or top_k > 0.

    logits [n, V], temperature [n] float32, top_p [n] float64 in (0, 1], top_k [n] int64, 0 for no limit. Returns
    [n, V] float32, -inf for the tokens that are not kept.
    """
    logprobs = log_softmax(logits, temperature[:, None])
    if (cut := np.flatnonzero((top_p < 1) | (top_k > 0))).size:  # the other rows stay bit-identical
        rows, mass, most = (torch.from_numpy(array).to(logits.device) for array in (cut, top_p[cut], top_k[cut]))
        logprobs[rows] = truncate(logprobs[rows], mass, most)
    return logprobs


def sample(logprobs: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample from normalised log-probabilities [n, V] by inverting the CDF at `uniform` [n] float64 below 1.

    Returns tokens [n] int64 and their log-probabilities [n]. The cumulative sum is in float64, so rounding cannot
    select a token of probability 0.
    """
    cumulative = logprobs.double().exp_().cumsum(-1)
    threshold = uniform * cumulative[:, -1]
    tokens = (cumulative <= threshold[:, None]).sum(-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def others_kept(logprobs: torch.Tensor, tokens: torch.Tensor) -> list[np.ndarray]:
    """Return the tokens that truncated log-probabilities [n, V] have kept, without `tokens` [n]: n arrays of ids."""
    kept = (logprobs > -torch.inf).scatter_(1, tokens[:, None], False)
    rows, ids = kept.nonzero(as_tuple=True)
    edges = np.cumsum(np.bincount(rows.cpu().numpy(), minlength=len(tokens)))[:-1]
    return np.split(ids.to(torch.int32).cpu().numpy(), edges)


def likeliest(logits: torch.Tensor, temperature: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable tokens of softmax(z/T), the likeliest first, and their log-probabilities.

    logits [n, V], temperature [n] float32. Returns [n, k] int64, [n, k] float32.
    """
    top = log_softmax(logits, temperature[:, None]).topk(k, -1)
    return top.indices, top.values


def truncate(logprobs: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Restrict distributions to the fewest likeliest tokens with total probability >= `top_p`, and at most `top_k`.

    logprobs [n, V] normalised, top_p [n] float64 in (0, 1], top_k [n] int64, 0 for no limit. Returns renormalised
    log-probabilities [n, V], -inf for other tokens (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751). Of
    equally probable tokens the lower id comes first. Both limits apply to the distribution over the whole vocabulary.
    """
    ordered, ids = logprobs.sort(stable=True, dim=-1, descending=True)
    mass = ordered.double().exp_().cumsum(-1)
    rank = torch.arange(1, ordered.shape[1], device=ordered.device)
    beyond = torch.zeros_like(ordered, dtype=torch.bool)
    # The tokens before it already reach top_p, or there are top_k of them. Rounding never cuts with top_p = 1.
    reached = (mass[:, :-1] >= top_p[:, None]) & (top_p[:, None] < 1)
    beyond[:, 1:] = reached | ((rank >= top_k[:, None]) & (top_k[:, None] > 0))
    outside = torch.empty_like(beyond).scatter_(-1, ids, beyond)
    return torch.log_softmax(logprobs.masked_fill(outside, -torch.inf), -1)


def log_softmax(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """log softmax(z/T) over the last axis in float32; `temperature` broadcasts against `logits`."""
    return torch.log_softmax(logits.float() / temperature, -1)

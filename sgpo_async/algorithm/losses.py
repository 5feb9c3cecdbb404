"""The loss of SGPO: GRPO on autonomous rollouts (Eq. 1), distillation of guided rollouts (Eq. 5), their sum (Eq. 7).

The module also has two losses for a given text: plain likelihood, and the likelihood with LUFFY's policy shaping.

Each function returns one number per sequence. The loss of a batch is the sum of these numbers times constants that are
fixed beforehand (`loss_weights` for SGPO). Therefore it can be computed at once (`sgpo_loss`) or as a sum over
micro-batches and ranks, however the sequences are divided among them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sgpo_async.algorithm.limiters import limit

LARGEST = 80.0  # log of a ratio: exp of more than 88 is infinite in float32, and infinity times 0 is not a number


class Clip(NamedTuple):
    """The clip of the ratio r in Eq. 1."""

    low: float = 0.2  # eps_low
    high: float = 0.28  # eps_high
    # Where A < 0, a token's term is at least `dual` A (https://arxiv.org/abs/1912.09729). Without it a token whose
    # probability has become much larger than under the behaviour policy would weigh without bound.
    dual: float = math.inf


EQUATION_1 = Clip()


def grpo_loss(
    log_pi: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    correction: Tensor,
    log_prox: Tensor | None = None,
    clip: Clip = EQUATION_1,
) -> Tensor:
    """Compute the clipped policy-gradient loss of each sequence: the negative of Eq. 1, in decoupled form.

        -1/|o| sum_t sg[c_t] min( r_t A, clip(r_t, 1 - eps_low, 1 + eps_high) A ),    r_t = pi / pi_prox

    The proximal policy bounds the step, and c_t corrects from the behaviour policy mu to the proximal policy
    (decoupled PPO, https://arxiv.org/abs/2110.00641). If mu = pi_prox, then c_t = 1 and this is exactly Eq. 1: PPO
    whose old policy is the behaviour policy. Where A < 0, the term min(...) is at least `clip.dual` A.

    Args:
        log_pi: [N, T], log-probability of each sampled token, with gradient.
        mask: [N, T] bool, true on the tokens of the rollout.
        advantages: [N], or [N, T] if each token has its own (`algorithm.credit`).
        correction: [N, T], c_t = `correction_weights(log_prox, log_mu, ...)`.
        log_prox: [N, T]; by default sg[log_pi], which is correct for one optimiser step per batch: r_t is then 1,
            only its gradient matters, and the clip has no effect. With `grpo_correction.mode=clip` the learner passes
            log mu, and ones as the correction.
        clip: the limits of the ratio; by default those of the paper, without a dual clip.

    Returns:
        [N]; 0 for a sequence without tokens.
    """
    log_prox = log_pi if log_prox is None else log_prox
    # Mask before exp: otherwise a value in the padding could reach the gradient as 0 * NaN.
    ratio = (log_pi - log_prox.detach()).masked_fill(~mask, 0).clamp(max=LARGEST).exp()
    clipped = ratio.clamp(1 - clip.low, 1 + clip.high)
    advantage = advantages.detach()
    advantage = advantage if advantage.dim() == 2 else advantage.unsqueeze(-1)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    if clip.dual < math.inf:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, clip.dual * advantage), surrogate)
    return -_sequence_mean(correction.detach() * surrogate, mask)


def is_clipped(log_ratio: Tensor, advantages: Tensor, clip: Clip) -> Tensor:
    """Whether `grpo_loss` has no gradient at a token, because its ratio is beyond the clip.

    Args:
        log_ratio: [N, T], log pi - log pi_prox.
        advantages: [N] or [N, T].
        clip: the limits of the ratio.

    Returns:
        [N, T] bool.
    """
    ratio = log_ratio.detach().exp()
    advantage = advantages if advantages.dim() == 2 else advantages.unsqueeze(-1)
    too_likely = (advantage > 0) & (ratio > 1 + clip.high)
    too_unlikely = (advantage < 0) & ((ratio < 1 - clip.low) | (ratio > clip.dual))
    return too_likely | too_unlikely


def distillation_loss(
    d: Tensor, mask: Tensor, correction: Tensor, *, delta: float = 1.0, limiter: str = "mask", quantile: float = 0.95
) -> Tensor:
    """Compute L_KD = 1/|o+| sum_t sg[C_t] L_t of each target o+, with L_t from the limiter (`mask` is Eq. 5).

    The divisor is the length |o+|, not the number of tokens kept, so masking a token does not increase the weight
    of the others. A problem without a target is a row without tokens: its value and gradient are exactly 0.

    Args:
        d: [K, T], `divergence` along o+, with gradient.
        mask: [K, T] bool, true on the tokens of o+.
        correction: [K, T], C_t = `correction_weights(log_teacher, log_mu, ..., mode="prefix")`, or ones.
        delta: limit in nats.
        limiter: a key of LIMITERS.
        quantile: in [0, 1], for the limiter `quantile`.

    Returns:
        [K].
    """
    return _sequence_mean(correction.detach() * limit(d, mask, limiter=limiter, delta=delta, quantile=quantile), mask)


def reference_loss(log_pi: Tensor, log_reference: Tensor, mask: Tensor, correction: Tensor) -> Tensor:
    """Compute 1/|o| sum_t sg[c_t] (log pi - log pi_0)^2 / 2 of each sequence: [N, T] each -> [N].

    Over samples of pi its gradient is that of KL(pi || pi_0), the k2 of http://joschu.net/blog/kl-approx.html.
    """
    squares = (log_pi - log_reference.detach()).masked_fill(~mask, 0).square() / 2
    return _sequence_mean(correction.detach() * squares, mask)


def nll_loss(log_pi: Tensor, mask: Tensor) -> Tensor:
    """Compute the negative log-likelihood -1/|o| sum_t log pi(o_t|.) of each sequence: [N, T], [N, T] -> [N]."""
    return -_sequence_mean(log_pi, mask)


def shaped_loss(log_pi: Tensor, mask: Tensor, *, gamma: float = 0.1) -> Tensor:
    """Compute LUFFY's shaped loss -1/|o| sum_t f(pi(o_t|.)), f(p) = p / (p + gamma), of each sequence.

    The probabilities of the policy that wrote the demonstration are unknown and taken as 1, so the importance ratio is
    pi itself. f increases the gradient of unlikely tokens: it is gamma p / (p + gamma)^2 times the gradient of log p,
    which is largest at p = gamma. Without f the factor would be p. There is no clip.
    Source: https://arxiv.org/abs/2504.14945v1, Eq. 5 to 8.

    Args:
        log_pi: [N, T], log-probability of each given token, with gradient.
        mask: [N, T] bool, true on the tokens of the sequence.
        gamma: > 0.

    Returns:
        [N], in [-1, 0].
    """
    p = log_pi.masked_fill(~mask, 0).exp()
    return -_sequence_mean(p / (p + gamma), mask)


class KLMass(NamedTuple):
    """Tokens and KL of each target, and the parts that the mask d_t <= delta removes, as sums over tokens: [K] each."""

    tokens: Tensor
    masked_tokens: Tensor
    kl: Tensor
    masked_kl: Tensor


def kl_mass(d: Tensor, mask: Tensor, *, delta: float = 1.0) -> KLMass:
    """Count the tokens and sum the KL (in nats) of each target, in all and where d_t > delta: [K, T], [K, T] -> [K]."""
    d = d.detach().masked_fill(~mask, 0)
    masked = d > delta
    return KLMass(mask.sum(-1), masked.sum(-1), d.sum(-1), (d * masked).sum(-1))


class LossWeights(NamedTuple):
    """The constant weights of the per-sequence losses in Eq. 7."""

    autonomous: float  # weight of each of the P * G1 GRPO losses
    guided: Tensor  # [P'], weight of each problem's distillation loss


def loss_weights(alpha: Tensor, found: Tensor, *, problems: int, group_size: int) -> LossWeights:
    """Compute the weights of Eq. 7: 1/(P G1) for each autonomous rollout and alpha(q)/P for each target.

    Args:
        alpha: [P'], `adaptive_weight` of these problems: all P of the batch, or a part of them.
        found: [P'] bool, from `select_reachable`; the weight of a problem without a target is 0 (Eq. 4).
        problems: P, the number of problems in the whole batch over all micro-batches and ranks.
        group_size: G1.
    """
    return LossWeights(1 / (problems * group_size), alpha.detach().masked_fill(~found, 0) / problems)


def sgpo_loss(grpo: Tensor, distillation: Tensor, alpha: Tensor, found: Tensor) -> Tensor:
    """Compute L = mean over q of ( L_GRPO + alpha(q) L_KD ) for a whole batch (Eq. 7).

    With alpha = 0 the result is exactly the GRPO loss. examples/sgpo_in_one_file.py trains with it. The learner instead
    sums weighted sequences over micro-batches and ranks.

    Args:
        grpo: [P, G1], from `grpo_loss`.
        distillation: [P], from `distillation_loss`; any finite number where no target was found.
        alpha: [P].
        found: [P] bool.

    Returns:
        A scalar.
    """
    problems, group_size = grpo.shape
    weights = loss_weights(alpha, found, problems=problems, group_size=group_size)
    return weights.autonomous * grpo.sum() + (weights.guided * distillation).sum()


def _sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average over the tokens of each sequence, 1/|o| sum_t: [N, T], [N, T] -> [N]."""
    return values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)

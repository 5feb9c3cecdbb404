"""The loss of SGPO: GRPO on autonomous rollouts (Eq. 1), distillation of guided ones (5), their sum (7).

Beside them stands what trains on a given text: plain likelihood, and LUFFY's shaping of it.

Each gives one number per sequence. The loss of a batch is the sum of those numbers times constants that are fixed
beforehand (SGPO's: `loss_weights`), so it may be taken whole (`sgpo_loss`) or piece by piece, over micro-batches and
ranks, in any division.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sgpo_async.algorithm.limiters import limit


def grpo_loss(
    log_pi: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    correction: Tensor,
    log_prox: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.28),
) -> Tensor:
    """Clipped policy-gradient loss of each sequence: the negative of Eq. 1, in decoupled form.

        -1/|o| sum_t sg[c_t] min( r_t A, clip(r_t, 1 - eps_low, 1 + eps_high) A ),    r_t = pi / pi_prox

    The proximal policy bounds the step, and c_t corrects from the behaviour policy mu to the proximal one
    (decoupled PPO, https://arxiv.org/abs/2110.00641). With mu = pi_prox, c_t = 1: Eq. 1 as it stands.

    Args:
        log_pi: [N, T], log-probability of each sampled token, with gradient.
        mask: [N, T] bool, true on the tokens of the rollout.
        advantages: [N].
        correction: [N, T], c_t = `correction_weights(log_prox, log_mu, ...)`.
        log_prox: [N, T]; by default sg[log_pi], right for one optimiser step per batch: r_t is then 1, only
            its gradient counts, and the clip bounds nothing. The learner takes one step and never passes it;
            tests do, for Eq. 1 as it stands.
        clip: (eps_low, eps_high).

    Returns:
        [N]; 0 for a sequence without tokens.
    """
    log_prox = log_pi if log_prox is None else log_prox
    # Masked before exp: what stands in the padding must not reach the gradient as 0 * NaN.
    ratio = (log_pi - log_prox.detach()).masked_fill(~mask, 0).exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    advantage = advantages.detach().unsqueeze(-1)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    return -_sequence_mean(correction.detach() * surrogate, mask)


def distillation_loss(
    d: Tensor, mask: Tensor, correction: Tensor, *, delta: float = 1.0, limiter: str = "mask", quantile: float = 0.95
) -> Tensor:
    """L_KD = 1/|o+| sum_t sg[C_t] L_t for each target o+; L_t = 1[d_t <= delta] d_t (Eq. 5), or as `limiter` says.

    The divisor is the length |o+|, not the number of tokens kept: masking a token does not raise the weight
    of the others. No target found is a row without tokens: value and gradient exactly 0.

    Args:
        d: [K, T], `divergence` along o+, with gradient.
        mask: [K, T] bool, true on the tokens of o+.
        correction: [K, T], C_t = `correction_weights(log_teacher, log_mu, ..., mode="prefix")`, or ones.
        delta: in nats.
        limiter: a key of LIMITERS.
        quantile: in [0, 1], for the limiter of that name.

    Returns:
        [K].
    """
    return _sequence_mean(correction.detach() * limit(d, mask, limiter=limiter, delta=delta, quantile=quantile), mask)


def nll_loss(log_pi: Tensor, mask: Tensor) -> Tensor:
    """-1/|o| sum_t log pi(o_t|.) of each sequence, as in SFT: [N, T], [N, T] -> [N]."""
    return -_sequence_mean(log_pi, mask)


def shaped_loss(log_pi: Tensor, mask: Tensor, *, gamma: float = 0.1) -> Tensor:
    """-1/|o| sum_t f(pi(o_t|.)), f(p) = p / (p + gamma), of each sequence: LUFFY's policy shaping.

    The ratio to the demonstration's own policy, whose probabilities are unknown and taken as 1, is pi itself. f lifts
    the small ones: the gradient of a token is gamma p / (p + gamma)^2 that of its log p, largest at p = gamma, where
    that of the bare ratio is p. There is no clip. Source: https://arxiv.org/abs/2504.14945v1, Eq. 5 to 8.

    Args:
        log_pi: [N, T], log-probability of each given token, with gradient.
        mask: [N, T] bool, true on the tokens of the sequence.
        gamma: above 0.

    Returns:
        [N], in [-1, 0].
    """
    p = log_pi.masked_fill(~mask, 0).exp()
    return -_sequence_mean(p / (p + gamma), mask)


class KLMass(NamedTuple):
    """What the mask d_t <= delta takes, or would take, from each target, all [K]. Sums, so that they add up."""

    tokens: Tensor
    masked_tokens: Tensor
    kl: Tensor
    masked_kl: Tensor


def kl_mass(d: Tensor, mask: Tensor, *, delta: float = 1.0) -> KLMass:
    """Tokens and KL (in nats) of each target, and their parts with d_t > delta: [K, T], [K, T] -> [K]."""
    d = d.detach().masked_fill(~mask, 0)
    masked = d > delta
    return KLMass(mask.sum(-1), masked.sum(-1), d.sum(-1), (d * masked).sum(-1))


class LossWeights(NamedTuple):
    """Constants by which the per-sequence losses enter Eq. 7."""

    autonomous: float  # of each of the P * G1 GRPO losses
    guided: Tensor  # [P'], of each problem's distillation loss


def loss_weights(alpha: Tensor, found: Tensor, *, problems: int, group_size: int) -> LossWeights:
    """1/(P G1) for each autonomous rollout and alpha(q)/P for each target (Eq. 7).

    Args:
        alpha: [P'], `adaptive_weight` of these problems: all P of the batch, or the part that is at hand.
        found: [P'] bool, of `select_reachable`; without a target alpha is 0 (Eq. 4).
        problems: P, of the whole batch over all micro-batches and ranks.
        group_size: G1.
    """
    return LossWeights(1 / (problems * group_size), alpha.detach().masked_fill(~found, 0) / problems)


def sgpo_loss(grpo: Tensor, distillation: Tensor, alpha: Tensor, found: Tensor) -> Tensor:
    """L = mean over q of ( L_GRPO + alpha(q) L_KD ), for a whole batch (Eq. 7). alpha = 0 is GRPO, exactly.

    The equation as it stands: tests compare with it. The learner sums weighted sequences, in whatever division.

    Args:
        grpo: [P, G1], of `grpo_loss`.
        distillation: [P], of `distillation_loss`; any finite number where no target was found.
        alpha: [P].
        found: [P] bool.

    Returns:
        A scalar.
    """
    problems, group_size = grpo.shape
    weights = loss_weights(alpha, found, problems=problems, group_size=group_size)
    return weights.autonomous * grpo.sum() + (weights.guided * distillation).sum()


def _sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """1/|o| sum over the tokens of each sequence: [N, T], [N, T] -> [N]."""
    return values.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)

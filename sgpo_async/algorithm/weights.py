"""The distillation weight alpha(q) of each problem: the adaptive weight (Eq. 6) and its alternative (Eq. 8)."""

import math

import torch
from torch import Tensor

from sgpo_async.algorithm.advantages import group_advantages


def adaptive_weight(
    p_auto: Tensor, p_guide: Tensor, *, alpha0: float = 0.5, gamma: float = 0.1, alpha_max: float = 0.8
) -> Tensor:
    """Compute alpha(q) = clip( alpha0 (p_guide - p_auto + gamma) / (p_auto + gamma), 0, alpha_max ) (Eq. 6).

    alpha(q) is large if the strategy helps and the policy fails alone; it is 0 if the strategy lowers the pass rate
    by gamma or more. If no guided rollout is correct there is nothing to distil: `loss_weights` then sets the weight
    to 0, although this formula gives alpha0 for p_auto = p_guide = 0.

    Args:
        p_auto: [P], mean reward of the autonomous rollouts.
        p_guide: [P], mean reward of the guided rollouts.

    Returns:
        [P], in [0, alpha_max], without gradient.
    """
    p_auto, p_guide = p_auto.detach(), p_guide.detach()
    return (alpha0 * (p_guide - p_auto + gamma) / (p_auto + gamma)).clamp(0, alpha_max)


def group_advantage_weight(rewards: Tensor, *, alpha_max: float = 0.8) -> Tensor:
    """Compute alpha(q) = clip( (R(o+) - mean) / std, 0, alpha_max ) over the rewards of {o_1, ..., o_G1, o+} (Eq. 8).

    This is the advantage that the target, with R(o+) = 1, would have in the autonomous group. The paper adds a small
    constant to std; `group_advantages` adds none. In both versions the weight is 0 if all rewards are equal.

    Args:
        rewards: [P, G1], rewards of the autonomous rollouts.

    Returns:
        [P], in [0, alpha_max], without gradient.
    """
    with_target = torch.cat((rewards.detach(), rewards.new_ones(len(rewards), 1)), dim=-1)
    return group_advantages(with_target)[:, -1].clamp(0, alpha_max)


def corrected_pass_rate(rewards: Tensor, log_rho: Tensor, *, bound: float) -> Tensor:
    """Estimate the mean reward under pi of rollouts that mu sampled: sum_i w_i R_i / sum_i w_i, w_i = min(rho_i, c).

    rho_i is the importance ratio of the whole sequence. Dividing by the sum of the weights keeps the rate in [0, 1],
    and gives the plain mean if all weights are equal, as at lag 0. The truncation and the normalisation bias the
    estimate.

    Args:
        rewards: [P, G].
        log_rho: [P, G], log pi(o_i|.)/mu(o_i|.), summed over tokens.
        bound: c >= 1; math.inf for no bound.

    Returns:
        [P], without gradient.
    """
    log_weights = log_rho.detach().clamp(max=math.log(bound))
    # Relative to the largest weight, so that the weights cannot all underflow, which would give 0/0.
    weights = (log_weights - log_weights.amax(-1, keepdim=True)).exp()
    return (weights * rewards.detach()).sum(-1) / weights.sum(-1)

"""How much is distilled of each problem: the adaptive weight (Eq. 6) and the one it is compared with (Eq. 8)."""

import math

import torch
from torch import Tensor

from sgpo_async.algorithm.advantages import group_advantages


def adaptive_weight(
    p_auto: Tensor, p_guide: Tensor, *, alpha0: float = 0.5, gamma: float = 0.1, alpha_max: float = 0.8
) -> Tensor:
    """alpha(q) = clip( alpha0 (p_guide - p_auto + gamma) / (p_auto + gamma), 0, alpha_max ) (Eq. 6).

    Large where the strategy helps and the policy fails alone, 0 where the strategy harms by gamma or more.
    Where no guided rollout is correct there is nothing to distil, and `loss_weights` sets alpha to 0 whatever
    this formula says (alpha0, at p_auto = p_guide = 0).

    Args:
        p_auto: [P], mean reward of the autonomous rollouts.
        p_guide: [P], mean reward of the guided rollouts.

    Returns:
        [P], in [0, alpha_max], without gradient.
    """
    p_auto, p_guide = p_auto.detach(), p_guide.detach()
    return (alpha0 * (p_guide - p_auto + gamma) / (p_auto + gamma)).clamp(0, alpha_max)


def group_advantage_weight(rewards: Tensor, *, alpha_max: float = 0.8) -> Tensor:
    """alpha(q) = clip( (R(o+) - mean) / std, 0, alpha_max ) over the rewards of {o_1, ..., o_G1, o+} (Eq. 8).

    That is the advantage which the target, R(o+) = 1, would have in the autonomous group. The paper adds a small
    constant to std; `group_advantages` does without, and is 0 in the uniform group, as the paper's is.

    Args:
        rewards: [P, G1], of the autonomous rollouts.

    Returns:
        [P], in [0, alpha_max], without gradient.
    """
    with_target = torch.cat((rewards.detach(), rewards.new_ones(len(rewards), 1)), dim=-1)
    return group_advantages(with_target)[:, -1].clamp(0, alpha_max)


def corrected_pass_rate(rewards: Tensor, log_rho: Tensor, *, bound: float) -> Tensor:
    """Mean reward under pi of rollouts that mu sampled: sum_i w_i R_i / sum_i w_i, w_i = min(rho_i, c).

    rho_i is the ratio of the whole sequence. Normalising by the weights' own sum keeps the rate in [0, 1], and makes
    it the plain mean where all weights are equal, as at lag 0. Clipping and normalising are what is biased in it.

    Args:
        rewards: [P, G].
        log_rho: [P, G], log pi(o_i|.)/mu(o_i|.), summed over tokens.
        bound: c >= 1; math.inf for none.

    Returns:
        [P], without gradient.
    """
    log_weights = log_rho.detach().clamp(max=math.log(bound))
    weights = (
        log_weights - log_weights.amax(-1, keepdim=True)
    ).exp()  # relative to the largest: none underflows to 0/0
    return (weights * rewards.detach()).sum(-1) / weights.sum(-1)

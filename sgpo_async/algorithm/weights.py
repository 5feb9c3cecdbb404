"""The adaptive distillation weight (Eq. 6)."""

from torch import Tensor


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

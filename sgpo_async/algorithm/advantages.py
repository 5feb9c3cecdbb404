"""Group-relative advantages (Eq. 1)."""

from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """Standardise the rewards of each group: A_i = (R_i - mean(R)) / std(R) (Eq. 1).

    A group holds the autonomous rollouts of one problem. std is the population standard deviation (divisor G), so
    that the mean square of A is 1 for every group size and a group of one rollout is defined. No epsilon is added
    to std, because it would only bias A: rewards in {0, 1} that differ have std >= sqrt(G - 1) / G. If all rewards
    of a group are equal, its advantages are exactly 0.

    Rewards may be any finite numbers. They are divided by the largest magnitude first, which changes no advantage and
    keeps squares and sums finite; rewards in {0, 1} stay as they are, bit for bit.

    Args:
        rewards: [P, G] floating point.

    Returns:
        [P, G].
    """
    uniform = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    # Compare the rewards instead of testing std == 0: the rounded mean of equal rewards may differ from them.
    rewards = rewards / rewards.abs().amax(-1, keepdim=True).masked_fill(uniform, 1)
    centred = (rewards - rewards.mean(-1, keepdim=True)).masked_fill(uniform, 0)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / std.masked_fill(std == 0, 1)

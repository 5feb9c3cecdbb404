"""Group-relative advantages: Eq. 1 and two alternatives.

scale   A_i                          source
std     (R_i - mean(R)) / std(R)     GRPO, Eq. 1
mean    (R_i - mean(R)) / mean(R)    MaxRL, arXiv 2602.02710: hard problems count more
none    R_i - mean(R)                Dr. GRPO, arXiv 2503.20783: hard and easy problems count less
"""

from torch import Tensor

SCALES = ("std", "mean", "none")


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """Compare the rewards of each group with their mean, divided as `scale` says.

    A group holds the autonomous rollouts of one problem. std is the population standard deviation (divisor G), so
    that the mean square of A is 1 for every group size and a group of one rollout is defined. No epsilon is added
    to std, because it would only bias A: rewards in {0, 1} that differ have std >= sqrt(G - 1) / G. If all rewards
    of a group are equal, its advantages are exactly 0.

    The mean is an estimate of the pass rate, so `mean` is for rewards of at least 0: where it is not positive, all
    advantages are 0.

    Rewards may be any finite numbers. With `std` they are divided by the largest magnitude first, which changes no
    advantage and keeps squares and sums finite; rewards in {0, 1} stay as they are, bit for bit.

    Args:
        rewards: [P, G] floating point.
        scale: one of SCALES.

    Returns:
        [P, G].
    """
    uniform = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    # Compare the rewards instead of testing std == 0: the rounded mean of equal rewards may differ from them.
    if scale == "std":
        rewards = rewards / rewards.abs().amax(-1, keepdim=True).masked_fill(uniform, 1)
    mean = rewards.mean(-1, keepdim=True)
    centred = (rewards - mean).masked_fill(uniform, 0)
    if scale == "none":
        return centred
    if scale == "mean":
        return (centred / mean).masked_fill(mean <= 0, 0)
    assert scale == "std", f"scale must be one of {', '.join(SCALES)}, got {scale!r}"
    std = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / std.masked_fill(std == 0, 1)

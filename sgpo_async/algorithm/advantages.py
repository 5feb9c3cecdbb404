"""Group-relative advantages (Eq. 1)."""

from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """A_i = (R_i - mean(R)) / std(R) over the autonomous rollouts of one problem (Eq. 1).

    std is the population's (divisor G): the mean square of A is then 1 for every group size, and a group of
    one is defined. There is no epsilon, which would bias A for nothing: rewards in {0, 1} that differ have
    std >= sqrt(G - 1) / G. A uniform group has no preference: its advantages are exactly 0.

    Args:
        rewards: [P, G] floating point.

    Returns:
        [P, G].
    """
    uniform = (rewards == rewards[..., :1]).all(-1, keepdim=True)
    # By comparison, not by std == 0: the rounded mean of equal rewards may differ from each of them.
    centred = (rewards - rewards.mean(-1, keepdim=True)).masked_fill(uniform, 0)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / std.masked_fill(std == 0, 1)

"""The reachable distillation target (Eq. 4)."""

import torch
from torch import Tensor


def select_reachable(logprob_sums: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Select o+ = argmax over correct o~_j of log pi(o~_j|q), the correct guided rollout most likely unguided (Eq. 4).

    The log-probability is summed over tokens, not averaged, because a longer rollout is harder to reach.

    Args:
        logprob_sums: [P, G2], log pi(o~_j|q) = sum_t log pi(o~_jt|q,o~_j<t), without the strategy.
        correct: [P, G2], R(o~_j) = 1.

    Returns:
        index: [P], j of o+ (the first one if several are equally likely); 0 where nothing was found.
        found: [P] bool, whether any guided rollout is correct.
    """
    correct = correct.bool()
    # A correct rollout of probability 0 still ranks above an incorrect one.
    finite = logprob_sums.detach().clamp(min=torch.finfo(logprob_sums.dtype).min)
    return finite.masked_fill(~correct, -torch.inf).argmax(-1), correct.any(-1)

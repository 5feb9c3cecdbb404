"""SGPO, Strategy-Guided Policy Optimization, as pure functions of tensors.

Source: Shi et al., "Beyond Trajectory Imitation: Strategy-Guided Policy Optimization for LLM Reasoning",
https://arxiv.org/abs/2606.24064. The equation numbers are the paper's; sg[.] stops the gradient.

For each of P problems q with a strategy s, the policy pi writes G1 autonomous rollouts o_i ~ pi(.|q) and G2
guided rollouts o~_j ~ pi(.|q,s), each with a reward R in {0, 1}. Read the files in the order of the equations:

    advantages.py   Eq. 1     A_i = (R_i - mean) / std, within the autonomous group
    divergences.py  Eq. 3     d_t = KL( sg[pi(.|q,s,o~_<t)] || pi(.|q,o~_<t) ), and alternatives to it
    selection.py    Eq. 4     o+ = the correct o~_j that is most likely without the strategy
    limiters.py     Eq. 5     limits on the loss and gradient of a single token
    weights.py      Eq. 6, 8  alpha(q): the weight of distillation, from how much the strategy helps
    losses.py       Eq. 1, 5, 7   L = L_GRPO + alpha(q) L_KD, averaged over problems; likelihood losses of a given text
    credit.py       advantages of single tokens, of methods near SGPO
    correction.py   importance weights for rollouts that an older policy mu sampled
    linear.py       losses and their gradients directly from hidden states, for large vocabularies
    linear_triton.py    the elementwise part of linear.py for CUDA, as Triton kernels

docs/algorithm.md lists every equation with the configuration key that selects it.

Shapes: P problems, G rollouts in a group, N or K sequences, T tokens, V vocabulary, H hidden width.
Every function computes in the floating-point type of its inputs.
"""

from sgpo_async.algorithm.advantages import group_advantages
from sgpo_async.algorithm.correction import MODES, WHOLE_SEQUENCE_MODES, correction_weights
from sgpo_async.algorithm.credit import iw_opd_advantages, rlcsd_advantages, rlcsd_shift, rlsd_advantages
from sgpo_async.algorithm.divergences import DIVERGENCES, divergence, forward_kl, top_divergence
from sgpo_async.algorithm.limiters import LIMITERS, WHOLE_SEQUENCE_LIMITERS, limit
from sgpo_async.algorithm.linear import Found, Kept, LogProbability, Part, TeacherDivergence, TopDivergence, linear_loss
from sgpo_async.algorithm.losses import (
    Clip,
    KLMass,
    LossWeights,
    distillation_loss,
    grpo_loss,
    is_clipped,
    kl_mass,
    loss_weights,
    nll_loss,
    reference_loss,
    sgpo_loss,
    shaped_loss,
)
from sgpo_async.algorithm.selection import select_reachable
from sgpo_async.algorithm.weights import adaptive_weight, corrected_pass_rate, group_advantage_weight

__all__ = [
    "DIVERGENCES",
    "LIMITERS",
    "MODES",
    "WHOLE_SEQUENCE_LIMITERS",
    "WHOLE_SEQUENCE_MODES",
    "Clip",
    "Found",
    "KLMass",
    "Kept",
    "LogProbability",
    "LossWeights",
    "Part",
    "TeacherDivergence",
    "TopDivergence",
    "adaptive_weight",
    "corrected_pass_rate",
    "correction_weights",
    "distillation_loss",
    "divergence",
    "forward_kl",
    "group_advantage_weight",
    "group_advantages",
    "grpo_loss",
    "is_clipped",
    "iw_opd_advantages",
    "kl_mass",
    "limit",
    "linear_loss",
    "loss_weights",
    "nll_loss",
    "reference_loss",
    "rlcsd_advantages",
    "rlcsd_shift",
    "rlsd_advantages",
    "select_reachable",
    "sgpo_loss",
    "shaped_loss",
    "top_divergence",
]

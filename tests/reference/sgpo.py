"""SGPO in float64 NumPy with plain loops, transcribed from the equations of https://arxiv.org/abs/2606.24064.

This module uses nothing from the package under test. It computes with probabilities, not in log space.
"""

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray


def softmax(logits: Array, temperature: float = 1.0) -> Array:
    """The softmax of one row of logits."""
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    return np.array([w / sum(weights) for w in weights])


def advantages(rewards: Array) -> Array:
    """Eq. 1: A_i = (R_i - mean) / std, with the population's std; 0 for equal rewards."""
    result = np.zeros_like(rewards, dtype=np.float64)
    for p, group in enumerate(rewards):
        if len(set(group)) == 1:
            continue
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / len(group))
        for i, r in enumerate(group):
            result[p, i] = (r - mean) / std
    return result


def maxrl_advantages(rewards: Array) -> Array:
    """MaxRL: A_i = (R_i - mean) / mean; 0 if no rollout is rewarded."""
    result = np.zeros_like(rewards, dtype=np.float64)
    for p, group in enumerate(rewards):
        mean = sum(group) / len(group)
        for i, r in enumerate(group):
            result[p, i] = (r - mean) / mean if mean > 0 else 0.0
    return result


def centred_rewards(rewards: Array) -> Array:
    """Dr. GRPO: A_i = R_i - mean."""
    return np.array([[r - sum(group) / len(group) for r in group] for group in rewards])


def forward_kl(teacher_logits: Array, student_logits: Array, temperature: float = 1.0) -> Array:
    """Eq. 3: d_t = sum_v p_v log(p_v / q_v) for [T, V] logits."""
    d = np.zeros(len(teacher_logits))
    for t in range(len(d)):
        p, q = softmax(teacher_logits[t], temperature), softmax(student_logits[t], temperature)
        for v in range(len(p)):
            if p[v] > 0:
                d[t] += p[v] * math.log(p[v] / q[v])
    return d


def reverse_kl(teacher_logits: Array, student_logits: Array, temperature: float = 1.0) -> Array:
    """sum_v q_v log(q_v / p_v): the arguments of Eq. 3 exchanged."""
    return forward_kl(student_logits, teacher_logits, temperature)


def jensen_shannon(teacher_logits: Array, student_logits: Array, temperature: float = 1.0) -> Array:
    """Half of KL(p || m) and half of KL(q || m), where m = (p + q)/2."""
    d = np.zeros(len(teacher_logits))
    for t in range(len(d)):
        p, q = softmax(teacher_logits[t], temperature), softmax(student_logits[t], temperature)
        for v in range(len(p)):
            m = (p[v] + q[v]) / 2
            d[t] += p[v] / 2 * math.log(p[v] / m) if p[v] > 0 else 0
            d[t] += q[v] / 2 * math.log(q[v] / m) if q[v] > 0 else 0
    return d


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jensen-shannon": jensen_shannon}


def merged(distribution: Array, listed: list[int]) -> Array:
    """The probabilities of the listed tokens and, last, of all other tokens together."""
    rest = sum(p for v, p in enumerate(distribution) if v not in listed)
    return np.array([*(distribution[v] for v in listed), rest])


def top_divergence(p: list[Array], q: list[Array], kind: str) -> Array:
    """The divergence between merged distributions, given as T rows of probabilities each: [T]."""
    logits = (np.log(np.array(rows)) for rows in (p, q))  # softmax undoes the logarithm
    return DIVERGENCES[kind](*logits)


def entropy(logits: Array, temperature: float = 1.0) -> Array:
    """-sum_v q_v log q_v for [T, V] logits."""
    return np.array([-sum(q * math.log(q) for q in softmax(row, temperature)) for row in logits])


def select_reachable(logprob_sums: Array, correct: Array) -> list[int | None]:
    """Eq. 4: the index of the correct rollout with the highest summed log-probability; None if none is correct."""
    chosen: list[int | None] = []
    for scores, flags in zip(logprob_sums, correct, strict=True):
        best = None
        for j, score in enumerate(scores):
            if flags[j] and (best is None or score > scores[best]):
                best = j
        chosen.append(best)
    return chosen


def adaptive_weight(p_auto: float, p_guide: float, alpha0: float, gamma: float, alpha_max: float) -> float:
    """Eq. 6."""
    return min(max(alpha0 * (p_guide - p_auto + gamma) / (p_auto + gamma), 0.0), alpha_max)


def group_advantage_weight(rewards: Array, alpha_max: float, e: float = 0.0) -> float:
    """Eq. 8: the advantage of o+, with reward 1, in {o_1, ..., o_G1, o+}; the paper adds the constant e to std."""
    group = [*rewards, 1.0]
    mean = sum(group) / len(group)
    std = math.sqrt(sum((r - mean) ** 2 for r in group) / len(group))
    return min(max((1.0 - mean) / (std + e), 0.0), alpha_max) if std + e > 0 else 0.0


def corrected_mean(rewards: Array, rho: Array, bound: float) -> float:
    """The self-normalised mean of the rewards with weights min(rho, c)."""
    weights = [min(r, bound) for r in rho]
    return sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)


def limited(d: Array, limiter: str, delta: float, quantile: float) -> list[float]:
    """The clipped loss of each token of one target: Eq. 5 or an alternative `limiter`."""
    ordered = sorted(d)
    rank = quantile * (len(d) - 1)  # interpolate between the two nearest ranks
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    bound = low + (high - low) * (rank - math.floor(rank))
    rules: dict[str, Callable[[float], float]] = {
        "mask": lambda x: x if x <= delta else 0.0,
        "clamp": lambda x: min(x, delta),
        "smooth": lambda x: x * delta / (x + delta),
        "quantile": lambda x: x if x <= bound else 0.0,
        "none": lambda x: x,
    }
    return [rules[limiter](x) for x in d]


def limited_gradient_factors(d: Array, limiter: str, delta: float, quantile: float) -> list[float]:
    """The factor by which the limiter scales the gradient of each token."""
    values = limited(d, limiter, delta, quantile)
    return [value / x if x else 1.0 for value, x in zip(values, d, strict=True)]


def nll_loss(pi: Array) -> float:
    """Mean of -log of the tokens' probabilities."""
    return -sum(math.log(p) for p in pi) / len(pi)


def shaped_loss(pi: Array, gamma: float) -> float:
    """LUFFY (arXiv 2504.14945): mean of -f(p), f(p) = p / (p + gamma), with demonstration probabilities of 1."""
    return -sum(p / (p + gamma) for p in pi) / len(pi)


def grpo_loss(pi: Array, prox: Array, correction: Array, advantage: float, clip: tuple[float, float]) -> float:
    """The negative of Eq. 1 for one sequence of token probabilities, decoupled: c_t weights each token."""
    total = 0.0
    for t in range(len(pi)):
        r = pi[t] / prox[t]
        clipped = min(max(r, 1 - clip[0]), 1 + clip[1])
        total += correction[t] * min(r * advantage, clipped * advantage)
    return -total / len(pi)


def distillation_loss(d: Array, correction: Array, delta: float) -> float:
    """Eq. 5 for one target: tokens with d_t > delta are masked, the divisor stays |o+|."""
    total = 0.0
    for t in range(len(d)):
        if d[t] <= delta:
            total += correction[t] * d[t]
    return total / len(d)


def sgpo_loss(grpo: Array, distillation: Array, alpha: Array, has_target: Array) -> float:
    """Eq. 7: mean over problems of the group's mean GRPO loss plus alpha(q) L_KD."""
    total = 0.0
    for p in range(len(grpo)):
        total += sum(grpo[p]) / len(grpo[p])
        if has_target[p]:
            total += alpha[p] * distillation[p]
    return total / len(grpo)


def _none(rho: list[float], _c: float) -> list[float]:
    return [1.0 for _ in rho]


def _token(rho: list[float], c: float) -> list[float]:
    return [min(r, c) for r in rho]


def _token_mask(rho: list[float], c: float) -> list[float]:
    return [r if 1 / c <= r <= c else 0.0 for r in rho]


def _prefix(rho: list[float], c: float) -> list[float]:
    return [math.prod(min(r, c) for r in rho[:t]) for t in range(len(rho))]


def _sequence(rho: list[float], c: float) -> list[float]:
    return [min(math.prod(rho), c) for _ in rho]


def _sequence_geometric(rho: list[float], c: float) -> list[float]:
    mean = math.prod(rho) ** (1 / len(rho))
    return [mean if 1 / c <= mean <= c else 0.0 for _ in rho]


CORRECTIONS: dict[str, Callable[[list[float], float], list[float]]] = {
    "none": _none,
    "token": _token,
    "token-mask": _token_mask,
    "prefix": _prefix,
    "sequence": _sequence,
    "sequence-geometric": _sequence_geometric,
}


def correction_weights(pi: Array, mu: Array, mask: Array, mode: str, bound: float) -> Array:
    """The weights of one sequence, computed from the unmasked tokens only; the other positions are 0."""
    positions = [t for t in range(len(mask)) if mask[t]]
    weights = np.zeros(len(mask))
    if positions:
        rho = [pi[t] / mu[t] for t in positions]
        weights[positions] = CORRECTIONS[mode](rho, bound)
    return weights

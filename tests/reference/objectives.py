"""The loss of every objective, computed sequence by sequence with full logits and plain loops.

Transcribed from the papers: SGPO https://arxiv.org/abs/2606.24064, LUFFY https://arxiv.org/abs/2504.14945v1 (Eq. 4, 5),
HPT https://arxiv.org/abs/2509.04419. Quantities under a stop-gradient, sg[.], are computed with the model `at`, so that
the loss can be differentiated both by autograd and by finite differences.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sgpo_async.config.schema import Run
from sgpo_async.wire.records import Rollout
from tests.reference import self_distillation, sgpo
from tests.reference.problem import Problem, correction, divergence, sampled

Responses = Callable[[int], np.ndarray | None]


def reference_loss(
    model: PreTrainedModel,
    groups: list[list[Rollout]],
    run: Run,
    *,
    teacher: PreTrainedModel | None = None,
    responses: Responses = lambda _: None,
    at: PreTrainedModel | None = None,
    start: PreTrainedModel | None = None,
) -> Tensor:
    """The mean over problems of the objective's loss; `start` are the weights of `reference_kl`."""
    at = at or model
    losses = []
    for group in groups:
        autonomous, guided = ([r for r in group if r.guided == flag] for flag in (False, True))
        problem = Problem(model, at, teacher or at, start, run, autonomous, guided, responses(group[0].task))
        losses.append(OBJECTIVES[run.algorithm.objective](problem))
    return torch.stack(losses).sum() / len(groups)


def grpo(problem: Problem) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for rollout, advantage in zip(problem.autonomous, problem.advantages(problem.autonomous), strict=True):
        total = total - problem.surrogate(rollout, float(advantage)).mean() + problem.drift(rollout)
    return total / len(problem.autonomous)


def autonomous(problem: Problem) -> Tensor:
    """GRPO on the autonomous rollouts, unless only the guided ones are trained."""
    return grpo(problem) if problem.rule.policy_gradient else torch.zeros((), dtype=torch.float64)


def sft(problem: Problem) -> Tensor:
    if problem.response is None:
        return torch.zeros((), dtype=torch.float64)
    return -problem.log_pi(problem.model, problem.plain, problem.response).mean()


def luffy(problem: Problem) -> Tensor:
    if problem.response is None:
        return grpo(problem)
    rewards = np.array([[*(r.reward for r in problem.autonomous), 1.0]])
    *advantages, response_advantage = sgpo.advantages(rewards)[0]
    p = problem.log_pi(problem.model, problem.plain, problem.response).exp()
    total = (p / (p + problem.rule.luffy_gamma) * response_advantage).sum()
    for rollout, advantage in zip(problem.autonomous, advantages, strict=True):
        total = total + problem.surrogate(rollout, float(advantage)).sum()
    return -total / (len(problem.response) + sum(len(sampled(r)) for r in problem.autonomous))


def hpt(problem: Problem) -> Tensor:
    correct = sum(r.reward == 1 for r in problem.autonomous)
    return sft(problem) if problem.response is not None and correct <= problem.rule.hpt_gate else grpo(problem)


def sgpo_(problem: Problem) -> Tensor:
    rule, loss = problem.rule, autonomous(problem)
    successes = [r for r in problem.guided if r.reward == 1]
    if not successes or len(successes) / len(problem.guided) < rule.guide_gate:
        return loss
    if rule.target == "reachable":
        successes = [max(successes, key=lambda r: r.unguided_logprob)]
    losses = [likelihood(problem, o) if rule.divergence == "sft" else distillation(problem, o) for o in successes]
    return loss + alpha(problem) * torch.stack(losses).mean()


OBJECTIVES: dict[str, Callable[[Problem], Tensor]] = {
    "sgpo": sgpo_,
    "grpo": grpo,
    "sft": sft,
    "luffy": luffy,
    "hpt": hpt,
    "opsd": self_distillation.opsd,
    "sdpo": lambda problem: self_distillation.sdpo(problem, grpo(problem)),
    "kdrl": lambda problem: grpo(problem) + self_distillation.opsd(problem),
    "rlsd": self_distillation.rlsd,
    "rlcsd": self_distillation.rlcsd,
    "iw-opd": self_distillation.iw_opd,
    "pope": self_distillation.pope,
    "pi-distill": lambda problem: autonomous(problem) + self_distillation.pi_distill(problem),
}


def likelihood(problem: Problem, target: Rollout) -> Tensor:
    return -problem.log_pi(problem.model, problem.plain, target.tokens)[sampled(target)].mean()


def distillation(problem: Problem, target: Rollout) -> Tensor:
    """Eq. 5 with the divergence and the clipping (`limiter`) of the run."""
    rule = problem.rule
    own = [place for place in sampled(target) if place >= rule.distil_skip]
    log_p = problem.teaches(target.prompt, target.tokens)
    log_q, log_q_at = (problem.all_log_probs(m, problem.plain, target.tokens) for m in (problem.model, problem.at))
    chosen = problem.sampled_log_pi(problem.teacher, target).detach()
    if rule.teacher == "behaviour":
        listed = target.top_tokens.reshape(len(target.tokens), -1).tolist()
        log_p = torch.from_numpy(reported(target))
        log_q, log_q_at = (merged(q, listed) for q in (log_q, log_q_at))
        chosen = torch.from_numpy(target.logprobs.astype(np.float64))
    log_p, log_q, log_q_at, chosen = (values[own] for values in (log_p, log_q, log_q_at, chosen))
    d = torch.stack([divergence(p, q, rule.divergence) for p, q in zip(log_p, log_q, strict=True)])
    values = np.array([divergence(p, q, rule.divergence).item() for p, q in zip(log_p, log_q_at.detach(), strict=True)])
    factors = sgpo.limited_gradient_factors(values, rule.limiter, rule.delta, rule.quantile)
    return (correction(chosen, target, rule.kl_correction, own) * torch.tensor(factors, dtype=torch.float64) * d).mean()


def reported(target: Rollout) -> np.ndarray:
    """The log-probabilities that the engine reported at each token and, last, that of all other tokens: [T, k + 1]."""
    known = [[math.exp(x) for x in row] for row in target.top_logprobs.reshape(len(target.tokens), -1).tolist()]
    return np.log(np.array([[*row, 1 - sum(row)] for row in known]))


def merged(log_q: Tensor, listed: list[list[int]]) -> Tensor:
    """The student's log-probabilities of the listed tokens and, last, of all other tokens together: [T, k + 1]."""
    rows = []
    for row, tokens in zip(log_q.exp(), listed, strict=True):
        others = sum(q for v, q in enumerate(row) if v not in tokens)
        rows.append(torch.stack([*(row[v] for v in tokens), others]).log())
    return torch.stack(rows)


def alpha(problem: Problem) -> float:
    """alpha(q): Eq. 6, Eq. 8 or a constant."""
    rule, rewards = problem.rule, [[r.reward for r in part] for part in (problem.autonomous, problem.guided)]
    if rule.weight == "fixed":
        return rule.alpha
    if rule.weight == "group-advantage":
        return sgpo.group_advantage_weight(np.array(rewards[0]), rule.alpha_max)
    rates = [float(np.mean(part)) for part in rewards]
    if rule.pass_rates == "corrected":
        rates = corrected_rates(problem)
    return sgpo.adaptive_weight(*rates, rule.alpha0, rule.gamma, rule.alpha_max)


def corrected_rates(problem: Problem) -> list[float]:
    """The pass rates p_auto and p_guide under the model `at`."""
    rates = []
    for part in (problem.autonomous, problem.guided):
        log_pi = [problem.sampled_log_pi(problem.at, r)[sampled(r)].sum().item() for r in part]
        rho = [math.exp(x - float(r.logprobs.astype(np.float64).sum())) for x, r in zip(log_pi, part, strict=True)]
        rewards = np.array([r.reward for r in part])
        rates.append(sgpo.corrected_mean(rewards, np.array(rho), problem.rule.grpo_correction.bound))
    return rates
